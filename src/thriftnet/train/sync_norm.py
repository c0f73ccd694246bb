"""Batch norms that take their statistics over all processes.

torch's own runs on CUDA only, and knows nothing of norms with statistics for several widths; this one takes any
batch norm of ours or torch's, on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thriftnet.core.norm import PlainBatchNorm2d

if TYPE_CHECKING:
    Base = nn.BatchNorm2d
else:
    Base = object


class Synchronised(Base):
    """Mean and variance over the batches of all processes, in training; gradients flow through both."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        mean, variance, count = global_moments(input)
        self._remember(mean.detach(), variance.detach() * (count / (count - 1)))
        channels = input.shape[1]
        scale = torch.rsqrt(variance + self.eps)
        if self.affine:
            scale = scale * self.weight[:channels]
        shift = -mean * scale + (self.bias[:channels] if self.affine else 0.0)
        return input * scale.to(input.dtype)[:, None, None] + shift.to(input.dtype)[:, None, None]

    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if isinstance(self, PlainBatchNorm2d):
            running_mean, running_var, batches = self.statistics().values()
        else:
            running_mean, running_var, batches = self.running_mean, self.running_var, self.num_batches_tracked
        if running_mean is None or running_var is None or batches is None:
            return
        batches.add_(1)
        momentum = 1.0 / float(batches) if self.momentum is None else self.momentum
        running_mean[: len(mean)].lerp_(mean.to(running_mean.dtype), momentum)
        running_var[: len(variance)].lerp_(variance.to(running_var.dtype), momentum)


def global_moments(input: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and biased variance of each channel over all processes, and how many values each is of."""
    wide = input.float() if input.dtype in (torch.float16, torch.bfloat16) else input
    values = torch.full((1,), float(input.numel() // input.shape[1]), device=input.device, dtype=wide.dtype)
    sums = _total(torch.cat([wide.sum((0, 2, 3)), values]))
    count = float(sums[-1].detach())
    mean = sums[:-1] / count
    centred = wide - mean[:, None, None]
    variance = _total(centred.square().sum((0, 2, 3))) / count
    return mean, variance, count


class _Total(torch.autograd.Function):
    """The sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.contiguous().clone()
        dist.all_reduce(total)
        return total


def _total(values: Tensor) -> Tensor:
    total: Tensor = _Total.apply(values)
    return total


class SynchronisedPlain(Synchronised, PlainBatchNorm2d):
    """Of our layers."""


class SynchronisedTorch(Synchronised, nn.BatchNorm2d):
    """Of torch's."""


KINDS: dict[type[nn.Module], type[nn.Module]] = {
    PlainBatchNorm2d: SynchronisedPlain,
    nn.BatchNorm2d: SynchronisedTorch,
}


@contextmanager
def synchronised(model: nn.Module, active: bool) -> Iterator[None]:
    """While this lasts, the batch norms of a network are synchronised; ties and state stay as they are."""
    changed = [module for module in model.modules() if type(module) in KINDS] if active and dist.is_initialized() else []
    kinds = [type(module) for module in changed]
    for module in changed:
        module.__class__ = KINDS[type(module)]
    try:
        yield
    finally:
        for module, kind in zip(changed, kinds, strict=True):
            module.__class__ = kind
