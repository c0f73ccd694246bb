"""What the GPU kernels compute, held against loops. Run as a script: under TRITON_INTERPRET=1 without a GPU, or on one."""

from __future__ import annotations

import itertools
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

import reference
import thriftnet as tn
from thriftnet.kernels import force
from thriftnet.kernels.shift import choose, moved_channels
from thriftnet.kernels.triton_pointwise import shift_pointwise
from thriftnet.kernels.triton_shift import shift

LAYOUTS = (torch.contiguous_format, torch.channels_last)


def main(device: str) -> None:
    torch.manual_seed(0)
    count = 0
    for (channels, kernel_size), layout in itertools.product(((3, 3), (9, 5), (20, 3), (20, 5)), LAYOUTS):
        check_shift(channels, kernel_size, layout, device)
        check_pointwise(channels, kernel_size, layout, device)
        count += 1
    check_layer(device)
    check_block(device)
    check_registration(device)
    print(f"{count} cases hold on {device}")


def gradient(function, x: Tensor, weights: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad((function(x) * weights).sum(), x)[0]


def loops(x: Tensor, kernel_size: int, dilation: int = 1) -> Tensor:
    return reference.shift(x, kernel_size, dilation)


def check_shift(channels: int, kernel_size: int, layout: torch.memory_format, device: str) -> None:
    moved = moved_channels(channels, kernel_size)
    x = torch.randn(2, channels, 7, 5).contiguous(memory_format=layout)
    x[0, 0, 1, 1], x[1, 0, 2, 2] = float("inf"), float("nan")
    there = x.to(device)
    for dilation in (1, 2):
        out = shift(there, kernel_size, dilation, moved)
        assert out.is_contiguous(memory_format=layout)
        assert torch.equal(out.cpu().nan_to_num(7), loops(x, kernel_size, dilation).nan_to_num(7))
        fused = shift(there, kernel_size, dilation, moved, 1, True)
        assert torch.equal(fused.cpu().nan_to_num(7), loops(x.relu(), kernel_size, dilation).nan_to_num(7))
    x, weights = torch.randn(2, channels, 7, 5), torch.randn(2, channels, 7, 5)
    for relu in (False, True):
        wanted = gradient(lambda given, relu=relu: loops(given.relu() if relu else given, kernel_size), x, weights)
        got = gradient(
            lambda given, relu=relu: shift(given, kernel_size, 1, moved, 1, relu),
            x.to(device).contiguous(memory_format=layout),
            weights.to(device),
        )
        assert torch.equal(got.cpu(), wanted)


def check_pointwise(channels: int, kernel_size: int, layout: torch.memory_format, device: str) -> None:
    moved = moved_channels(channels, kernel_size)
    x, weight = torch.randn(2, channels, 7, 6), torch.randn(11, channels, 1, 1)
    for stride, relu in itertools.product((1, 2), (False, True)):
        parts = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        wanted = F.conv2d(loops(parts[0].relu() if relu else parts[0], kernel_size), parts[1], stride=stride)
        ours = [x.to(device).contiguous(memory_format=layout).requires_grad_(), weight.to(device).requires_grad_()]
        out = shift_pointwise(*ours, kernel_size, 1, moved, stride, relu)
        assert (out.cpu() - wanted).abs().max() < 1e-4
        grad = torch.randn_like(wanted)
        for one, other in zip(
            torch.autograd.grad(out, ours, grad.to(device)), torch.autograd.grad(wanted, parts, grad), strict=True
        ):
            assert (one.cpu() - other).abs().max() < 1e-4


def check_layer(device: str) -> None:
    """The layer takes the kernel when it is forced, or by itself on a GPU."""
    layer, x = tn.Shift2d(20).to(device), torch.randn(2, 20, 6, 6, device=device)
    if device == "cuda":
        assert choose(x).implementation == "triton"
    with force(shift="triton"):
        assert torch.equal(layer(x).cpu(), loops(x.cpu(), 3))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        y = x.clone().requires_grad_()
        compiled(y).square().sum().backward()
        assert torch.allclose(y.grad, gradient(lambda given: layer(given).square(), x, torch.ones_like(x)))
        if device == "cuda":
            program = torch.export.export(layer, (x,))
            assert torch.equal(program.module()(x), layer(x))


def check_block(device: str) -> None:
    """A block with ReLU, shift and last convolution in one kernel is the block."""
    for stride in (1, 2):
        block = tn.ShiftConv2d(6, 8, stride=stride, expansion=2.0, bias=True).to(device)
        x, y = (torch.randn(2, 6, 7, 7, generator=torch.Generator().manual_seed(0)).to(device) for _ in range(2))
        results = []
        for implementation, given in (("triton", x), ("fused", y)):
            given.requires_grad_()
            block.zero_grad()
            with force(shift=implementation):
                out = block(given)
            out.square().sum().backward()
            results.append([out, given.grad, *(parameter.grad.clone() for parameter in block.parameters())])
        for one, other in zip(*results, strict=True):
            assert (one - other).abs().max() < 1e-3 * other.abs().max() + 1e-4


def check_registration(device: str) -> None:
    """Schema, fake tensors and autograd agree with what runs."""
    for layout in LAYOUTS:
        x = torch.randn(2, 9, 4, 4, device=device).contiguous(memory_format=layout).requires_grad_()
        torch.library.opcheck(shift, (x, 3, 1, 9, 1, False))
        torch.library.opcheck(shift, (x, 3, 1, 9, 1, True))
        weight = torch.randn(5, 9, 1, 1, device=device, requires_grad=True)
        torch.library.opcheck(shift_pointwise, (x, weight, 3, 1, 9, 2, True))


if __name__ == "__main__":
    main(sys.argv[1])
