"""Packed networks compute what they were packed from, in whatever way they are run."""

from __future__ import annotations

import copy
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import thriftnet as tn
from thriftnet.dynamic.micro_batch import MicroBatched, bytes_per_image
from thriftnet.errors import IncompatibleModelError
from thriftnet.kernels.packed import PackedConv2d

NETWORKS = ("resnet20", "shiftresnet20_e3", "ds_digits", "convmixer", "cifar_mobilenetv2_shared", "preact")


class Preactivated(nn.Module):
    """A shortcut that reads what an activation must not overwrite, an activation used twice, and one layer used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.act, self.gelu = nn.BatchNorm2d(8), nn.SiLU(), nn.GELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        y = self.act(self.norm(x))
        y = self.gelu(self.two(self.act(self.two(y))))
        return x + y


def network(name: str) -> tuple[nn.Module, tuple[int, int, int]]:
    torch.manual_seed(0)
    size = (3, 32, 32)
    if name == "preact":
        model: nn.Module = Preactivated()
    elif name == "ds_digits":
        stages = [[[8, 16], 1, 3, 1, "ds", False], [[16, 24], 2, 3, 2, "ds", True]]
        model = tn.create_model("dsnet", stem=[8, 12], stages=stages, num_classes=10)
    elif name == "convmixer":
        model = tn.create_model("ws_convmixer", dim=32, depth=4, kernel_size=5, patch_size=4, num_classes=10)
    else:
        model = tn.create_model(name)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None and module.running_var is not None:
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return model.eval(), size


def close(one: Tensor, other: Tensor, tolerance: float = 3e-6) -> bool:
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_computes_what_it_was_packed_from(name: str) -> None:
    model, size = network(name)
    packed = tn.pack(model, input_size=size)
    assert any(isinstance(module, PackedConv2d) for module in packed.modules())
    images = torch.randn(3, *size)
    with torch.no_grad():
        wanted = model(images)
        for layout in (torch.contiguous_format, torch.channels_last):
            for implementation in ("packed", "plain"):
                with tn.kernels.force(convolution=implementation):
                    assert close(packed(images.contiguous(memory_format=layout)), wanted)
            assert close(packed(images.contiguous(memory_format=layout)), wanted)
    assert not any(isinstance(module, PackedConv2d) for module in model.modules())


def test_takes_activations_along_only_where_nothing_else_reads() -> None:
    model, size = network("preact")
    packed = tn.pack(model, input_size=size)
    assert packed.one.activation is None  # its output is read by the norm and the sum
    assert packed.two.activation is None  # it runs before two kinds of activations
    plain = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 1), nn.Tanh()).eval()
    packed = tn.pack(plain, input_size=(3, 8, 8))
    assert isinstance(packed[0].activation, nn.ReLU6)
    assert [type(module) for module in packed][1:3] == [nn.Identity, nn.Identity]
    assert packed[3].activation is None
    images = torch.randn(2, 3, 8, 8) * 10
    with torch.no_grad():
        assert close(packed(images), plain(images))


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.Hardswish(), nn.GELU(), nn.GELU("tanh")])
def test_every_activation(activation: nn.Module) -> None:
    plain = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), activation).eval()
    packed = tn.pack(plain, input_size=(4, 9, 9))
    assert packed[0].activation is not None
    images = torch.randn(5, 4, 9, 9) * 5
    with torch.no_grad(), tn.kernels.force(convolution="packed"):
        assert close(packed(images), plain(images))


@pytest.mark.parametrize("padding", ["same", "valid"])
def test_leaves_layers_that_pad_otherwise(padding: str) -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 4, padding=padding), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")).eval()
    packed = tn.pack(plain, input_size=(3, 9, 9))
    assert all(type(layer) is nn.Conv2d for layer in packed)


def test_weights_and_sizes_may_change() -> None:
    packed = tn.pack(nn.Sequential(nn.Conv2d(16, 16, 3, padding=1)).eval(), input_size=(16, 16, 16))
    layer = packed[0]
    with torch.no_grad(), tn.kernels.force(convolution="packed"):
        for size in (16, 8, 16):
            images = torch.randn(2, 16, size, size)
            assert close(packed(images), nn.functional.conv2d(images, layer.weight, layer.bias, padding=1))
        layer.weight.mul_(2)
        assert close(packed(images), nn.functional.conv2d(images, layer.weight, layer.bias, padding=1))
        packed.load_state_dict({name: torch.ones_like(value) for name, value in packed.state_dict().items()})
        assert close(packed(images), nn.functional.conv2d(images, torch.ones(16, 16, 3, 3), torch.ones(16), padding=1))
        other = copy.deepcopy(packed)
        other[0].weight.zero_()
        assert torch.equal(other(images), torch.ones(2, 16, 16, 16))
        assert not torch.equal(packed(images), other(images))


def test_gradients_types_and_transforms() -> None:
    """Wherever the fast implementation does not apply, the layer is a convolution and its activation."""
    plain = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.ReLU()).eval()
    packed = tn.pack(plain, input_size=(16, 8, 8))
    images = torch.randn(2, 16, 8, 8, requires_grad=True)
    grads = [torch.autograd.grad(model(images).square().sum(), images)[0] for model in (plain, packed)]
    assert close(grads[1], grads[0])
    with torch.no_grad():
        assert close(torch.func.vmap(packed)(images[None])[0], plain(images))
        assert close(torch.compile(packed, backend="eager", fullgraph=True)(images), plain(images))
        assert close(torch.jit.trace(packed, images)(images * 2), plain(images * 2))
        assert close(packed.double()(images.double()).float(), plain(images))
        with torch.autocast("cpu", torch.bfloat16):
            assert packed.float()(images).dtype is torch.bfloat16
    exported = torch.export.export(packed.float(), (images.detach(),))
    assert "mkldnn" not in str(exported.graph)
    assert close(exported.module()(images.detach()), plain(images))


@pytest.mark.parametrize("view", ["expanded", "every second channel", "transposed", "last channels"])
def test_views_are_read_right(view: str) -> None:
    plain = nn.Sequential(nn.Conv2d(4, 3, (5, 2), padding=(2, 0)), nn.GELU("tanh")).eval()
    packed = tn.pack(plain, input_size=(4, 14, 3))
    images = {
        "expanded": torch.randn(1, 1, 1, 1).expand(2, 4, 14, 3),
        "every second channel": torch.randn(2, 8, 14, 3)[:, ::2],
        "transposed": torch.randn(2, 4, 3, 14).transpose(2, 3),
        "last channels": torch.randn(2, 8, 14, 3).contiguous(memory_format=torch.channels_last)[:, 4:],
    }[view]
    with torch.no_grad(), tn.kernels.force(convolution="packed"):
        assert close(packed(images), plain(images))


ODD = {
    "one channel": nn.Conv2d(1, 3, (5, 2), padding=(2, 0)),
    "unequal strides": nn.Conv2d(4, 3, 3, stride=(1, 2)),
    "dilation": nn.Conv2d(4, 3, 3, padding=2, dilation=2),
    "more padding than kernel": nn.Conv2d(4, 3, (3, 1), padding=(1, 1)),
}


@pytest.mark.parametrize("name", ODD)
def test_leaves_odd_geometries_alone(name: str) -> None:
    """In some of them oneDNN's packed convolution gives wrong values or crashes, depending on the version."""
    assert type(tn.pack(nn.Sequential(ODD[name]).eval(), input_size=(ODD[name].in_channels, 9, 9))[0]) is nn.Conv2d


def test_many_geometries() -> None:
    chance = random.Random(0)
    tried = 0
    while tried < 300:
        groups = chance.choice([1, 1, 2, 3, 6])
        ins, outs = chance.choice([2, 6, 12, 18, 48]), chance.choice([6, 12, 48])
        kernel = chance.choice([1, 2, 3, 5]), chance.choice([1, 2, 3, 5])
        padding = chance.randrange(kernel[0]), chance.randrange(kernel[1])
        size = chance.choice([1, 2, 5, 7, 14]), chance.choice([1, 3, 8, 9])
        if ins % groups or any(s + 2 * p < k for s, p, k in zip(size, padding, kernel, strict=True)):
            continue
        conv = nn.Conv2d(ins, outs, kernel, chance.choice([1, 2, 3]), padding, 1, groups, bias=chance.random() < 0.5)
        layer = PackedConv2d(conv, chance.choice([None, nn.ReLU(), nn.SiLU()]))
        images = torch.randn(chance.choice([1, 2, 4]), ins, *size)
        if chance.random() < 0.5:
            images = images.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            with tn.kernels.force(convolution="packed"):
                found = layer(images)
            with tn.kernels.force(convolution="plain"):
                assert close(found, layer(images), 1e-5), f"{layer} on {tuple(images.shape)}"
        tried += 1


def test_hooks_are_kept() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU()).eval()
    seen: list[str] = []
    plain[0].register_forward_hook(lambda *_: seen.append("convolution"))
    plain[3].register_forward_hook(lambda *_: seen.append("activation"))
    packed = tn.pack(plain, input_size=(3, 8, 8))
    seen.clear()
    with torch.no_grad():
        packed(torch.randn(1, 3, 8, 8))
    assert seen == ["convolution", "activation"]


def test_bfloat16() -> None:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16")
    plain = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.SiLU()).eval().bfloat16()
    packed = tn.pack(plain, input_size=(16, 8, 8))
    images = torch.randn(2, 16, 8, 8).bfloat16()
    with torch.no_grad():
        assert tn.kernels.explain(packed, images).rows[0][1].implementation == "packed"
        assert close(packed(images).float(), plain(images).float(), 1e-2)


def test_explains_what_runs() -> None:
    packed = tn.pack(nn.Sequential(nn.Conv2d(64, 64, 3, padding=1)).eval(), input_size=(64, 32, 32))
    with torch.no_grad():
        assert tn.kernels.explain(packed, torch.zeros(1, 64, 32, 32)).rows[0][1].implementation == "packed"
        assert "longer than so little work" in str(tn.kernels.explain(packed, torch.zeros(1, 64, 2, 2)))
    assert "with gradients" in str(tn.kernels.explain(packed, torch.zeros(1, 64, 32, 32, requires_grad=True)))


@pytest.mark.parametrize(
    "technique", ["soft-sharing", "filter-basis", "weight-sharing", "shift", "slimmable(widths=(0.5, 1.0))"]
)
def test_converted_networks_are_folded_saved_and_counted(technique: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tn.convert(tn.create_model("resnet20"), technique).eval()
    if "slimmable" in technique:
        tn.set_width(model, 0.5)
    packed = tn.pack(model)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert close(packed(images), model(images))
        loaded = tn.load(tn.save(packed, tmp_path / "packed"))
        assert close(loaded(images), model(images))
    assert any(isinstance(module, PackedConv2d) for module in loaded.modules())
    assert tn.inspect(packed).macs == tn.inspect(tn.fold(model)).macs


def test_refusals() -> None:
    model = tn.create_model("resnet20")
    with pytest.raises(IncompatibleModelError, match="training mode"):
        tn.pack(model)
    packed = tn.pack(model.eval())
    with pytest.raises(IncompatibleModelError, match="packed from"):
        tn.convert(packed, "soft-sharing")
    with pytest.raises(RuntimeError, match="channels"):
        packed.conv1(torch.zeros(1, 4, 32, 32))


def test_large_batches_run_in_micro_batches() -> None:
    """As many images at a time as keep the largest tensor small; the outputs are those of all at once."""
    part = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 2, 1))
    size = (3, 64, 64)

    def run(ghost: nn.Module) -> None:
        ghost(torch.empty(2, *size, device="meta"))

    assert bytes_per_image(part, run) == 16 * 64 * 64 * 4
    split = MicroBatched(part, run)
    assert split.micro_batch_size == 63
    seen: list[int] = []
    part[0].register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    images = torch.randn(130, *size)
    with torch.no_grad():
        assert close(split(images), part(images))
    assert seen == [44, 43, 43, 130]
