"""The shift operator: every channel moves by one of k x k offsets. No parameters, no multiplications.

``out[n, c, h, w] = in[n, c, h + dh, w + dw]``, zero outside, with ``dw = d * (c % k - k // 2)`` and
``dh = d * ((c // k) % k - k // 2)`` for the first ``(C // k^2) * k^2`` channels; the remaining ones stay where they are.

Source: Wu et al., Shift, CVPR 2018, section 3; channel order as in the authors' CUDA kernel (interleaved modulo k^2).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from thriftnet.errors import ConfigError
from thriftnet.kernels import triton_shift
from thriftnet.kernels.dispatch import KernelChoice, forced

CONVOLVED = (torch.float32, torch.bfloat16)  # types in which the CPU has a fast depthwise convolution
ON_GPU = ("triton", "fused")  # the second one with the 1 x 1 convolution that follows, where one does
SMALL = 2**21  # bytes below which a call costs more than writing zeros twice


class Moves(NamedTuple):
    """Which channels move how far."""

    kernel_size: int  # side k of the set of offsets
    dilation: int  # pixels per step
    moved: int  # how many channels, from the first, move
    direction: int = 1  # -1 for the shift back, which is the gradient

    def back(self) -> Moves:
        """The shift in the other direction."""
        return self._replace(direction=-self.direction)

    def steps(self) -> list[tuple[int, int, int]]:
        """First channel, dh and dw of each group of channels that move alike; a group takes every k^2-th channel."""
        k, scale = self.kernel_size, self.direction * self.dilation
        groups = range(min(k * k, self.moved))
        return [(place, scale * (place // k - k // 2), scale * (place % k - k // 2)) for place in groups]


def offsets(channels: int, kernel_size: int = 3, dilation: int = 1) -> list[tuple[int, int]]:
    """(dh, dw) of each channel, in pixels.

    Example:
        >>> offsets(9)[:4]
        [(-1, -1), (-1, 0), (-1, 1), (0, -1)]
    """
    sets, still = divmod(channels, kernel_size**2)
    steps = Moves(kernel_size, dilation, moved=kernel_size**2).steps()
    return [(dh, dw) for _, dh, dw in steps] * sets + [(0, 0)] * still


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
    """Shift ``x``, by the implementation that `choose` picks.

    Args:
        x: (N, C, H, W).
        kernel: From `one_hot`.
        kernel_size, dilation, moved: As in `Moves`.

    Raises:
        ConfigError: A Triton implementation is forced on a device without Triton.
    """
    if not isinstance(x, Tensor):  # traced by torch.fx
        pad = dilation * (kernel.shape[-1] // 2)  # type: ignore[unreachable]
        return F.conv2d(x, kernel, padding=pad, dilation=dilation, groups=len(kernel))
    moves, implementation = Moves(kernel_size, dilation, moved), choose(x).implementation
    if implementation in ON_GPU:
        by_triton: Tensor = triton_shift.shift(x, *moves)
        return by_triton
    needs_grad = torch.is_grad_enabled() and x.requires_grad
    if implementation == "depthwise" and (torch.compiler.is_compiling() or torch.compiler.is_exporting() or is_small(x)):
        return depthwise(x, kernel, moves)
    function: Callable[..., Tensor] = ShiftFunction.apply if needs_grad else run
    return function(x, kernel, moves, implementation)


def choose(x: Tensor) -> KernelChoice:
    """Which implementation runs on this input, (N, C, H, W), by its device, layout and type."""
    choice = forced("shift")
    if choice is not None:
        if choice.implementation in ON_GPU and not triton_shift.runs_on(x.device):
            raise ConfigError(
                f"shift={choice.implementation!r} is forced, but the input is on {x.device}: expected planes, windows or depthwise"
            )
        return choice
    if torch.compiler.is_exporting():
        return KernelChoice("shift", "depthwise", "an exported graph holds standard operations only")
    if x.device.type == "cuda" and triton_shift.runs_on(x.device):
        return KernelChoice("shift", "triton", "on a GPU one kernel reads and writes everything once")
    if torch.compiler.is_compiling():
        return KernelChoice("shift", "depthwise", "a compiled graph has one operation for it")
    if not triton_shift.is_channels_last(x):
        return KernelChoice("shift", "planes", "NCHW: one run of memory per channel and offset")
    if x.dtype in CONVOLVED or x.device.type != "cpu":
        return KernelChoice("shift", "depthwise", "channels_last: a depthwise convolution reads every channel at once")
    return KernelChoice("shift", "windows", f"channels_last: the CPU has no fast depthwise convolution for {x.dtype}")


def is_small(x: Tensor) -> bool:
    """Whether calls cost more than the memory they touch."""
    return x.numel() * x.element_size() < SMALL


def run(x: Tensor, kernel: Tensor, moves: Moves, implementation: str) -> Tensor:
    """Shift by one of the implementations in plain torch."""
    if implementation == "depthwise":
        return depthwise(x, kernel, moves)
    return planes(x, moves) if implementation == "planes" else windows(x, moves)


class ShiftFunction(torch.autograd.Function):
    """`run`, with the shift in the other direction as its backward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, kernel: Tensor, moves: Moves, implementation: str) -> Tensor:
        return run(x, kernel, moves, implementation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.kernel, ctx.moves, ctx.implementation = inputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad: Tensor = ShiftFunction.apply(grads[0], ctx.kernel, ctx.moves.back(), ctx.implementation)
        return grad, None, None, None


def depthwise(x: Tensor, kernel: Tensor, moves: Moves) -> Tensor:
    """Shift by a depthwise convolution. In it an infinity or NaN becomes NaN in its whole neighbourhood."""
    reach = moves.dilation * (kernel.shape[-1] // 2)
    kernel = kernel.to(x.dtype) if moves.direction > 0 else kernel.flip(2, 3).to(x.dtype)
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # the meta device has no autocast
        return F.conv2d(x, kernel, padding=reach, dilation=moves.dilation, groups=x.shape[1])
    with torch.autocast(x.device.type, enabled=False):  # what is moved keeps its type
        return F.conv2d(x, kernel, padding=reach, dilation=moves.dilation, groups=x.shape[1])


def planes(x: Tensor, moves: Moves) -> Tensor:
    """Shift NCHW maps: in each channel one run of memory moves, then the columns it wrapped around are cleared."""
    x = x.contiguous()
    height, width = x.shape[-2:]
    period, moved = moves.kernel_size**2, min(moves.moved, x.shape[1])
    is_clear = is_small(x)
    out = torch.zeros_like(x) if is_clear else torch.empty_like(x)
    if moved < x.shape[1]:
        out[:, moved:] = x[:, moved:]
    source, target = x.flatten(2), out.flatten(2)
    for place, dh, dw in moves.steps():
        group = target[:, place:moved:period]
        first, last = span(dh * width + dw, height * width) if abs(dw) < width else (0, 0)
        if first < last:
            step = dh * width + dw
            group[:, :, first:last] = source[:, place:moved:period, first + step : last + step]
        if not is_clear:
            group[:, :, :first].zero_()
            group[:, :, last:].zero_()
        if dw:
            wrapped = slice(max(0, width - dw), None) if dw > 0 else slice(0, min(width, -dw))
            out[:, place:moved:period, :, wrapped].zero_()
    return out


def windows(x: Tensor, moves: Moves) -> Tensor:
    """Shift in any layout and type: one rectangle is copied for each offset."""
    height, width = x.shape[-2:]
    period, moved = moves.kernel_size**2, min(moves.moved, x.shape[1])
    out = torch.zeros_like(x)
    if moved < x.shape[1]:
        out[:, moved:] = x[:, moved:]
    for place, dh, dw in moves.steps():
        top, bottom = span(dh, height)
        left, right = span(dw, width)
        if top < bottom and left < right:
            source = x[:, place:moved:period, top + dh : bottom + dh, left + dw : right + dw]
            out[:, place:moved:period, top:bottom, left:right] = source
    return out


def span(step: int, size: int) -> tuple[int, int]:
    """First and last + 1 position that reads inside."""
    first = min(max(0, -step), size)
    return first, max(first, min(size, size - step))
