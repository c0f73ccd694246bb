"""Convolutions whose weight is computed, tied or narrowed. Each behaves as the `nn.Conv2d` it replaces."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.kinds import Kind, extras, has_own_weight, inherit, kind_of, torch_class
from thriftnet.core.tied import Tied, plain_layer
from thriftnet.core.width import WidthAware, WidthSpec, format_width
from thriftnet.errors import ConfigError, IncompatibleModelError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

DERIVED = ("_reversed_padding_repeated_twice", "transposed", "output_padding")  # what `nn.Conv2d` computes from it
GEOMETRY = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")


class GeneratedConv(Kind, Tied, WidthAware):
    """A convolution of one, two or three dimensions whose weight is computed: subclasses define the property ``weight``.

    It may be tied to several users and may run at several widths. If the convolution it replaces is of a class of its own, such
    as one that standardises its weight, it is of that class, too, and runs as it does.

    Shape: (N, I, ...) -> (N, O, ...) as the layer it replaces; at a narrower width I and O shrink.

    Args:
        like: The convolution to replace: geometry and bias are copied from it.
    """

    convolve: ClassVar[Callable[..., Tensor]]  # of its dimensions
    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    padding_mode: Any  # torch allows some words only
    dilation: tuple[int, ...]
    groups: int
    _reversed_padding_repeated_twice: list[int]
    weight: Tensor  # at full width, (O, I/groups, ...): a property, or a parameter of those that have their own
    bias: Tensor | None

    def __init__(self, like: AnyConvolution) -> None:
        nn.Module.__init__(self)
        for name in (*GEOMETRY, *DERIVED):
            setattr(self, name, getattr(like, name))
        self.adopt_kind(like)
        self._adopt_bias(like)
        self.adopt_widths(like)

    def _adopt_bias(self, like: AnyConvolution) -> None:
        self.register_parameter("bias", None if like.bias is None else nn.Parameter(like.bias.detach().clone()))

    @property
    def generation_macs(self) -> int:
        """Multiply-accumulates that computing the weight takes, per forward."""
        return 0

    @property
    def dense_params(self) -> int:
        """Parameters of the plain convolution it replaces."""
        entries = self.in_channels // self.groups * math.prod(self.kernel_size)
        return self.out_channels * (entries + (self.bias is not None))

    @property
    def chooses_outs(self) -> bool:
        return self.groups == 1

    def set_width_spec(self, width_spec: WidthSpec | None) -> None:
        if width_spec is not None and self.kind is not None:
            raise IncompatibleModelError(
                f"{self.kind.__name__} computes with its weight as a whole, and cannot be narrowed. Use a network of nn.Conv2d"
            )
        super().set_width_spec(width_spec)

    def active(self) -> tuple[Tensor, Tensor | None, int]:
        """Weight, bias and groups at the selected width."""
        weight, bias = self.weight, self.bias
        if self.width_spec is None:
            return weight, bias, self.groups
        spec, index = self.width_spec, self.width_index
        groups = self.groups if self.groups == 1 else spec.ins[index] // (self.in_channels // self.groups)
        weight = spec.take_outs(weight if self.groups > 1 else spec.take_ins(weight, index, 1), index)
        return weight, None if bias is None else spec.take_outs(bias, index), groups

    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.kind is not None:
            return self.kind.forward(self, input, *args, **kwargs)  # type: ignore[no-any-return]
        (weight, bias, groups), x = self.active(), input
        padding: str | int | tuple[int, ...] = self.padding
        if self.padding_mode != "zeros":
            x, padding = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode), 0
        try:
            return type(self).convolve(x, weight, bias, self.stride, padding, self.dilation, groups)
        except RuntimeError:
            if x.ndim not in (weight.ndim - 1, weight.ndim) or x.shape[self.channel_axis] != weight.shape[1] * groups:
                raise ConfigError(self._misfit(x, weight.shape[1] * groups)) from None
            raise

    def _misfit(self, x: Tensor, ins: int) -> str:
        where = "" if self.width_spec is None else f" at width {format_width(self.width_spec.widths[self.width_index])}"
        hint = "Give images with the channels the network was made for"
        if self.width_spec is not None and self.width_index != -1:
            hint = "The network fixes numbers of channels outside its layers, and cannot be narrowed"
        sides = ("L",) if self.channel_axis == -2 else ("D", "H", "W")[self.channel_axis + 1 :]
        shape = ", ".join(("N", str(ins), *sides))
        return f"{type(self).__name__}({self.extra_repr()}) reads ({shape}){where}, got {tuple(x.shape)}. {hint}"

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """The plain convolution that computes the same, at the selected width."""
        weight, bias, groups = self.active()
        return plain_conv(cast(AnyConvolution, self), weight, bias, groups)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        if self.groups != 1:
            text += f", groups={self.groups}"
        return text + ("" if self.width_spec is None else f", widths={self.width_spec.widths}")


class GeneratedConv2d(GeneratedConv, nn.Conv2d):
    """A convolution whose weight is computed: (O, I/groups, kh, kw).

    Shape: (N, I, H, W) -> (N, O, H', W') as `nn.Conv2d`; at a narrower width I and O shrink.
    """

    convolve = F.conv2d

    def fold(self) -> nn.Conv2d:
        return cast(nn.Conv2d, super().fold())


class GeneratedConv1d(GeneratedConv, nn.Conv1d):
    """A one-dimensional convolution whose weight is computed: (O, I/groups, k)."""

    convolve = F.conv1d
    channel_axis: ClassVar[int] = -2


class GeneratedConv3d(GeneratedConv, nn.Conv3d):
    """A three-dimensional convolution whose weight is computed: (O, I/groups, kd, kh, kw)."""

    convolve = F.conv3d
    channel_axis: ClassVar[int] = -4


class OwnWeight(GeneratedConv):
    """A convolution with a weight of its own; in addition it may be tied and have several widths."""

    standalone: ClassVar[bool] = True
    replaceable: ClassVar[bool] = True

    def __init__(self, like: AnyConvolution) -> None:
        super().__init__(like)
        self.weight = nn.Parameter(like.weight.detach().clone(memory_format=torch.contiguous_format))


class PlainConv2d(OwnWeight, GeneratedConv2d):
    """A convolution with a weight of its own, as `nn.Conv2d`; in addition it may be tied and have several widths."""


class SharedConv2d(PlainConv2d):
    """A convolution that several layers of the original network share."""


class SharedConv1d(OwnWeight, GeneratedConv1d):
    """A one-dimensional convolution that several layers of the original network share."""


class SharedConv3d(OwnWeight, GeneratedConv3d):
    """A three-dimensional convolution that several layers of the original network share."""


Convolution: TypeAlias = nn.Conv2d | GeneratedConv2d
AnyConvolution: TypeAlias = nn.Conv1d | nn.Conv2d | nn.Conv3d


def is_any_convolution(module: nn.Module) -> TypeIs[nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """As `is_convolution`, of one, two or three dimensions."""
    return isinstance(module, AnyConvolution) and has_own_weight(module)


def is_convolution(module: nn.Module) -> TypeIs[nn.Conv2d | PlainConv2d]:
    """Whether ``module`` is a two-dimensional convolution with a weight of its own, so that a technique may replace it.

    Also of a class derived from `nn.Conv2d`, but not one whose weight is computed by a parametrization, or is complex.
    """
    return isinstance(module, nn.Conv2d) and has_own_weight(module)


def geometry(layer: AnyConvolution | nn.Linear) -> tuple[object, ...]:
    """What two layers must have in common to use one weight: its shape, type and device, and groups."""
    return layer.weight.shape, getattr(layer, "groups", None), layer.weight.dtype, layer.weight.device


def signature(layer: AnyConvolution | nn.Linear) -> tuple[object, ...]:
    """What layers must have in common to become one module."""
    like, names = next(layer.parameters()), (*GEOMETRY, "in_features", "out_features", "width_spec")
    added = [(name, value) for name in extras(layer) if isinstance(value := getattr(layer, name), Hashable)]
    settings = tuple(pair for pair in added if not isinstance(pair[1], Tensor))
    kind = (kind_of(layer), settings)
    return (*(getattr(layer, name, None) for name in names), layer.bias is None, like.dtype, like.device, kind)


def is_depthwise(conv: AnyConvolution) -> bool:
    """One filter per input channel."""
    return conv.groups == conv.in_channels > 1


def is_pointwise(conv: AnyConvolution) -> bool:
    """A 1 x 1 kernel."""
    return all(side == 1 for side in conv.kernel_size)


def plain_conv(like: AnyConvolution, weight: Tensor, bias: Tensor | None, groups: int, **geometry: Any) -> nn.Module:
    """A convolution that holds copies of ``weight`` and ``bias``, of the class and geometry of ``like`` except as given."""
    sizes = (weight.shape[1] * groups, weight.shape[0], weight.shape[2:])
    options = {name: getattr(like, name) for name in ("stride", "padding", "dilation", "padding_mode")} | geometry
    conv = plain_layer(torch_class(like), sizes, weight, bias, groups=groups, **options).train(like.training)
    inherit(conv, like)
    return conv


def plain_conv2d(like: Convolution, weight: Tensor, bias: Tensor | None, groups: int, **geometry: Any) -> nn.Conv2d:
    """`plain_conv` of two dimensions."""
    return cast(nn.Conv2d, plain_conv(like, weight, bias, groups, **geometry))
