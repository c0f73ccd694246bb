"""The ResNets of the filter-basis project against what was recorded of the originals, and by hand where nothing was."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thriftnet as tn
from thriftnet.core.history import history
from thriftnet.errors import ConfigError
from thriftnet.importing.filter_basis import layout as resnet_layout
from thriftnet.models.table import MODELS
from thriftnet.techniques.filter_basis import BasisConv2d, SharedBasis, SharedBasisConv2d
from zoo_golden import check_network, check_train_step, facts, recorded_networks
from zoo_groups import FILTER_BASIS_RESNETS

RECORDED = facts("netrl2")
RESNETS = sorted(name for name in RECORDED if "_ResNet" in name and not name.startswith("train_"))
STEPS = sorted(name for name in RECORDED if name.startswith("train_cifar10_ResNet"))


def ours(meta: dict[str, Any]) -> nn.Module:
    """Our network for a recorded one, under the authors' name."""
    ranks = {key: meta[key] for key in ("shared_rank", "unique_rank") if key in meta}
    return tn.create_model(f"{meta['dataset']}_{meta['model']}", **ranks)


@pytest.mark.parametrize("name", recorded_networks("netrl2", RESNETS))
def test_network(name: str) -> None:
    case = RECORDED[name]
    model = ours(case["meta"])
    check_network(case, model, resnet_layout(model))
    check_penalty(model.double(), case.get("similarity", []))


def check_penalty(model: nn.Module, similarity: list[dict[str, Any]]) -> None:
    """The penalty of a filled network equals what the authors' training scripts add."""
    if not similarity:
        assert tn.penalty(model, scaled=False) == 0
    for recorded in similarity:
        if recorded.get("include_unique_basis") is False:
            for bank in model.modules():
                if isinstance(bank, SharedBasis):
                    bank.unique_penalty = False
        expected = sum(recorded["float64"].values())
        assert tn.penalty(model, scaled=False).item() == pytest.approx(expected, rel=1e-9)
        assert tn.penalty(model).item() == pytest.approx(10 * expected, rel=1e-9)


@pytest.mark.parametrize("name", STEPS)
def test_train_step(name: str) -> None:
    case = RECORDED[RECORDED[name]["model"]]
    model = ours(case["meta"])
    check_train_step(RECORDED[name], case, model, resnet_layout(model))


def stage_params(layers: int, width: int, bases: int, shared: int, unique: int) -> int:
    """Parameters of decomposed 3 x 3 convolutions from ``width`` to ``width`` channels, with the norms inside them."""
    rank = shared + unique
    return bases * shared * 9 * width + layers * (unique * 9 * width + 2 * rank + rank * width)


@pytest.mark.parametrize("depth", [14, 20, 38, 74])
@pytest.mark.parametrize(("bases", "shared", "unique"), [(1, 5, 2), (2, 7, 0), (2, 3, 1), (1, 0, 3)])
def test_params_of_other_cifar10_networks(depth: int, bases: int, shared: int, unique: int) -> None:
    later = (depth - 2) // 6 - 1
    expected = tn.inspect(tn.create_model("resnet20")).params - 2 * 2 * 9 * (16**2 + 32**2 + 64**2) - 2 * 4 * (16 + 32 + 64)
    for width in (16, 32, 64):
        ranks = (shared * width // 16, unique * width // 16)
        expected += stage_params(2 * later, width, bases, *ranks) + 2 * later * 2 * width
    if shared == 0:
        model = tn.create_model("resnet32_non_shared", depth=depth, unique_rank=unique)
    elif (bases, unique) == (2, 0):
        model = tn.create_model("resnet56_shared_only", depth=depth, shared_rank=shared)
    else:
        name = "resnet32_double_shared" if bases == 2 else "resnet56_single_shared"
        model = tn.create_model(name, depth=depth, shared_rank=shared, unique_rank=unique)
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(
    ("name", "blocks"), [("cifar_resnet18_single_shared", (2, 2, 2, 2)), ("resnet34_double_shared", (3, 4, 6, 3))]
)
@pytest.mark.parametrize("ranks", [(8, 1), (24, 3)])
def test_params_of_other_basic_networks(name: str, blocks: tuple[int, ...], ranks: tuple[int, int]) -> None:
    bases = MODELS[name].kwargs["bases"]
    expected = MODELS["cifar_resnet18" if "cifar" in name else "resnet34"].params
    for stage, number in enumerate(blocks):
        layers, width = 2 * (number - 1), 64 * 2**stage
        expected += stage_params(layers, width, bases, *(rank * 2**stage for rank in ranks)) - layers * 9 * width**2
    model = tn.create_model(name, shared_rank=ranks[0], unique_rank=ranks[1])
    assert sum(p.numel() for p in model.parameters()) == expected


@pytest.mark.parametrize(("depth", "blocks"), [(50, (3, 4, 6, 3)), (101, (3, 4, 23, 3))])
def test_params_of_bottleneck_networks(depth: int, blocks: tuple[int, ...]) -> None:
    spared = [(9 * width**2, 4 * width**2) for width in (64, 128, 256, 512)]
    plain = MODELS[f"resnet{depth}"].params
    single = plain - sum((number - 2) * conv2 for number, (conv2, _) in zip(blocks, spared, strict=True))
    both = single - sum((number - 2) * conv3 for number, (_, conv3) in zip(blocks, spared, strict=True))
    assert MODELS[f"resnet{depth}_shared_single"].params == single
    assert MODELS[f"resnet{depth}_shared"].params == both


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "resnet1202" else ()) for name in FILTER_BASIS_RESNETS]
)
def test_stored_facts(name: str) -> None:
    entry = FILTER_BASIS_RESNETS[name]
    with torch.device("meta"):
        report = tn.inspect(tn.create_model(name).eval(), entry.input_size)
    assert (report.params, report.macs) == (entry.params, entry.macs)
    assert set(entry.fixed).isdisjoint(tn.models.model_kwargs(name))


def test_deep_networks_are_built_in_seconds() -> None:
    start = time.process_time()
    model = tn.create_model("resnet1202")
    shared = tn.create_model("resnet56_double_shared", depth=302)
    assert time.process_time() - start < 20
    assert sum(p.numel() for p in model.parameters()) == MODELS["resnet1202"].params
    decomposed = {name for name, module in shared.named_modules() if isinstance(module, BasisConv2d)}
    assert decomposed == {f"layer{stage}.{block}.conv{k}" for stage in (1, 2, 3) for block in range(1, 50) for k in (1, 2)}


@pytest.mark.parametrize("name", ["resnet32_double_shared", "cifar_resnet18_single_shared", "resnet18", "resnet50_shared"])
def test_other_images_and_heads(name: str) -> None:
    model = tn.create_model(name, num_classes=7, in_chans=1).eval()
    images = torch.randn(2, 1, 40, 56)
    with torch.no_grad():
        assert model(images).shape == (2, 7)
        maps = model.forward_features(images)
        assert maps.shape[:2] == (2, model.num_features)
        assert model.forward_head(maps, pre_logits=True).shape == (2, model.num_features)
        assert torch.equal(model.forward_head(maps), model(images))
    assert model.get_classifier() is model.fc
    assert model.default_cfg["num_classes"] == 7
    model.reset_classifier(3)
    assert model(images).shape == (2, 3)


def test_the_history_starts_empty_and_a_saved_network_loads(tmp_path: Any) -> None:
    for name in ("resnet32_double_shared", "resnet50_shared"):
        model = tn.create_model(name, num_classes=5).eval()
        assert history(model) == []
    model = tn.create_model("cifar_resnet18_single_shared", shared_rank=4).eval()
    tn.save(model, tmp_path / "saved")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(tn.load(tmp_path / "saved").eval()(images), model(images))


def test_whole_convolutions_are_shared_folded_and_stored_once() -> None:
    model = tn.create_model("resnet50_shared").eval()
    convs = [model.get_submodule(f"layer3.{block}.conv3") for block in range(6)]
    assert all(conv is convs[1] for conv in convs[1:])
    assert convs[0] is not convs[1]
    assert {"layer3.1.conv3.weight"} == {k for k in model.state_dict() if "layer3" in k and "conv3" in k} - {
        "layer3.0.conv3.weight"
    }
    folded = tn.fold(model)
    images = torch.randn(1, 3, 64, 64)
    assert torch.allclose(folded(images), model(images), rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in folded.parameters()) == MODELS["resnet50_shared"].params


@pytest.mark.parametrize(
    ("name", "kwargs", "hint"),
    [
        ("resnet32_double_shared", {"depth": 33}, "32 and 38"),
        ("resnet32_double_shared", {"depth": 8}, "nearest is 14"),
        ("resnet32_double_shared", {"shared_rank": 144}, "shared_rank=143"),
        ("resnet32_non_shared", {"unique_rank": 145}, "unique_rank=144"),
        ("resnet32_non_shared", {"unique_rank": 0}, "above 0"),
        ("resnet34_single_shared", {"shared_rank": 600}, "shared_rank=575"),
        ("resnet34_single_shared", {"shared_rank": -1}, "shared_rank"),
        ("resnet56_shared_only", {"unique_rank": 1}, "unique_rank"),
        ("resnet50_shared", {"shared_rank": 4}, "shared_rank"),
        ("resnet50", {"num_classes": -1}, "num_classes"),
        ("cifar_resnet34", {"in_chans": 0}, "in_chans"),
    ],
)
def test_bad_input(name: str, kwargs: dict[str, int], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        tn.create_model(name, **kwargs)


def test_bad_input_to_the_functions() -> None:
    from thriftnet.models.basis_resnet import basic_resnet, bottleneck_resnet
    from thriftnet.models.imagenet_resnet import imagenet_resnet

    for build, depth, hint in ((imagenet_resnet, 40, "34"), (basic_resnet, 50, "34"), (bottleneck_resnet, 34, "50")):
        with pytest.raises(ConfigError, match=f"nearest is {hint}"):
            build(depth=depth)
    with pytest.raises(ConfigError, match="stem"):
        imagenet_resnet(stem="large")
    with pytest.raises(ConfigError, match="shared"):
        bottleneck_resnet(shared=3)


def is_orthonormal(rows: Tensor) -> bool:
    return torch.allclose(rows @ rows.T, torch.eye(len(rows)), atol=1e-4)


def assert_spread(weight: Tensor, fan_out: int) -> None:
    """Kaiming, by outputs: standard deviation (2 / fan_out) ** 0.5, within five standard errors."""
    expected = (2 / fan_out) ** 0.5
    assert abs(weight.std().item() / expected - 1) < 5 / (2 * weight.numel()) ** 0.5
    assert abs(weight.mean().item()) < 5 * expected / weight.numel() ** 0.5


@pytest.mark.parametrize("name", ["resnet56_double_shared", "resnet56_shared_only", "cifar_resnet34_single_shared"])
def test_initialisation_of_bases(name: str) -> None:
    torch.manual_seed(0)
    kwargs = {} if "only" in name else {"unique_rank": 4}
    model = tn.create_model(name, **kwargs)
    banks = [module for module in model.modules() if isinstance(module, SharedBasis)]
    assert len(banks) == (4 if "34" in name else 3)
    for bank in banks:
        assert bank.shared is not None
        assert is_orthonormal(bank.shared.detach().flatten(3).flatten(0, 1).flatten(1)), "both bases of a stage together"
        if bank.unique is not None:
            assert_spread(bank.unique.detach(), bank.unique.shape[1] * 9)
    for conv in (module for module in model.modules() if isinstance(module, BasisConv2d)):
        assert_spread(conv.coefficients.weight.detach(), conv.out_channels)
        assert conv.norm.weight.eq(1).all()
        assert conv.norm.bias.eq(0).all()
    for conv in (module for module in model.modules() if type(module) is nn.Conv2d):
        assert_spread(conv.weight.detach(), conv.out_channels * conv.weight[0, 0].numel())


def test_initialisation_of_whole_convolutions() -> None:
    torch.manual_seed(0)
    model = tn.create_model("resnet50_shared")
    shared = [module for module in model.modules() if isinstance(module, SharedBasisConv2d)]
    assert len(shared) == 8
    for conv in shared:
        rows = conv.weight.detach().flatten(1)
        assert is_orthonormal(rows if len(rows) <= rows.shape[1] else rows.T), "each alone"
    for conv in (module for module in model.modules() if type(module) is nn.Conv2d):
        assert_spread(conv.weight.detach(), conv.out_channels * conv.weight[0, 0].numel())


def test_names_as_in_torchvision() -> None:
    keys = set(tn.create_model("resnet50").state_dict())
    assert {"conv1.weight", "layer1.0.downsample.0.weight", "layer4.2.bn3.running_var", "fc.bias"} <= keys
    assert len(keys) == 320
