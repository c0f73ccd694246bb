"""The shift: forward and backward against two copies, and a training step of a ShiftResNet."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.baselines import shift_one_hot, shift_per_channel, with_naive_shifts
from benchmarks.measuring import Case, Fact, Ratio, Settings, Target
from benchmarks.networks import batch, forward_backward, trained_step
from thriftnet.models.shiftresnet import shiftresnet
from thriftnet.techniques.shift import Shift2d

TOPIC = "shift"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
P1 = Target("P1", "shift forward + backward against two copies", 2.5)
P1T = Target("P1t", "ShiftResNet20 training step: slices per channel against ours", 3.0, "at least")


def cases(settings: Settings) -> Iterator[Case | Fact]:
    """The topic's cases."""
    if settings.sweep:
        for side in (4, 8, 16, 32, 56):
            for layout in LAYOUTS:
                yield operator_case((32, 144, side, side), layout, size=side)
        return
    shapes = [(4, 18, 8, 8)] if settings.quick else [(128, 144, 32, 32), (32, 144, 32, 32)]
    for shape in shapes:
        for layout in LAYOUTS:
            yield operator_case(shape, layout)
    yield step_case(settings)


def operator_case(shape: tuple[int, int, int, int], layout: str, size: float | None = None) -> Case:
    """The operator alone. Two copies are the floor: forward and backward each read and write the tensor once."""
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(shape, generator=generator).contiguous(memory_format=LAYOUTS[layout]) for _ in range(2))
    x.requires_grad_()
    layer, depthwise = Shift2d(shape[1]), shift_one_hot(shape[1])
    variants: dict[str, Callable[[], object]] = {
        "two copies": lambda: (x.detach().clone(), grad.clone()),
        "thriftnet": forward_backward(layer, x, grad),
        "one-hot depthwise": forward_backward(depthwise, x, grad),
    }
    if size is None and shape[0] <= 32:  # it takes ten seconds on the larger one
        variants["slices per channel"] = forward_backward(shift_per_channel, x, grad)
    ratios = [Ratio(name, "two copies", P1 if name == "thriftnet" and size is None else None) for name in list(variants)[1:]]
    name = f"shift 3 x 3 forward + backward, {shape}, {layout}"
    return Case(TOPIC, name, variants, ratios, 9, frozenset({"two copies"}), size=size)


def step_case(settings: Settings) -> Case:
    """The whole network: layout and type are part of the variant, so that losses agree only to the type's precision."""
    torch.manual_seed(0)
    model = shiftresnet(20).train()
    x, labels = batch(8 if settings.quick else 128, 32)
    last = x.contiguous(memory_format=torch.channels_last)

    def step(network: torch.nn.Module, images: Tensor, dtype: torch.dtype | None = None) -> Callable[[], Tensor]:
        return trained_step(network, images, labels, autocast=dtype)

    in_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    variants = {
        "slices per channel": step(with_naive_shifts(copy.deepcopy(model)), x),
        "thriftnet, NCHW": step(copy.deepcopy(model), x),
        "thriftnet, channels_last": step(in_last, last),
        "thriftnet, channels_last, bf16": step(copy.deepcopy(in_last), last, torch.bfloat16),
    }
    ratios = [
        Ratio("slices per channel", "thriftnet, NCHW"),
        Ratio("slices per channel", "thriftnet, channels_last"),
        Ratio("slices per channel", "thriftnet, channels_last, bf16", P1T),
    ]
    return Case(TOPIC, f"ShiftResNet20 training step, batch {len(x)}", variants, ratios, 7, tolerance=0.02)
