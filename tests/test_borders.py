"""Where users slip: arguments of the wrong kind, layers with a past, and networks that were changed on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import thriftnet as tn
from thriftnet.errors import ConfigError, IncompatibleModelError

SPECS = [
    "weight-sharing",
    "weight-sharing(fusion='channel_weighted_mean')",
    "soft-sharing(templates=2)",
    "filter-basis(shared_rank=4)",
    "shift",
    "slimmable(widths=(0.5, 1.0))",
]


@pytest.mark.parametrize(
    ("technique", "message"),
    [
        (None, "expected a technique's config or text"),
        (5, "expected a technique's config or text"),
        (nn.Linear(1, 1), "expected a technique's config or text"),
        (tn.SoftSharing, r"write SoftSharing\(\)"),
        ("slimmable(widths=(1.0,), widths=(0.5,))", "given twice"),
    ],
    ids=str,
)
def test_what_is_no_technique(technique: object, message: str):
    with pytest.raises(ConfigError, match=message):
        tn.convert(tn.create_model("resnet20"), technique)


@pytest.mark.parametrize("select", [5, [5], {"layer1": 1}], ids=str)
def test_what_is_no_selection(select: object):
    with pytest.raises(ConfigError, match="expected a regular expression, a list of names"):
        tn.convert(tn.create_model("resnet20"), "shift", select=select)


def test_a_name_is_no_network():
    with pytest.raises(ConfigError, match="create_model"):
        tn.convert("resnet20", "shift")


@pytest.mark.parametrize("value", [-1, "a", float("nan"), float("inf")], ids=str)
def test_what_is_no_weight_decay(value: object):
    with pytest.raises(ConfigError, match="weight_decay"):
        tn.param_groups(tn.create_model("resnet20"), value)


def test_a_network_without_convolutions_is_told_what_is_taken():
    with pytest.raises(IncompatibleModelError, match=r"has no convolutions\. It takes"):
        tn.convert(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "soft-sharing")


def test_images_of_the_wrong_kind_name_the_layer():
    with pytest.raises(ConfigError, match=r"layer 'conv1' of ResNet reads images \(N, 3, H, W\), got \(2, 1, 32, 32\)"):
        tn.create_model("resnet20")(torch.randn(2, 1, 32, 32))


@pytest.mark.parametrize("spec", SPECS)
def test_hooks_are_not_lost_in_silence(spec: str):
    model = tn.create_model("resnet20")
    handle = model.layer1[0].conv2.register_forward_hook(lambda module, args, output: output * 0)
    with pytest.raises(IncompatibleModelError, match=r"layer1\.0\.conv2.*forward hooks"):
        tn.convert(model, spec)
    handle.remove()
    tn.convert(model, spec)


def test_old_style_weight_norm_is_refused():
    model = tn.create_model("resnet20")
    nn.utils.weight_norm(model.layer1[0].conv1)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    with pytest.raises(IncompatibleModelError, match="weight_norm"):
        tn.convert(model, "shift")


@pytest.mark.parametrize("spec", SPECS)
def test_frozen_layers_stay_frozen(spec: str):
    model = tn.create_model("resnet20").requires_grad_(False)
    model.fc.requires_grad_(True)
    trainable = {name for name, p in tn.convert(model, spec).named_parameters() if p.requires_grad}
    assert trainable == {"fc.weight", "fc.bias"}
    assert all(p.requires_grad for p in tn.convert(tn.create_model("resnet20"), spec).parameters())


@pytest.mark.parametrize("spec", SPECS)
def test_channels_last_and_types(spec: str):
    model = tn.convert(tn.create_model("resnet20"), spec).eval()
    images = torch.randn(2, 3, 32, 32)
    expected = model(images)
    moved = model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(moved(images.to(memory_format=torch.channels_last)), expected, rtol=1e-3, atol=1e-4)
    assert {p.dtype for p in moved.to(torch.float64).parameters()} == {torch.float64}


def test_a_shift_comes_back_from_the_meta_device():
    with torch.device("meta"):
        empty = tn.convert(tn.create_model("resnet20"), "shift")
    full = tn.convert(tn.create_model("resnet20"), "shift").eval()
    images = torch.randn(1, 3, 32, 32)
    for loaded in (tn.convert(tn.create_model("resnet20"), "shift").to("meta").to_empty(device="cpu"), empty):
        loaded.load_state_dict(full.state_dict(), assign=True)
        traced = torch.export.export(loaded.eval(), (images,)).module()
        torch.testing.assert_close(traced(images), full(images), rtol=1e-4, atol=1e-5)


def test_a_plan_of_another_network_is_refused():
    planned = tn.plan(tn.create_model("resnet20"), "slimmable(widths=(0.5, 1.0))")
    with pytest.raises(IncompatibleModelError, match=r"made for another network.*leaves out"):
        tn.convert(tn.create_model("resnet32"), planned)


@pytest.mark.parametrize("name", ["resnet20", "shiftresnet20", "swrn16_1_2", "cifar_mobilenetv2"])
@pytest.mark.parametrize("classes", [5, 0])
def test_a_new_head_is_saved_and_loaded(name: str, classes: int, tmp_path: Path):
    model = tn.create_model(name).eval()
    model.reset_classifier(classes)
    assert not any(module.training for module in model.modules())
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(tn.load(tn.save(model, tmp_path / "m"))(images), model(images))
    assert tn.create_model(name, num_classes=classes).num_classes == classes


def test_a_loaded_network_computes_the_same_bits(tmp_path: Path):
    def plain() -> nn.Module:
        return pytest.importorskip("torchvision").models.mobilenet_v3_small(num_classes=10).eval()

    model = tn.convert(plain(), "weight-sharing")
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(tn.load(tn.save(model, tmp_path / "m"), model=plain())(images), model(images))


def test_recalibrate_takes_one_width_and_refuses_what_is_no_image():
    model = tn.convert(tn.create_model("resnet20"), "slimmable(widths=(0.5, 1.0))")
    before = {name: value.clone() for name, value in model.named_buffers()}
    with pytest.raises(tn.DataError, match="tensors or"):
        tn.recalibrate(model, [{"image": torch.randn(2, 3, 32, 32)}])
    assert all(torch.equal(before[name], value) for name, value in model.named_buffers())
    tn.recalibrate(model, [torch.randn(2, 3, 32, 32)], widths=0.5)
    changed = {name.rpartition(".")[2] for name, value in model.named_buffers() if not torch.equal(before[name], value)}
    assert changed == {"running_mean_0", "running_var_0", "num_batches_tracked_0"}
