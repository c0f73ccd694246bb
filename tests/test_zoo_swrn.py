"""Wide ResNets with soft sharing: the authors' numbers, further configurations, bad input."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import thriftnet as tn
from thriftnet.core.history import history
from thriftnet.errors import ConfigError
from thriftnet.importing.soft_sharing import layout as swrn_layout
from thriftnet.models import MODELS
from thriftnet.techniques.soft_sharing import SConv2d, TemplateBank
from zoo_golden import check_logits, check_network, check_train_step, facts, recorded_networks
from zoo_groups import SWRNS

SYSTEM = "softsharing"
NETWORKS = [name for name in facts(SYSTEM) if not name.startswith("train_") and "swrn10-" not in name]
SHALLOW = [name for name in facts(SYSTEM) if name.startswith("swrn10-")]
STEPS = [name for name in facts(SYSTEM) if name.startswith("train_")]
BANK = re.compile(r"bank_\d\.templates")


def build(meta: dict[str, Any]) -> nn.Module:
    """Our network for what the authors built."""
    return tn.create_model(
        "swrn", depth=meta["depth"], width=meta["width"], templates=meta["bank_size"], num_classes=meta["num_classes"]
    )


@pytest.mark.parametrize("name", recorded_networks(SYSTEM, NETWORKS))
def test_counts_and_logits_are_the_authors(name: str):
    case = facts(SYSTEM)[name]
    model = build(case["meta"])
    check_network(case, model, swrn_layout(model))


@pytest.mark.parametrize("name", SHALLOW)
def test_depth_10_leaves_out_the_banks_that_nothing_uses(name: str):
    case = facts(SYSTEM)[name]
    model = build(case["meta"])
    dead = [shape for key, shape, *_ in case["state_dict"] if BANK.fullmatch(key)]
    assert len(dead) == 3
    unused = sum(torch.Size(shape).numel() for shape in dead)
    assert sum(p.numel() for p in model.parameters()) == case["params"]["total"] - unused
    assert tn.inspect(model).macs == case["macs"]["total"]
    used = {**case, "state_dict": [entry for entry in case["state_dict"] if not BANK.fullmatch(entry[0])]}
    layout = swrn_layout(model)
    assert set(layout) == {key for key, _, *alias in used["state_dict"] if not alias}
    check_logits(case["logits"], used, model, layout)


@pytest.mark.parametrize("name", STEPS)
def test_one_training_step_is_the_authors(name: str):
    case = facts(SYSTEM)[f"{name.removeprefix('train_')}_c10"]
    model = build(case["meta"])
    check_train_step(facts(SYSTEM)[name], case, model, swrn_layout(model))


@pytest.mark.parametrize("name", SWRNS)
def test_stored_facts_are_what_is_counted(name: str):
    with torch.device("meta"):
        report = tn.inspect(tn.create_model(name))
    assert (report.params, report.macs) == (MODELS[name].params, MODELS[name].macs)


@pytest.mark.parametrize(("depth", "width", "templates"), [(22, 3, 3), (34, 1, 2), (16, 1, 5), (10, 2, 4), (46, 2, 10)])
def test_parameters_and_macs_by_hand(depth: int, width: int, templates: int):
    """Those of the plain network, less the shared kernels, plus banks and coefficients; as many operations."""
    with torch.device("meta"):
        shared = tn.inspect(tn.create_model("swrn", depth=depth, width=width, templates=templates))
        plain = tn.inspect(tn.create_model("wrn", depth=depth, width=width))
    layers = 2 * (depth - 4) // 6 - 2
    kernels = [9 * (factor * width) ** 2 for factor in (16, 32, 64)]
    change = sum(templates * kernel + layers * templates - layers * kernel for kernel in kernels) if layers else 0
    assert shared.params == plain.params + change
    assert shared.macs == plain.macs
    assert shared.dense_params == plain.params


def test_one_bank_per_stage_serves_all_blocks_but_the_first():
    model = tn.create_model("swrn28_2_2")
    banks = [module for module in model.modules() if isinstance(module, TemplateBank)]
    assert len(banks) == 3
    for stage, bank in zip((model.layer1, model.layer2, model.layer3), banks, strict=True):
        assert not any(isinstance(module, SConv2d) for module in stage[0].modules())
        layers = [module for block in stage[1:] for module in (block.conv1, block.conv2)]
        assert len(layers) == 6
        assert all(layer.bank is bank for layer in layers)


@pytest.mark.parametrize(("templates", "depth"), [(1, 28), (2, 28), (6, 28), (5, 16)])
def test_coefficients_of_a_stage_start_orthogonal(templates: int, depth: int):
    model = tn.create_model("swrn", depth=depth, width=1, templates=templates)
    for stage in (model.layer1, model.layer2, model.layer3):
        rows = torch.stack([m.coefficients.detach() for m in stage.modules() if isinstance(m, SConv2d)]).double()
        gram = rows.T @ rows if len(rows) >= templates else rows @ rows.T
        torch.testing.assert_close(gram, torch.eye(len(gram), dtype=torch.float64), rtol=0, atol=1e-5)


def test_templates_and_convolutions_start_as_kaiming_says():
    model = tn.create_model("swrn28_4_6")
    for key, p in model.named_parameters():
        if "templates" in key or (p.ndim == 4 and p.numel() > 5000):
            fan_in = p.shape[-3:].numel()
            assert abs(p.std().item() / (2 / fan_in) ** 0.5 - 1) < 0.05, key
            assert abs(p.mean().item()) < 5 * (2 / fan_in / p.numel()) ** 0.5
    assert abs(model.fc.weight.std().item() / (2 / 256) ** 0.5 - 1) < 0.06
    assert not model.fc.bias.any()


def test_coefficients_have_no_weight_decay():
    model = tn.create_model("swrn16_1_2")
    groups = tn.param_groups(model, 5e-4)
    assert [sum(p.numel() for p in group["params"]) for group in groups] == [175078 - 12, 12]
    assert [group["weight_decay"] for group in groups] == [5e-4, 0.0]


def test_other_sizes_channels_and_classes():
    model = tn.create_model("swrn", depth=16, width=1, templates=1, in_chans=1, num_classes=7).eval()
    for size in ((40, 56), (17, 32), (5, 4)):
        images = torch.randn(2, 1, *size)
        features = model.forward_features(images)
        assert features.shape == (2, 64, -(-size[0] // 4), -(-size[1] // 4))
        assert torch.equal(model.forward_head(features), model(images))
        assert model(images).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    model.reset_classifier(0)
    assert model(torch.randn(1, 1, 32, 32)).shape == (1, 64)


@pytest.mark.parametrize("kwargs", [{"depth": 16, "width": 1, "templates": 2}, {"depth": 16, "width": 1, "templates": 3}])
def test_it_folds_converts_further_and_is_saved(kwargs: dict[str, int], tmp_path):
    model = tn.create_model("swrn", **kwargs).eval()
    assert history(model) == []
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tn.fold(model)(images), model(images), rtol=1e-4, atol=1e-5)
    assert torch.equal(tn.load(tn.save(model, tmp_path / "m"))(images), model(images))
    shifted = tn.convert(model, "shift", select="0\\.conv")
    assert torch.equal(tn.load(tn.save(shifted, tmp_path / "s"))(images), shifted.eval()(images))


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("swrn", {"depth": 27}, "nearest are 22 and 28"),
        ("swrn", {"depth": 4}, "depth=4"),
        ("swrn", {"width": 0}, "width=0"),
        ("swrn", {"width": 1.5}, "width=1.5"),
        ("swrn", {"templates": 0}, "templates=0"),
        ("swrn", {"template": 2}, "did you mean 'templates'"),
        ("swrn28_10_6", {"depth": 16}, "unknown kwarg"),
        ("swrn28_10_7", {}, "did you mean 'swrn28_10"),
    ],
)
def test_bad_arguments(name: str, kwargs: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        tn.create_model(name, **kwargs)
