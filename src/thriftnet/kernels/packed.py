"""Convolutions for inference on a CPU whose weights lie as oneDNN's kernels read them, with the activation taken in the same pass.

Eager torch hands 1 x 1 convolutions on one thread to a slower library, and repacks every weight in each call. oneDNN with
weights laid out once is what torch's own compiler calls for frozen networks; these operators of torch do it without compiling.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.module import ThriftyModule
from thriftnet.kernels.dispatch import KernelChoice, forced
from thriftnet.kernels.versions import Version, version

Activation = tuple[str, tuple[float, ...], str]  # oneDNN's name, its numbers, and how it is computed

LITTLE, LITTLE_FOR_PRODUCTS = 300_000, 1_000_000  # multiply-accumulates
NONE: Activation = ("none", (), "")


FUSED: dict[type[nn.Module], Activation] = {
    nn.ReLU: ("relu", (), ""),
    nn.ReLU6: ("hardtanh", (0.0, 6.0), ""),
    nn.SiLU: ("swish", (), ""),
    nn.Hardswish: ("hardswish", (), ""),
}


def activation_of(module: nn.Module) -> Activation | None:
    """The oneDNN name of an activation; None where it has no fused one."""
    return ("gelu", (), str(module.approximate)) if type(module) is nn.GELU else FUSED.get(type(module))


class PackedConv2d(ThriftyModule, nn.Conv2d):
    """A convolution and the activation after it. Parameters and state dict are the convolution's own.

    Where the fast implementation does not apply - gradients, other devices and types, autocast, graphs, transforms - it runs as
    `nn.Conv2d` and the activation do.

    Shape: (N, I, H, W) -> (N, O, H', W').

    Args:
        like: The convolution, zero-padded by numbers; its parameters are taken over, not copied.
        activation: What runs on its output: ReLU, ReLU6, SiLU, Hardswish, GELU or nothing.
    """

    def __init__(self, like: nn.Conv2d, activation: nn.Module | None = None) -> None:
        nn.Module.__init__(self)
        self.__dict__.update({name: value for name, value in like.__dict__.items() if name not in _HELD_BY_MODULE})
        self.register_parameter("bias", None)
        self.weight, self.bias = like.weight, like.bias
        self.activation = activation
        self.attribute = (NONE if activation is None else activation_of(activation)) or NONE
        self.train(like.training)
        self._packed: tuple[Version, torch.Size, Tensor] | None = None

    def kernel_choice(self, x: Tensor) -> KernelChoice:
        """Which implementation runs for ``x``, and why."""
        obstacle = self._obstacle(x)
        if obstacle:
            return KernelChoice("convolution", "plain", obstacle)
        chosen = KernelChoice("convolution", "packed", "weight laid out once, activation fused")
        if self._is_little_work(x):
            chosen = KernelChoice("convolution", "plain", "calling the library takes longer than so little work")
        return forced("convolution") or chosen

    def _packs(self, x: Tensor) -> bool:
        """The decision of `kernel_choice`, without a reason."""
        if self._obstacle(x):
            return False
        wanted = forced("convolution")
        return not self._is_little_work(x) if wanted is None else wanted.implementation == "packed"

    def _is_little_work(self, x: Tensor) -> bool:
        """Calling oneDNN takes as long as eager torch takes for some multiply-accumulates; for matrix products for more."""
        if self.groups > 1 or x.dtype is not torch.float32:
            return False
        area, steps = self.kernel_size[0] * self.kernel_size[1], self.stride[0] * self.stride[1]
        work = x.numel() * self.out_channels * area // steps
        return work < (LITTLE if area > 1 else LITTLE_FOR_PRODUCTS)

    def _obstacle(self, x: Tensor) -> str:
        weight = cast(Tensor, self._parameters["weight"])  # the attribute takes longer, and this runs in every call
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None:
            return "in a graph that is fused anyway"
        if type(x) is not Tensor or x.ndim != 4 or x.shape[1] != self.in_channels or not x.numel():
            return "not a batch of maps with these channels"
        if x.device.type != "cpu" or x.dtype is not weight.dtype or x.dtype not in _types():
            return f"{x.device.type} and {x.dtype} run as torch does"
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return "with gradients"
        if torch.is_autocast_enabled("cpu"):
            return "autocast"
        if weight.is_inference():
            return "a weight of inference mode, whose changes cannot be seen"
        if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack() is not None:
            return "inside a transform, or watched"
        return ""

    def forward(self, x: Tensor) -> Tensor:
        if self._packs(x):
            name, numbers, algorithm = self.attribute
            run: Callable[..., Tensor] = torch.ops.mkldnn._convolution_pointwise
            geometry = (self.padding, self.stride, self.dilation, self.groups)
            return run(x, self._laid_out(x), self._parameters["bias"], *geometry, name, list(numbers), algorithm)
        out = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        return out if self.activation is None else self.activation(out)

    def _laid_out(self, x: Tensor) -> Tensor:
        """The weight as oneDNN reads it, repacked when the weight or the size of the maps has changed.

        Which layout is right depends on height and width; with another one each call would lay the weight out again.
        """
        held, weight = self._packed, cast(Tensor, self._parameters["weight"])
        if held is None or held[1] != x.shape[2:] or not held[0].holds(weight):
            lay_out: Callable[..., Tensor] = torch.ops.mkldnn._reorder_convolution_weight
            geometry = (self.padding, self.stride, self.dilation, self.groups)
            packed = lay_out(weight.detach().contiguous(), *geometry, list(x.shape))
            held = self._packed = version(weight), x.shape[2:], packed
        return held[2]

    def __getstate__(self) -> dict[str, Any]:
        """A copy lays its weight out itself."""
        return {**self.__dict__, "_packed": None}


_HELD_BY_MODULE = frozenset(nn.Module().__dict__)


def can_pack(conv: nn.Module) -> bool:
    """Whether `PackedConv2d` can replace a layer.

    One with hooks would lose them. Odd geometries are excluded: in some, oneDNN's packed convolution is wrong (a single
    channel, steps of 1 and 2, one column left; torch 2.15) or crashes (dilation with more padding than the kernel needs; torch 2.11).
    """
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str) or has_hooks(conv):
        return False
    is_padded_within = all(padding < side for padding, side in zip(conv.padding, conv.kernel_size, strict=True))
    return conv.in_channels > 1 and conv.stride[0] == conv.stride[1] and conv.dilation == (1, 1) and is_padded_within


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks read its input, output or gradients."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


@cache
def _types() -> tuple[torch.dtype, ...]:
    """Types of numbers that this build of torch and this processor have fast kernels for."""
    if not torch._C._has_mkldnn or not hasattr(torch.ops.mkldnn, "_convolution_pointwise"):
        return ()
    return (torch.float32, torch.bfloat16) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else (torch.float32,)
