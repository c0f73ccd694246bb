"""The shift on a GPU: one Triton kernel that reads and writes every value once, forward, backward and with a ReLU before it.

It is registered as an operation of torch, so that compiled and exported graphs hold it as one node.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

BLOCK = 1024  # values per program


def runs_on(device: torch.device) -> bool:
    """Whether the kernels run there: on a GPU, or anywhere under Triton's interpreter."""
    if device.type not in ("cuda", "cpu", "meta") or importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"


@torch.library.custom_op("thriftnet::shift", mutates_args=())
def shift(
    x: Tensor,
    kernel_size: int,
    dilation: int,
    moved: int,
    direction: int = 1,
    relu: bool = False,
    gate: Tensor | None = None,
) -> Tensor:
    """Shift ``x``, (N, C, H, W) of any strides.

    Args:
        kernel_size, dilation, moved, direction: As in `Moves`.
        relu: Apply a ReLU before the shift.
        gate: Zero the result where this tensor of the same shape is not above 0 (the backward of that ReLU).
    """
    import triton

    from thriftnet.kernels.triton_kernels import shift_kernel

    channels, height, width = x.shape[1:]
    out, like = _empty_like(x), x if gate is None else gate
    if x.numel():
        sizes = (out.numel(), channels, height, width, moved, dilation, direction)
        strides = (*x.stride(), *like.stride(), *out.stride())
        wide = max(_reach(tensor) for tensor in (x, like, out)) >= 2**31
        shift_kernel[(triton.cdiv(out.numel(), BLOCK),)](
            x, like, out, *sizes, *strides,
            K=kernel_size, RELU=relu, GATED=gate is not None, LAST=is_channels_last(out), WIDE=wide, BLOCK=BLOCK,
        )  # fmt: skip
    return out


shift.register_fake(lambda x, *_: _empty_like(x))


def is_channels_last(x: Tensor) -> bool:
    """Whether the channels of a pixel lie together, and the layout is not NCHW at the same time."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)


def _reach(tensor: Tensor) -> int:
    """Place of the last value, counted from the first."""
    return sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _empty_like(x: Tensor) -> Tensor:
    """Memory for the result: channels_last for channels_last, NCHW for everything else."""
    return torch.empty_like(x, memory_format=torch.channels_last if is_channels_last(x) else torch.contiguous_format)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *moves, relu, gate = inputs
    ctx.moves, ctx.is_gated = moves, gate is not None
    ctx.save_for_backward(*((x,) if relu else ()), *(() if gate is None else (gate,)))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    kernel_size, dilation, moved, direction = ctx.moves
    saved = list(ctx.saved_tensors)
    if ctx.is_gated:
        grad = torch.where(saved.pop() <= 0, 0.0, grad)
    back = shift(grad, kernel_size, dilation, moved, -direction, False, saved[0] if saved else None)
    return back, None, None, None, None, None, None


shift.register_autograd(_backward, setup_context=_keep)
