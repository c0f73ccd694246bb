"""Which memory layout trains a network faster: measured, since no rule holds (it helps most nets, and hurts ConvMixers)."""

from __future__ import annotations

import copy
import time

import torch
from torch import Tensor, nn

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
STEPS = 3


def faster_format(model: nn.Module, images: Tensor, precision: torch.dtype | None) -> str:
    """``contiguous`` or ``channels_last``: the one whose steps take less time here, on copies of the network.

    Args:
        model: Stays untouched.
        images: A batch as in training.
        precision: Of autocast, None for none.
    """
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        seconds = {name: _time(model, images, memory_format, precision) for name, memory_format in FORMATS.items()}
    return min(seconds, key=lambda name: seconds[name])


def _time(model: nn.Module, images: Tensor, memory_format: torch.memory_format, precision: torch.dtype | None) -> float:
    """The fastest of a few steps, the first left out."""
    candidate = copy.deepcopy(model).train().to(memory_format=memory_format)
    batch = images.contiguous(memory_format=memory_format)
    times = []
    for _ in range(STEPS + 1):
        _wait(images)
        start = time.perf_counter()
        with torch.autocast(images.device.type, precision or torch.bfloat16, enabled=precision is not None):
            loss = candidate(batch).float().square().mean()
        loss.backward()
        candidate.zero_grad()
        _wait(images)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _wait(images: Tensor) -> None:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
