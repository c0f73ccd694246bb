"""DenseNets, ResNeXts and MobileNetV2s, plain and with shared filter bases: the authors' numbers, further ones, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thriftnet as tn
from thriftnet.core.conv import GeneratedConv2d
from thriftnet.core.history import history
from thriftnet.errors import ConfigError
from thriftnet.importing.filter_basis import layout as layout_of
from thriftnet.importing.layout import fill
from thriftnet.models import MODELS, densenet, resnext
from thriftnet.models.mobilenetv2 import ChannelAttention
from thriftnet.techniques.filter_basis import BasisConv2d, SharedBasis, SharedBasisConv2d
from zoo_golden import check_logits, check_network, facts, recorded_networks, their_tensors
from zoo_groups import FILTER_BASIS_OTHERS

RECORDED = facts("netrl2")
DENSENET = "cifar100_DenseNet121_SingleShared_S16U1"
DEAD = "shared_basis_4.weight"  # used nowhere in the authors' shared DenseNet

NETWORKS: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar100_DenseNet121": ("cifar_densenet121", {}),
    "cifar100_ResNext50": ("cifar_resnext50", {}),
    "cifar100_ResNext50_SingleShared_s16u4": ("cifar_resnext50_single_shared", {"shared_rank": 16}),
    "cifar100_ResNext50_SingleShared_s32u4": ("cifar_resnext50_single_shared", {"shared_rank": 32}),
    "cifar100_ResNext50_SingleShared_s64u4": ("cifar_resnext50_single_shared", {}),
    "cifar100_ResNext50_SingleShared_s64u8": ("cifar_resnext50_single_shared", {"unique_rank": 8}),
    "cifar100_MobileNetV2": ("cifar_mobilenetv2", {}),
    "cifar100_MobileNetV2_Shared": ("cifar_mobilenetv2_shared", {}),
    "ilsvrc_MobileNetV2": ("mobilenetv2", {}),
    "ilsvrc_MobileNetV2_Shared": ("mobilenetv2_shared", {}),
    "ilsvrc_MobileNetV2_SharedDouble_noECA": ("mobilenetv2_shared_double", {"eca": False}),
}


def params_of(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def check_similarity(case: dict[str, Any], model: nn.Module) -> None:
    """The penalty of the filled network, in float64; where two are recorded, they are added."""
    fill(model.double(), their_tensors(case), layout_of(model))
    expected = sum(case["similarity"][0]["float64"].values())
    assert tn.penalty(model, scaled=False).item() == pytest.approx(expected, rel=1e-9)
    assert tn.penalty(model).item() == pytest.approx(10 * expected, rel=1e-9)


@pytest.mark.parametrize("name", recorded_networks("netrl2", NETWORKS))
def test_counts_logits_and_penalty_are_the_authors(name: str) -> None:
    case, (ours, kwargs) = RECORDED[name], NETWORKS[name]
    model = tn.create_model(ours, **kwargs)
    check_network(case, model, layout_of(model))
    if "similarity" in case:
        check_similarity(case, model)
    else:
        assert tn.penalty(model, scaled=False) == 0


def test_every_recorded_network_is_covered() -> None:
    families = ("DenseNet", "ResNext", "MobileNetV2")
    recorded = {name for name in RECORDED if any(family in name for family in families)}
    assert recorded == {*NETWORKS, DENSENET}


def test_densenet_with_the_authors_sharing_has_their_logits() -> None:
    """All but their dead basis, which has no place in our network."""
    case = RECORDED[DENSENET]
    model = tn.create_model("cifar_densenet121_single_shared", original_sharing=True)
    (dead,) = [shape for key, shape, *_ in case["state_dict"] if key == DEAD]
    assert params_of(model) == case["params"]["total"] - torch.Size(dead).numel() == 5066072
    assert tn.inspect(model).macs == case["macs"]["total"]
    layout = layout_of(model)
    used = {**case, "state_dict": [entry for entry in case["state_dict"] if entry[0] != DEAD]}
    assert set(layout) == {key for key, _, *alias in used["state_dict"] if not alias}
    check_logits(case["logits"], used, model, layout)


def test_densenet_with_a_basis_per_block_has_the_authors_counts_and_penalty() -> None:
    """All their tensors find a place; only what the last block computes differs."""
    case = RECORDED[DENSENET]
    model = tn.create_model("DenseNet121_SingleShared", shared_rank=16, unique_rank=1)
    assert params_of(model) == case["params"]["total"] == 5084504
    assert tn.inspect(model).macs == case["macs"]["total"]
    check_similarity(case, model)
    banks = [block[0].conv2.filters.bank for block in (model.block1, model.block2, model.block3, model.block4)]
    assert len(set(banks)) == 4
    for block, bank in zip((model.block1, model.block2, model.block3, model.block4), banks, strict=True):
        assert all(layer.conv2.filters.bank is bank for layer in block)


@pytest.mark.parametrize(("shared", "unique"), [(64, 4), (8, 0), (24, 2)])
@pytest.mark.parametrize("depth", [121, 161])
def test_densenet_counts_by_hand(depth: int, shared: int, unique: int) -> None:
    layers, growth = {121: ((6, 12, 24, 16), 32), 161: ((6, 12, 36, 24), 48)}[depth]
    width, inner, expected = 2 * growth, 4 * growth, 3 * 9 * 2 * growth
    for place, number in enumerate(layers):
        expected += 9 * inner * shared
        for _ in range(number):
            expected += 2 * width + width * inner + 2 * inner + 9 * inner * unique + (2 + growth) * (shared + unique)
            width += growth
        if place < 3:
            expected += 2 * width + width * (width // 2)
            width //= 2
    expected += 2 * width + width * 7 + 7
    model = tn.create_model(f"cifar_densenet{depth}_single_shared", shared_rank=shared, unique_rank=unique, num_classes=7)
    assert params_of(model) == expected
    if (depth, shared, unique) == (121, 64, 4):
        assert expected == 5606708 - 93 * 1025


@pytest.mark.parametrize(("shared", "unique"), [(4, 4), (128, 16), (512, 4)])
def test_resnext_counts_by_hand(shared: int, unique: int) -> None:
    """Against the plain network: a stage's 3 x 3 convolutions and what depends on their number of outputs."""
    plain = params_of(tn.create_model("cifar_resnext50", in_chans=1))
    expected = plain
    for stage, number in enumerate((3, 4, 6, 3)):
        width, outs, more = 128 * 2**stage, 256 * 2**stage, number - 1
        rank = (shared + unique) * 2**stage
        expected -= more * (9 * width * (width // 32) + 2 * width + width * outs)
        expected += shared * 2**stage * 9 * (width // (shared // 4))
        expected += more * (unique * 2**stage * 9 * (width // (unique * 2**stage // 4)) + 2 * rank + rank * outs)
    model = tn.create_model("cifar_resnext50_single_shared", shared_rank=shared, unique_rank=unique, in_chans=1)
    assert params_of(model) == expected


@pytest.mark.parametrize("name", ["cifar_mobilenetv2", "mobilenetv2"])
def test_mobilenetv2_counts_by_hand(name: str) -> None:
    """Sharing saves 1 x 1 convolutions of 6 w^2 parameters: all but one of each stage's later blocks."""
    saved = sum(6 * width**2 * (later - 1) for width, later in ((32, 2), (64, 3), (96, 2), (160, 2)))
    plain = params_of(tn.create_model(name, num_classes=10))
    assert plain == FILTER_BASIS_OTHERS[name].params - 1281 * (90 if name.startswith("cifar") else 990)
    assert params_of(tn.create_model(f"{name}_shared", num_classes=10)) == plain - saved
    assert params_of(tn.create_model(f"{name}_shared_double", num_classes=10)) == plain - 2 * saved


def test_channel_attention_by_its_definition() -> None:
    layer = ChannelAttention(3).double()
    x = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    before, at, after = layer.conv.weight.flatten()
    expected = torch.empty_like(x)
    for image in range(2):
        means = [0.0, *(x[image, channel].mean() for channel in range(5)), 0.0]
        for c in range(5):
            factor = torch.sigmoid(before * means[c] + at * means[c + 1] + after * means[c + 2])
            expected[image, c] = x[image, c] * factor
    assert torch.allclose(layer(x), expected, rtol=1e-12)


def test_channel_attention_is_the_authors() -> None:
    """17 parameters; one neighbour below 96 channels, three from there on; only where blocks share."""
    model = tn.create_model("MobileNetV2_SharedDouble", eca=True)
    assert params_of(model) == params_of(tn.create_model("mobilenetv2_shared_double")) + 17
    kernels = {name: m.conv.kernel_size[0] for name, m in model.named_modules() if isinstance(m, ChannelAttention)}
    ones = ("stage3.1", "stage3.2", "stage4.1", "stage4.2", "stage4.3")
    threes = ("stage5.1", "stage5.2", "stage6.1", "stage6.2")
    assert kernels == {f"{name}.attention": 1 for name in ones} | {f"{name}.attention": 3 for name in threes}
    attention = {key for key in layout_of(model) if "attention" in key}
    assert attention == {f"{name}.chan_attention.conv.weight" for name in (*ones, *threes)}


def test_cifar_mobilenetv2_widens_its_maps_and_projects_shortcuts() -> None:
    model = tn.create_model("cifar_mobilenetv2")
    assert model.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 32, 34, 34)
    assert model.forward_features(torch.zeros(1, 3, 32, 32)).shape == (1, 1280, 5, 5)
    projections = [name for name, m in model.named_modules() if name.endswith("shortcut") and isinstance(m, nn.Sequential)]
    assert projections == ["stage1.0.shortcut", "stage5.0.shortcut", "stage6.0.shortcut", "stage7.0.shortcut"]
    imagenet = tn.create_model("mobilenetv2")
    assert not any(isinstance(getattr(m, "shortcut", None), nn.Sequential) for m in imagenet.modules())


@pytest.mark.parametrize(
    "name",
    [
        "cifar_densenet121",
        "cifar_densenet121_single_shared",
        "cifar_resnext50_single_shared",
        "cifar_mobilenetv2_shared_double",
        "mobilenetv2_shared_double",
    ],
)
def test_other_images_and_classes(name: str) -> None:
    model = tn.create_model(name, in_chans=1, num_classes=7).eval()
    x = torch.randn(2, 1, 40, 56)
    features = model.forward_features(x)
    logits = model(x)
    assert logits.shape == (2, 7)
    assert torch.equal(model.forward_head(features), logits)
    assert features.shape[:2] == model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    assert model.get_classifier() is model.fc
    assert model.get_submodule(model.default_cfg["first_conv"]).in_channels == 1
    assert model.default_cfg["num_classes"] == 7
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)
    assert history(model) == []


@pytest.mark.parametrize(
    "name", ["cifar_densenet121_single_shared", "cifar_resnext50_single_shared", "mobilenetv2_shared_double"]
)
def test_every_parameter_takes_part(name: str) -> None:
    """No dead basis; and in eval mode the folded network, of plain layers only, computes the same."""
    model = tn.create_model(name).double()
    model(torch.randn(2, 3, 16, 16, dtype=torch.float64)).sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []
    x = torch.randn(1, 3, 16, 16, dtype=torch.float64)
    plain = tn.fold(model.eval())
    assert not any(isinstance(m, GeneratedConv2d | BasisConv2d) for m in plain.modules())
    with torch.no_grad():
        expected = model(x)
        assert (plain(x) - expected).abs().max() <= 1e-11 * expected.abs().max()


def test_shared_convolutions_survive_saving(tmp_path: Path) -> None:
    model = tn.create_model("cifar_mobilenetv2_shared_double", num_classes=5, lambda_r=2.0).eval()
    tn.save(model, tmp_path / "model")
    again = tn.load(tmp_path / "model").eval()
    saved, loaded = model.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert again.stage4[1].conv1 is again.stage4[3].conv1
    assert tn.penalty(again).item() == pytest.approx(2 * tn.penalty(model, scaled=False).item())


def uniform_bound(weight: Tensor) -> float:
    """Of torch's default for a convolution: the inverse root of the entries of a filter."""
    return weight[0].numel() ** -0.5


def check_uniform(weight: Tensor) -> None:
    bound = uniform_bound(weight)
    assert weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert abs(weight.mean().item()) < 0.1 * bound


@pytest.mark.parametrize("original_sharing", [False, True])
def test_densenet_starts_as_torch_starts_convolutions(original_sharing: bool) -> None:
    model = tn.create_model("cifar_densenet121_single_shared", original_sharing=original_sharing)
    banks = [m for m in model.modules() if isinstance(m, SharedBasis)]
    assert len(banks) == (3 if original_sharing else 4)
    for bank in banks:
        check_uniform(bank.shared[0])
        check_uniform(bank.unique.flatten(0, 1))
    for layer in (m for m in model.modules() if isinstance(m, BasisConv2d)):
        check_uniform(layer.coefficients.weight)


def test_resnext_starts_with_orthogonal_shared_filters() -> None:
    model = tn.create_model("cifar_resnext50_single_shared", shared_rank=16)
    shared = {m for m in model.modules() if isinstance(m, SharedBasisConv2d)}
    assert sorted(m.out_channels for m in shared) == [16, 32, 64, 128]
    assert {m.groups for m in shared} == {4}
    assert tn.penalty(model, scaled=False).item() < 1e-10
    assert [model.layer4[2].conv2.unique.groups, model.layer4[2].conv2.unique.out_channels] == [8, 32]
    check_uniform(model.layer3[1].conv2.unique.weight)


def test_mobilenetv2_starts_as_torch_starts_convolutions() -> None:
    model = tn.create_model("mobilenetv2_shared_double")
    shared = {m for m in model.modules() if isinstance(m, SharedBasisConv2d)}
    assert len(shared) == 8
    for module in shared:
        check_uniform(module.weight)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("cifar_densenet121_single_shared", {"shared_rank": 1152}, "at most 1152, .* nearest is shared_rank=1151"),
        ("cifar_densenet121_single_shared", {"shared_rank": 0}, "shared_rank=0: "),
        ("cifar_densenet121_single_shared", {"unique_rank": -1}, "unique_rank=-1: "),
        ("cifar_densenet121_single_shared", {"original_sharing": 1}, "original_sharing=1: .*True"),
        ("cifar_densenet121", {"growth": 12}, "unknown kwarg of cifar_densenet121 'growth'"),
        ("cifar_resnext50_single_shared", {"shared_rank": 18}, "shared_rank=18: .* nearest: 16 and 32"),
        ("cifar_resnext50_single_shared", {"shared_rank": 16, "unique_rank": 1}, "unique_rank=1: .* nearest: 4$"),
        ("cifar_resnext50_single_shared", {"shared_rank": 12}, "the number of groups divides 128; .* nearest: 8 and 16"),
        ("cifar_resnext101_single_shared", {"unique_rank": 4}, "groups of 8, .* nearest: 8$"),
        ("cifar_resnext50_single_shared", {"lambda_r": -1}, "lambda_r=-1: "),
        ("mobilenetv2_shared_double", {"eca": "yes"}, "eca=.yes.*True"),
        ("mobilenetv2", {"drop_rate": 1.0}, r"drop_rate=1\.0: expected a number in"),
        ("cifar_mobilenetv2", {"in_chans": 0}, "in_chans=0: "),
        ("mobilenetv2_shared", {"num_classes": -1}, "num_classes=-1: "),
    ],
    ids=lambda part: ",".join(part) if isinstance(part, dict) else part if " " not in part else "",
)
def test_bad_input(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tn.create_model(name, **kwargs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (densenet.DenseNet, "expected 121, 161, 169, 201; nearest is 121"),
        (densenet.densenet_shared, "expected 121, 161, 169, 201; nearest is 121"),
        (resnext.ResNeXt, "nearest is 101"),
        (resnext.resnext_shared, "nearest is 101"),
    ],
)
def test_impossible_depths(make: Callable[..., Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(depth=110)


@pytest.mark.parametrize("name", FILTER_BASIS_OTHERS)
def test_stored_facts(name: str) -> None:
    entry = MODELS[name]
    with torch.device("meta"):
        report = tn.inspect(tn.create_model(name), entry.input_size)
    assert (report.params, report.macs) == (entry.params, entry.macs)
    assert not entry.baseline or entry.baseline in MODELS


@pytest.mark.parametrize("name", [name for name, entry in FILTER_BASIS_OTHERS.items() if entry.published.params])
def test_published_figures_are_explained(name: str) -> None:
    """Parameters as rounded; FLOPs = 2 x (MACs + 2 BN elements), and ReLUs that are modules: those of plain ResNeXt blocks."""
    entry, model = MODELS[name], tn.create_model(name).eval()
    elements: dict[str, int] = {}
    for key, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, ins, out, key=key: elements.update({key: out.numel()}))
    with torch.no_grad():
        model(torch.zeros(1, *entry.input_size))
    activations = sum(elements[f"layer{i}.0.bn{j}"] for i in (1, 2, 3, 4) for j in (1, 2)) if "resnext" in name else 0
    flops = 2 * (entry.macs + 2 * sum(elements.values()) + activations) / 1e9
    assert f"{flops:.2f}G" == entry.published.flops
    digits = len(entry.published.params.partition(".")[2]) - 1
    assert f"{entry.params / 1e6:.{digits}f}M" == entry.published.params
    assert "2 x (MACs + 2 BN elements)" in entry.published.note
    assert not activations or f"{activations} elements" in entry.published.note
