"""Filter bases: folded and unfolded forwards, training steps of single convolutions, and the penalty."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from benchmarks.baselines import OriginalBasisConv2d, penalty_of_full_gram, wanted_entries, with_original_bases
from benchmarks.measuring import Case, Fact, Ratio, Settings, Target
from benchmarks.networks import batch, forward, settled
from thriftnet.core.fold import fold
from thriftnet.models.basis_resnet import cifar10_resnet
from thriftnet.models.resnet import resnet
from thriftnet.techniques.filter_basis import BasisConv2d, SharedBasis

TOPIC = "filter-basis"
P3 = Target("P3", "folded ResNet56 forward against the plain one: equal, within what two runs differ by", 1.05)
P3B = Target("P3", "two-convolution ResNet56 forward (as written: NCHW) against the folded one", 2.0, "at least")
P3T_NARROW = Target("P3t", "training step of a 16-channel convolution against the plain one", 1.9)
P3T_WIDE = Target("P3t", "training step of an ImageNet-width convolution against the plain one", 1.1)
P3O_SMALL = Target("P3o", "penalty against the full Gram matrix, small groups", 0.7)
P3O_LARGE = Target("P3o", "penalty against the full Gram matrix, large ranks", 0.5)


def cases(settings: Settings) -> Iterator[Case | Fact]:
    """The topic's cases."""
    if settings.sweep:
        yield from (step_case(channels, 32, 16, channels // 2, 1, None, channels) for channels in (16, 32, 64, 128, 256))
        return
    yield forward_case(settings)
    images = 2 if settings.quick else 64
    yield step_case(16, 32, images, 16, 1, P3T_NARROW)
    if not settings.quick:
        yield step_case(64, 56, 8, 32, 16, P3T_WIDE)
        yield step_case(256, 14, 8, 128, 64, P3T_WIDE)
    stages = [(16, 1, 16), (32, 2, 32), (64, 4, 64)]
    yield penalty_case("the three stages of ResNet-56", [random_bank(2, s, 16, u, c) for s, u, c in stages], P3O_SMALL)
    yield penalty_case("128 shared and 32 x 40 unique filters", [random_bank(1, 128, 32, 40, 128)], P3O_LARGE)


def forward_case(settings: Settings) -> Case:
    """ResNet-56 and the authors' network with double shared bases."""
    torch.manual_seed(0)
    depth = 14 if settings.quick else 56
    plain, ours = (settled(made(depth)).eval() for made in (resnet, cifar10_resnet))
    x, _ = batch(2 if settings.quick else 64, 32)
    last = x.contiguous(memory_format=torch.channels_last)
    folded, original = fold(ours), with_original_bases(copy.deepcopy(ours))
    variants = {
        "plain network, NCHW": forward(plain, x),
        "thriftnet, folded, NCHW": forward(folded, x),
        "thriftnet, NCHW": forward(ours, x),
        "two convolutions, NCHW": forward(original, x),
        "plain network, channels_last": forward(in_channels_last(plain), last),
        "thriftnet, folded, channels_last": forward(in_channels_last(folded), last),
        "two convolutions, channels_last": forward(in_channels_last(original), last),
    }
    ratios = [
        Ratio("thriftnet, folded, NCHW", "plain network, NCHW", P3),
        Ratio("thriftnet, folded, channels_last", "plain network, channels_last", P3),
        Ratio("two convolutions, NCHW", "plain network, NCHW"),
        Ratio("two convolutions, NCHW", "thriftnet, folded, NCHW"),
        Ratio("two convolutions, NCHW", "thriftnet, folded, channels_last", P3B),
        Ratio("two convolutions, channels_last", "thriftnet, folded, channels_last"),
        Ratio("thriftnet, NCHW", "plain network, NCHW"),
    ]
    apart = frozenset({"plain network, NCHW", "plain network, channels_last"})
    return Case(TOPIC, f"ResNet-{depth} with bases, forward, batch {len(x)}", variants, ratios, 9, apart, tolerance=1e-3)


def in_channels_last(model: nn.Module) -> nn.Module:
    """A copy of the network in this layout."""
    copied: nn.Module = copy.deepcopy(model).to(memory_format=torch.channels_last)
    return copied


def step_case(
    channels: int, side: int, images: int, shared: int, unique: int, target: Target | None, size: float | None = None
) -> Case:
    """One convolution, forward and backward, in either layout."""
    torch.manual_seed(0)
    conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
    bank = SharedBasis(torch.randn(1, shared, channels, 3, 3), torch.randn(1, unique, channels, 3, 3), 10.0, True)
    ours = BasisConv2d(conv, bank, 0, 0, torch.randn(channels, shared + unique) / (shared + unique) ** 0.5).train()
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(images, channels, side, side, generator=generator) for _ in range(2))
    variants: dict[str, Callable[[], object]] = {}
    for layout, variant in (("NCHW", torch.contiguous_format), ("channels_last", torch.channels_last)):
        a, g = (tensor.contiguous(memory_format=variant) for tensor in (x, grad))
        for name, layer in (("plain", conv), ("thriftnet", ours), ("two convolutions", OriginalBasisConv2d(ours))):
            variants[f"{name}, {layout}"] = layer_step(copy.deepcopy(layer).to(memory_format=variant), a, g)
    apart = frozenset(name for name in variants if name.startswith("plain"))
    ratios = [
        Ratio("thriftnet, channels_last", "plain, NCHW", target),
        Ratio("thriftnet, channels_last", "plain, channels_last"),
        Ratio("two convolutions, NCHW", "plain, NCHW"),
    ]
    name = f"{channels} channels, {side} x {side}, batch {images}, rank {shared} + {unique}, forward + backward"
    return Case(TOPIC, name, variants, ratios, 9, apart, tolerance=1e-3, size=size)


def layer_step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    """Output of a layer, and the gradients of its input."""
    x = x.detach().requires_grad_()
    parameters = list(layer.parameters())

    def run() -> object:
        out = layer(x)
        return out.detach(), torch.autograd.grad(out, [x, *parameters], grad)[0]

    return run


def random_bank(bases: int, shared: int, layers: int, unique: int, channels: int) -> SharedBasis:
    """A bank of 3 x 3 filters, not far from orthonormal."""
    generator = torch.Generator().manual_seed(0)
    parts = [(bases, shared, channels, 3, 3), (layers, unique, channels, 3, 3)]
    common, own = (torch.randn(part, generator=generator) / (3 * channels**0.5) for part in parts)
    return SharedBasis(common, own, 10.0, True)


def penalty_case(what: str, banks: list[SharedBasis], target: Target) -> Case:
    """The penalty of some banks, forward and backward."""
    wanted = [wanted_entries(bank) for bank in banks]
    parameters = [parameter for bank in banks for parameter in bank.parameters()]

    def run(total: Callable[[], Tensor]) -> Callable[[], object]:
        def forward_backward() -> object:
            value = total()
            return value.detach(), torch.autograd.grad(value, parameters)

        return forward_backward

    variants = {
        "thriftnet": run(lambda: torch.stack([bank.penalty_term().total for bank in banks]).sum()),
        "full Gram matrix": run(
            lambda: torch.stack([penalty_of_full_gram(bank, mask) for bank, mask in zip(banks, wanted, strict=True)]).sum()
        ),
    }
    ratios = [Ratio("thriftnet", "full Gram matrix", target)]
    return Case(TOPIC, f"penalty, {what}", variants, ratios, 25, tolerance=1e-3)
