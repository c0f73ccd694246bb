"""The difference of two networks, on random images."""

from __future__ import annotations

import torch
from torch import nn

from thriftnet.core.norm import first_tensor


@torch.no_grad()
def relative_difference(one: nn.Module, other: nn.Module, input_size: tuple[int, int, int], batch: int = 4) -> float:
    """Largest difference of two networks' outputs on random images, relative to the largest output of ``one``.

    Args:
        one, other: The networks, in eval mode.
        input_size: (C, H, W).
        batch: Number of images.
    """
    images = torch.randn(batch, *input_size, generator=torch.Generator().manual_seed(0))
    like = first_tensor(one)
    images = images if like is None else images.to(like)
    expected, got = one(images), other(images)
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return float((expected - got).abs().max() / scale)
