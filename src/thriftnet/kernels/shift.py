"""The shift operator: every channel moves by one of k x k offsets. No parameters, no multiplications.

``out[n, c, h, w] = in[n, c, h + dh, w + dw]``, zero outside, with ``dw = d * (c % k - k // 2)`` and
``dh = d * ((c // k) % k - k // 2)`` for the first ``(C // k^2) * k^2`` channels; the remaining ones stay where they are.

Source: Wu et al., Shift, CVPR 2018, section 3; channel order as in the authors' CUDA kernel (interleaved modulo k^2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def offsets(channels: int, kernel_size: int = 3, dilation: int = 1) -> list[tuple[int, int]]:
    """(dh, dw) of each channel, in pixels.

    Example:
        >>> offsets(9)[:4]
        [(-1, -1), (-1, 0), (-1, 1), (0, -1)]
    """
    k, moved = kernel_size, moved_channels(channels, kernel_size)
    return [
        (dilation * ((c // k) % k - k // 2), dilation * (c % k - k // 2)) if c < moved else (0, 0) for c in range(channels)
    ]


def moved_channels(channels: int, kernel_size: int) -> int:
    """How many channels, from the first, move: whole sets of k^2."""
    return channels // kernel_size**2 * kernel_size**2


def one_hot(channels: int, kernel_size: int = 3) -> Tensor:
    """The depthwise kernel that equals the shift, (C, 1, m, m) with the odd side ``m = 2 * (k // 2) + 1``.

    Use it with ``padding = dilation * (k // 2)`` and ``groups = channels``.
    """
    reach = kernel_size // 2
    kernel = torch.zeros(channels, 1, 2 * reach + 1, 2 * reach + 1)
    for channel, (dh, dw) in enumerate(offsets(channels, kernel_size)):
        kernel[channel, 0, reach + dh, reach + dw] = 1
    return kernel


def shift(x: Tensor, kernel: Tensor, kernel_size: int, dilation: int, moved: int) -> Tensor:
    """Shift ``x``; the form is chosen by layout.

    Args:
        x: (N, C, H, W).
        kernel: The one-hot form, (C, 1, m, m).
        kernel_size: Side k of the set of offsets.
        dilation: Pixels per step.
        moved: How many channels, from the first, move.

    Channels-last tensors, compiled and exported graphs take the depthwise form (in it an infinity becomes NaN
    around the place it moves to); everything else takes strided copies.
    """
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or _is_channels_last(x):
        reach = dilation * (kernel.shape[-1] // 2)
        return F.conv2d(x, kernel.to(x.dtype), padding=reach, dilation=dilation, groups=x.shape[1])
    shifted: Tensor = SliceShift.apply(x, kernel_size, dilation, moved, 1)
    return shifted


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


class SliceShift(torch.autograd.Function):
    """The shift as one strided copy per offset. Its backward is the shift in the other direction."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel_size: int, dilation: int, moved: int, direction: int) -> Tensor:
        ctx.arguments = (kernel_size, dilation, moved, direction)
        return slice_shift(x, kernel_size, dilation, moved, direction)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        kernel_size, dilation, moved, direction = ctx.arguments
        grad: Tensor = SliceShift.apply(grads[0], kernel_size, dilation, moved, -direction)
        return grad, None, None, None, None


def slice_shift(x: Tensor, kernel_size: int, dilation: int, moved: int, direction: int) -> Tensor:
    """Shift by one strided copy for each of the k^2 offsets, writing zeros only at the borders."""
    height, width = x.shape[-2:]
    period, moved = kernel_size**2, min(moved, x.shape[1])
    out = torch.empty_like(x)
    out[:, moved:] = x[:, moved:]
    for place in range(min(period, moved)):
        dh = direction * dilation * (place // kernel_size - kernel_size // 2)
        dw = direction * dilation * (place % kernel_size - kernel_size // 2)
        source, target = x[:, place:moved:period], out[:, place:moved:period]
        top, bottom = _span(dh, height)
        left, right = _span(dw, width)
        target[:, :, :top].zero_(), target[:, :, bottom:].zero_()
        target[:, :, :, :left].zero_(), target[:, :, :, right:].zero_()
        if top < bottom and left < right:
            target[:, :, top:bottom, left:right] = source[:, :, top + dh : bottom + dh, left + dw : right + dw]
    return out


def _span(step: int, size: int) -> tuple[int, int]:
    """First and last + 1 position that reads inside the map."""
    first = min(max(0, -step), size)
    return first, max(first, min(size, size - step))
