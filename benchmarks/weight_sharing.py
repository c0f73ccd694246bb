"""Weight sharing: the deployed forward of a ConvMixer with shared weights, its file, and a training step with fusion."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.measuring import Case, Fact, Ratio, Settings, Target
from benchmarks.networks import batch, settled, trained_step
from thriftnet.kernels import force
from thriftnet.kernels.fusion import Fuser
from thriftnet.kernels.pack import pack
from thriftnet.models import create_model
from thriftnet.store.model_file import save

TOPIC = "weight-sharing"
P4 = Target("P4", "eager forward of the shared ConvMixer-768/32 against the deployed one", 2.2, "at least")
P4S = Target("P4s", "file of the shared ConvMixer-768/32 against the dense one", 0.545)


def cases(settings: Settings) -> Iterator[Case | Fact]:
    """The topic's cases."""
    if settings.sweep:
        yield from (fused_weight_case(channels) for channels in (64, 128, 256, 512, 1024))
        return
    sizes = {"dim": 32, "depth": 4} if settings.quick else {"dim": 768, "depth": 32}
    yield file_size(sizes)
    yield forward_case(sizes, 1, 56 if settings.quick else 224)
    yield fusing_case({**sizes, "depth": 4 if settings.quick else 8}, 56 if settings.quick else 224)


def file_size(sizes: dict[str, int]) -> Fact:
    """Bytes of the saved weights, shared against dense."""

    def stored(name: str) -> int:
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(save(create_model(name, **sizes), Path(folder) / "model"))
            return (saved / "model.safetensors").stat().st_size

    target = P4S if sizes["dim"] == 768 else None
    return Fact(
        TOPIC, f"file size, ConvMixer-{sizes['dim']}/{sizes['depth']}", stored("ws_convmixer") / stored("convmixer"), target
    )


def forward_case(sizes: dict[str, int], images: int, side: int) -> Case:
    """Eager as written, eager with our variants, and compiled with its weights frozen."""
    torch.manual_seed(0)
    model = settled(create_model("ws_convmixer", **sizes)).eval()
    x, _ = batch(images, side)
    compiled = compiled_and_frozen(model, x)
    half = copy.deepcopy(model).to(torch.bfloat16, memory_format=torch.channels_last)  # type: ignore[call-overload]
    small = x.to(torch.bfloat16, memory_format=torch.channels_last)

    def eager(network: nn.Module, given: Tensor, variant: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.no_grad(), force(**{"act-norm": variant}):
                out: Tensor = network(given)
            return out

        return run

    variants = {
        "eager, separate norms": eager(model, x, "separate"),
        "thriftnet, eager": eager(model, x, "in place"),
        "thriftnet, packed": eager(pack(model, input_size=(3, side, side)), x, "in place"),
        "thriftnet, compiled and frozen": compiled,
        "thriftnet, eager bf16": eager(half, small, "in place"),
    }
    ratios = [
        Ratio("eager, separate norms", "thriftnet, eager"),
        Ratio("eager, separate norms", "thriftnet, packed"),
        Ratio("eager, separate norms", "thriftnet, compiled and frozen", P4),
        Ratio("eager, separate norms", "thriftnet, eager bf16"),
    ]
    name = f"shared ConvMixer-{sizes['dim']}/{sizes['depth']}, forward, batch {images}, {side} x {side}"
    return Case(TOPIC, name, variants, ratios, 9, frozenset({"thriftnet, eager bf16"}), tolerance=1e-3)


def compiled_and_frozen(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """The network as torch's compiler makes it when weights will not change; it needs a C++ compiler."""
    from torch._inductor import config

    compiled = torch.compile(copy.deepcopy(model))
    with torch.no_grad(), config.patch(freezing=True):  # as the environment variable TORCHINDUCTOR_FREEZING=1 does
        compiled(x)

    def run() -> Tensor:
        with torch.no_grad():
            out: Tensor = compiled(x)
        return out

    return run


def fusing_case(sizes: dict[str, int], side: int) -> Case:
    """A training step in which every weight is the mean of two, computed once or for each use."""
    torch.manual_seed(0)
    fused = create_model("wfws_convmixer", fusion="channel_weighted_mean", drop_rate=0.0, **sizes).train()
    shared = create_model("ws_convmixer", drop_rate=0.0, **sizes).train()
    x, labels = batch(2, side)

    def in_variant(variant: str) -> Callable[[], Tensor]:
        step = trained_step(copy.deepcopy(fused), x, labels)

        def run() -> Tensor:
            with force(fusion=variant):
                return step()

        return run

    variants = {
        "shared, nothing to fuse": trained_step(shared, x, labels),
        "thriftnet, fused once": in_variant("once"),
        "fused for each use": in_variant("each"),
    }
    ratios = [Ratio(name, "shared, nothing to fuse") for name in list(variants)[1:]]
    name = f"ConvMixer-{sizes['dim']}/{sizes['depth']} training step with fusion, batch 2"
    return Case(TOPIC, name, variants, ratios, 7, frozenset({"shared, nothing to fuse"}), tolerance=1e-4)


def fused_weight_case(channels: int) -> Case:
    """The weight of two layers as the mean of four, forward and backward. Copies of the members and their gradients are the floor."""
    torch.manual_seed(0)
    members = nn.Parameter(torch.randn(4, channels, channels))
    scales = nn.Parameter(torch.rand(4, channels))
    grad = torch.randn(channels, channels)

    def in_variant(variant: str) -> Callable[[], object]:
        def run() -> object:
            fuser = Fuser()
            with force(fusion=variant):
                used = fuser.weight(members, scales) + fuser.weight(members, scales)
            return used.detach(), torch.autograd.grad(used, [members, scales], grad)

        return run

    variants = {
        "copies of the members, twice": lambda: (members.detach().clone(), members.detach().clone()),
        "thriftnet, fused once": in_variant("once"),
        "fused for each use": in_variant("each"),
    }
    ratios = [Ratio(name, "copies of the members, twice") for name in list(variants)[1:]]
    apart = frozenset({"copies of the members, twice"})
    return Case(TOPIC, f"weight of 2 layers from 4, {channels} channels", variants, ratios, 9, apart, 1e-4, size=channels)
