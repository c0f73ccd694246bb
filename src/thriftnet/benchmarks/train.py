"""Training: one step of a plain ResNet-20 in the layout and type that the recipes use, against how it is usually written."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch

from thriftnet.benchmarks.measuring import Case, Fact, Ratio, Settings, Target
from thriftnet.benchmarks.networks import batch, trained_step
from thriftnet.models.resnet import resnet

TOPIC = "train"
P6T = Target("P6t", "ResNet20 training step: fp32 NCHW against bf16 channels_last", 2.2, "at least")


def cases(settings: Settings) -> Iterator[Case | Fact]:
    """The topic's cases."""
    if not settings.sweep:
        yield step_case(8 if settings.quick else 128)


def step_case(images: int) -> Case:
    """The same network in two layouts and two types: losses agree to the precision of the type."""
    torch.manual_seed(0)
    model = resnet(20).train()
    x, labels = batch(images, 32)
    last = x.contiguous(memory_format=torch.channels_last)
    in_last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    forms = {
        "fp32, NCHW": trained_step(model, x, labels),
        "fp32, channels_last": trained_step(copy.deepcopy(in_last), last, labels),
        "bf16, channels_last": trained_step(in_last, last, labels, autocast=torch.bfloat16),
    }
    ratios = [
        Ratio("fp32, NCHW", "fp32, channels_last"),
        Ratio("fp32, NCHW", "bf16, channels_last", P6T),
    ]
    return Case(TOPIC, f"ResNet20 training step, batch {images}", forms, ratios, 9, tolerance=0.02)
