"""Shift and 1 x 1 convolution in one GPU kernel: the shifted map is never written. Strides 1 and 2, with its backward.

It is registered as an operation of torch, so that compiled and exported graphs hold it as one node.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS, OUTS, INS = 64, 32, 32  # pixels, output and input channels that one program holds
PARTS = 64  # programs among which the rows of a weight's gradient are shared, at most


@torch.library.custom_op("thriftnet::shift_pointwise", mutates_args=())
def shift_pointwise(
    x: Tensor, weight: Tensor, kernel_size: int, dilation: int, moved: int, stride: int = 1, relu: bool = False
) -> Tensor:
    """``conv1x1(shift(relu(x)), weight, stride)``.

    Args:
        x: (N, C, H, W), any strides.
        weight: (O, C, 1, 1).
        kernel_size, dilation, moved: As in `Moves`.
        stride: Of the convolution.
        relu: Apply a ReLU first.

    Returns:
        (N, O, ceil(H / stride), ceil(W / stride)), channels_last.
    """
    import triton

    from thriftnet.kernels.triton_kernels import pointwise_kernel

    out = _empty_output(x, weight, stride)
    rows, outs, ins = out.numel() // out.shape[1], out.shape[1], x.shape[1]
    if out.numel():
        pointwise_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(outs, OUTS))](
            x, weight.reshape(outs, ins).contiguous(), out, rows, ins, outs, *x.shape[2:], *out.shape[2:],
            moved, dilation, stride, *x.stride(), *out.stride(),
            K=kernel_size, RELU=relu, ROWS=ROWS, OUTS=OUTS, INS=INS,
        )  # fmt: skip
    return out


shift_pointwise.register_fake(lambda x, weight, kernel_size, dilation, moved, stride=1, *_: _empty_output(x, weight, stride))


@torch.library.custom_op("thriftnet::shift_pointwise_backward", mutates_args=())
def shift_pointwise_backward(
    grad: Tensor, x: Tensor, weight: Tensor, kernel_size: int, dilation: int, moved: int, stride: int, relu: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `shift_pointwise` with respect to input and weight."""
    import triton

    from thriftnet.kernels.triton_kernels import pointwise_input_kernel, pointwise_weight_kernel

    flat = weight.reshape(weight.shape[0], weight.shape[1]).contiguous()
    outs, ins = flat.shape
    rows = grad.numel() // outs
    for_x = torch.zeros_like(x)
    parts = max(1, min(PARTS, rows // 1024))
    share = (rows + parts - 1) // parts
    for_weight = torch.empty(parts, outs, ins, device=x.device, dtype=torch.float32)
    sizes = (ins, outs, *x.shape[2:], *grad.shape[2:], moved, dilation, stride)
    blocks: dict[str, Any] = {"K": kernel_size, "RELU": relu, "ROWS": ROWS, "OUTS": OUTS, "INS": INS}
    pointwise_input_kernel[(triton.cdiv(rows, ROWS), triton.cdiv(ins, INS))](
        grad, flat, for_x, x, rows, *sizes, *grad.stride(), *for_x.stride(), *x.stride(), **blocks
    )
    pointwise_weight_kernel[(triton.cdiv(outs, OUTS), triton.cdiv(ins, INS), parts)](
        grad, x, for_weight, rows, share, *sizes, *grad.stride(), *x.stride(), **blocks
    )
    return for_x, for_weight.sum(0).view(weight.shape).to(weight.dtype)


@shift_pointwise_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty(weight.shape, device=weight.device, dtype=weight.dtype)


def _empty_output(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    shape = (x.shape[0], weight.shape[0], (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1)
    return torch.empty(shape, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *ctx.arguments = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    for_x, for_weight = shift_pointwise_backward(grad, x, weight, *ctx.arguments)
    return for_x, for_weight, None, None, None, None, None


shift_pointwise.register_autograd(_backward, setup_context=_keep)
