"""ShiftResNets and the networks they are compared with: the authors' numbers, further configurations, bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import thriftnet as tn
from thriftnet.errors import ConfigError
from thriftnet.importing.shiftresnet import layout as shiftresnet_layout
from thriftnet.models import MODELS
from zoo_golden import check_network, check_train_step, facts
from zoo_groups import SHIFTRESNETS

SYSTEM = "shiftresnet"
NETWORKS = sorted(name for name in facts(SYSTEM) if not name.startswith("train_"))
STEPS = sorted(name for name in facts(SYSTEM) if name.startswith("train_"))
DEPTHS = (20, 56, 110)
OURS = ("shuffleresnet20", "mobileresnet20")


def build(meta: dict[str, Any]) -> nn.Module:
    """Our network for what the authors built."""
    possible = ("expansion", "reduction", "reduction_mode", "num_classes")
    kwargs = {key: meta[key] for key in possible if key in meta}
    if meta["arch"].startswith("resnet"):
        kwargs["shortcut"] = "projection"
    return tn.create_model(meta["arch"], **kwargs)


@pytest.mark.parametrize("name", NETWORKS)
def test_counts_and_logits_are_the_authors(name: str):
    case = facts(SYSTEM)[name]
    model = build(case["meta"])
    check_network(case, model, shiftresnet_layout(model))


@pytest.mark.parametrize("name", STEPS)
def test_one_training_step_is_the_authors(name: str):
    case = facts(SYSTEM)[f"{name.removeprefix('train_')}_c10"]
    model = build(case["meta"])
    check_train_step(facts(SYSTEM)[name], case, model, shiftresnet_layout(model))


@pytest.mark.parametrize("name", SHIFTRESNETS)
def test_stored_facts_are_what_is_counted(name: str):
    with torch.device("meta"):
        report = tn.inspect(tn.create_model(name))
    assert (report.params, report.macs) == (MODELS[name].params, MODELS[name].macs)


def pairs() -> list[tuple[int, int]]:
    """(ins, outs) of the first blocks of the stages."""
    return [(16, 16), (16, 32), (32, 64)]


def outside(classes: int = 10) -> int:
    """Parameters outside the blocks' branches: stem, projections, head."""
    projections = sum(ins * outs + 2 * outs for ins, outs in pairs()[1:])
    return 3 * 16 * 9 + 2 * 16 + projections + 64 * classes + classes


@pytest.mark.parametrize("expansion", [0.5, 1.7, 2, 4.25])
@pytest.mark.parametrize("depth", DEPTHS)
def test_shiftresnet_parameters_by_hand(depth: int, expansion: float):
    def block(ins: int, outs: int) -> int:
        middle = int(outs * expansion)
        return ins * middle + 2 * middle + middle * outs + 2 * outs

    blocks = (depth - 2) // 6
    expected = outside() + sum(block(ins, outs) + (blocks - 1) * block(outs, outs) for ins, outs in pairs())
    with torch.device("meta"):
        model = tn.create_model(f"shiftresnet{depth}", expansion=expansion)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize("reduction", [0.3, 1.0, 3.3])
@pytest.mark.parametrize("kind", ["depthwise", "shuffle", "mobile"])
def test_depthwise_parameters_by_hand(kind: str, reduction: float):
    def block(ins: int, outs: int) -> int:
        groups = 4 if kind == "shuffle" else 1
        inner = int(outs / reduction) // groups * groups
        return (ins + outs) * inner // groups + 9 * inner + 4 * inner + 2 * outs

    skips = sum(ins * outs + 2 * outs for ins, outs in pairs()[1:]) if kind == "mobile" else 0
    expected = outside(7) - skips + sum(block(ins, outs) + 8 * block(outs, outs) for ins, outs in pairs())
    with torch.device("meta"):
        model = tn.create_model(f"{kind}resnet56", reduction=reduction, num_classes=7)
    assert sum(p.numel() for p in model.parameters()) == expected


def test_shuffles_match_the_published_sizes():
    """The README gives reductions at which shuffle blocks are as large as shift blocks."""
    for reduction, published in ((0.38, 0.03), (0.13, 0.10), (0.065, 0.19)):
        with torch.device("meta"):
            model = tn.create_model("shuffleresnet20", reduction=reduction)
        assert abs(sum(p.numel() for p in model.parameters()) / 1e6 - published) < 0.01


@pytest.mark.parametrize(("name", "params", "macs"), [("shiftresnet20_e3", 2.85, 2.48), ("resnet20_block28", 2.83, 2.90)])
def test_reductions_that_the_readme_shows(name: str, params: float, macs: float):
    plain, small = MODELS["resnet20_projection"], MODELS[name]
    assert (round(plain.params / small.params, 2), round(plain.macs / small.macs, 2)) == (params, macs)


@pytest.mark.parametrize("name", SHIFTRESNETS)
def test_published_figures_agree_with_ours_or_are_explained(name: str):
    entry = MODELS[name]
    published = entry.published
    if published.params.endswith("M"):
        assert published.params == f"{entry.params / 1e6:.2f}M"
    elif published.params:
        assert int(published.params.replace(",", "")) == entry.params
    if published.flops:
        assert int(published.flops.replace(",", "")) == entry.macs + 147456
        assert "147,456" in published.note
    if entry.baseline:
        with torch.device("meta"):
            plain = tn.create_model(entry.baseline, **entry.baseline_kwargs)
        assert sum(p.numel() for p in plain.parameters()) == MODELS[entry.baseline].params


@pytest.mark.parametrize("name", ["shiftresnet20", "depthwiseresnet20", "resnet20_block28", *OURS])
def test_other_sizes_channels_and_classes(name: str):
    model = tn.create_model(name, in_chans=1, num_classes=7).eval()
    for size in ((40, 56), (17, 32), (5, 4)):
        images = torch.randn(2, 1, *size)
        features = model.forward_features(images)
        assert features.shape == (2, 64, -(-size[0] // 4), -(-size[1] // 4))
        assert torch.equal(model.forward_head(features), model(images))
        assert model(images).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    assert model.default_cfg["input_size"] == (1, 32, 32)
    model.reset_classifier(3)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 3)


def test_the_sum_of_a_shift_block_may_be_negative_and_that_of_the_others_not():
    images = torch.randn(2, 3, 32, 32)
    lowest = {
        name: tn.create_model(name).eval().forward_features(images).min().item()
        for name in ("shiftresnet20", "depthwiseresnet20", "shuffleresnet20", "mobileresnet20")
    }
    assert lowest["shiftresnet20"] < 0
    assert lowest["mobileresnet20"] < 0
    assert lowest["depthwiseresnet20"] == lowest["shuffleresnet20"] == 0


def test_groups_of_a_shuffle_block_read_from_one_another():
    block = tn.create_model("shuffleresnet20").eval().layer1[1]
    images = torch.randn(4, 16, 9, 9, requires_grad=True)
    block(images)[:, 0].sum().backward()
    assert (images.grad.abs().sum((0, 2, 3)) > 0).all()


@pytest.mark.parametrize("name", ["shiftresnet20", "depthwiseresnet20", "resnet20_projection", *OURS])
def test_a_step_reaches_every_parameter(name: str):
    model = tn.create_model(name).train()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()] == []


@pytest.mark.parametrize("name", ["shiftresnet56", "depthwiseresnet56", "resnet56_projection"])
def test_weights_start_as_torch_starts_them(name: str):
    """Uniform within the inverse square root of the fan-in; norms at one and zero."""
    model = tn.create_model(name)
    for key, p in model.named_parameters():
        if p.ndim == 4:
            bound = p[0].numel() ** -0.5
            assert p.abs().max().item() <= bound
            if p.numel() > 4000:
                assert abs(p.std().item() / (bound / 3**0.5) - 1) < 0.06, key
        elif "bn" in key or "norm" in key:
            assert torch.equal(p, torch.ones_like(p) if key.endswith("weight") else torch.zeros_like(p))


def test_a_shiftresnet_folds_and_is_saved(tmp_path):
    model = tn.create_model("ShiftResNet20", expansion=2.5)
    images = torch.randn(2, 3, 32, 32)
    model(images)
    model.eval()
    torch.testing.assert_close(tn.fold(model)(images), model(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(tn.load(tn.save(model, tmp_path / "m"))(images), model(images))


def test_authors_names():
    with torch.device("meta"):
        assert tn.create_model("shiftresnet20_3.0").layer1[0].conv.shift.channels == 48
        assert len(tn.create_model("DepthwiseResNet110").layer1) == 18
        assert len(tn.create_model("ShiftResNet56").layer3) == 9


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("shiftresnet20", {"expansion": 0}, "a number > 0"),
        ("shiftresnet20", {"expansion": 0.05}, "at least 0.0625"),
        ("shiftresnet20", {"expansion": "3"}, "expansion='3'"),
        ("shiftresnet20", {"in_chans": 0}, "in_chans=0"),
        ("shiftresnet20", {"expnsion": 3}, "did you mean 'expansion'"),
        ("shiftresnet20", {"reduction": 3}, "unknown kwarg"),
        ("shiftresnet21", {}, "did you mean 'shiftresnet"),
        ("depthwiseresnet20", {"reduction": -1}, "expected a number from"),
        ("depthwiseresnet20", {"reduction": 17}, "at most 16"),
        ("shuffleresnet20", {"reduction": 5}, "at most 4"),
        ("mobileresnet20", {"num_classes": -1}, "num_classes=-1"),
    ],
)
def test_bad_arguments(name: str, kwargs: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        tn.create_model(name, **kwargs)


@pytest.mark.parametrize("family", ["shiftresnet", "depthwise_resnet"])
def test_impossible_depths_name_the_nearest(family: str):
    from thriftnet.models import depthwise_resnet, shiftresnet

    function = {"shiftresnet": shiftresnet.shiftresnet, "depthwise_resnet": depthwise_resnet.depthwise_resnet}[family]
    with pytest.raises(ConfigError, match="nearest are 20 and 26"):
        function(depth=21)
    with torch.device("meta"):
        assert len(function(depth=26).layer2) == 4
