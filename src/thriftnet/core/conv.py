"""Convolutions whose weight is computed, tied or narrowed. Each behaves as the `nn.Conv2d` it replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.tied import Tied, plain_layer
from thriftnet.core.width import WidthAware, format_width
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class GeneratedConv2d(Tied, WidthAware):
    """A convolution whose weight is computed: subclasses define the property ``weight`` (O, I/groups, kh, kw).

    It has the public attributes of `nn.Conv2d`, may be tied to several users and may run at several widths.

    Shape: (N, I, H, W) -> (N, O, H', W') as `nn.Conv2d`; at a narrower width I and O shrink.

    Args:
        like: The convolution to replace: geometry and bias are copied from it.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: str | tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    padding_mode: str
    _reversed_padding_repeated_twice: list[int]  # margins of other modes than zeros, as in `nn.Conv2d`
    weight: Tensor  # at full width, (O, I/groups, kh, kw): a property, or a parameter in PlainConv2d
    bias: Tensor | None

    def __init__(self, like: Convolution) -> None:
        super().__init__()
        for name in (*GEOMETRY, "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(like, name))
        self._adopt_bias(like)
        self.adopt_widths(like)

    def _adopt_bias(self, like: Convolution) -> None:
        self.register_parameter("bias", None if like.bias is None else nn.Parameter(like.bias.detach().clone()))

    @property
    def generation_macs(self) -> int:
        """Multiply-accumulates that computing the weight takes, per forward."""
        return 0

    @property
    def dense_params(self) -> int:
        """Parameters of the plain convolution it replaces."""
        kh, kw = self.kernel_size
        return self.out_channels * (self.in_channels // self.groups * kh * kw + (self.bias is not None))

    @property
    def chooses_outs(self) -> bool:
        return self.groups == 1

    def active(self) -> tuple[Tensor, Tensor | None, int]:
        """Weight, bias and groups at the selected width."""
        weight, bias = self.weight, self.bias
        if self.width_spec is None:
            return weight, bias, self.groups
        spec, index = self.width_spec, self.width_index
        groups = self.groups if self.groups == 1 else spec.ins[index] // (self.in_channels // self.groups)
        weight = spec.take_outs(weight if self.groups > 1 else spec.take_ins(weight, index, 1), index)
        return weight, None if bias is None else spec.take_outs(bias, index), groups

    def forward(self, x: Tensor) -> Tensor:
        weight, bias, groups = self.active()
        if x.ndim not in (3, 4) or x.shape[-3] != weight.shape[1] * groups:
            raise ConfigError(self._misfit(x, weight.shape[1] * groups))
        padding: str | int | tuple[int, int] = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        return F.conv2d(x, weight, bias, self.stride, padding, self.dilation, groups)

    def _misfit(self, x: Tensor, ins: int) -> str:
        where = "" if self.width_spec is None else f" at width {format_width(self.width_spec.widths[self.width_index])}"
        hint = "Give images with the channels the network was made for"
        if self.width_spec is not None and self.width_index != -1:
            hint = "The network fixes numbers of channels outside its layers, and cannot be narrowed"
        return f"{type(self).__name__}({self.extra_repr()}) reads (N, {ins}, H, W){where}, got {tuple(x.shape)}. {hint}"

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The plain convolution that computes the same, at the selected width."""
        weight, bias, groups = self.active()
        return plain_conv2d(self, weight, bias, groups)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text + ("" if self.width_spec is None else f", widths={self.width_spec.widths}")


class PlainConv2d(GeneratedConv2d):
    """A convolution with a weight of its own, as `nn.Conv2d`; in addition it may be tied and have several widths."""

    standalone: ClassVar[bool] = True

    def __init__(self, like: Convolution) -> None:
        super().__init__(like)
        self.weight = nn.Parameter(like.weight.detach().clone(memory_format=torch.contiguous_format))


class SharedConv2d(PlainConv2d):
    """A convolution that several layers of the original network share."""


Convolution: TypeAlias = nn.Conv2d | GeneratedConv2d


def is_convolution(module: nn.Module) -> TypeIs[nn.Conv2d | PlainConv2d]:
    """Whether ``module`` is a two-dimensional convolution with a weight of its own, so that a technique may replace it."""
    return type(module) in (nn.Conv2d, PlainConv2d, SharedConv2d)


def geometry(conv: Convolution) -> tuple[int, int, tuple[int, ...], int]:
    """What two convolutions must have in common to use one weight: channels, kernel and groups."""
    return conv.in_channels, conv.out_channels, conv.kernel_size, conv.groups


def signature(layer: Convolution | nn.Linear) -> tuple[object, ...]:
    """What layers must have in common to become one module."""
    like, names = next(layer.parameters()), (*GEOMETRY, "in_features", "out_features", "width_spec")
    return (*(getattr(layer, name, None) for name in names), layer.bias is None, like.dtype, like.device)


def is_depthwise(conv: Convolution) -> bool:
    """One filter per input channel."""
    return conv.groups == conv.in_channels > 1


def is_pointwise(conv: Convolution) -> bool:
    """A 1 x 1 kernel."""
    return conv.kernel_size == (1, 1)


def plain_conv2d(like: Convolution, weight: Tensor, bias: Tensor | None, groups: int) -> nn.Conv2d:
    """An `nn.Conv2d` that holds copies of ``weight`` and ``bias``, with the geometry of ``like``."""
    sizes = (weight.shape[1] * groups, weight.shape[0], weight.shape[2:])
    options = {name: getattr(like, name) for name in ("stride", "padding", "dilation", "padding_mode")}
    return plain_layer(nn.Conv2d, sizes, weight, bias, groups=groups, **options).train(like.training)
