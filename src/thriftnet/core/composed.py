"""Several layers in a row that replace one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from thriftnet.core.conv import GEOMETRY, Convolution
from thriftnet.core.tied import Tied
from thriftnet.core.width import WidthAware, WidthSpec, exact_share
from thriftnet.errors import IncompatibleModelError


class Composed(Tied, WidthAware):
    """Layers that run one after the other in place of one layer; subclasses register them in this order.

    It may be tied to several users and may run at several widths: the first layer has the inputs and the last the outputs of
    the layer it replaces, and between them there are `inner_channels`.

    Shape: as the layer it replaces.
    """

    def forward(self, x: Tensor) -> Tensor:
        for layer in self._in_a_row():
            x = layer(x)
        return x

    @property
    def bias(self) -> Tensor | None:
        """Of the last layer."""
        return getattr(self._layers()[-1], "bias", None)

    @property
    def has_bias(self) -> bool:
        """Whether the last layer has one, as the layer that it replaces."""
        return getattr(self._layers()[-1], "bias", None) is not None

    def inner_channels(self, width_spec: WidthSpec) -> tuple[int, ...]:
        """Channels between its layers at each width; by default, they narrow as the others do."""
        full = self.inner
        shares = tuple(exact_share(full, width) for width in width_spec.widths)
        if 0 in shares:
            raise IncompatibleModelError(
                f"the {full} channels inside a {type(self).__name__} cannot be narrowed to all of {width_spec.widths}: "
                "choose widths that give integers, or another number of channels (a shift's expansion)"
            )
        return shares

    def set_width_spec(self, width_spec: WidthSpec | None) -> None:
        super().set_width_spec(width_spec)
        layers = self._layers()
        inner = () if width_spec is None else self.inner_channels(width_spec)
        for layer in layers:
            ins, outs = layer is layers[0], layer is layers[-1]
            changes: dict[str, Any] = {} if ins else {"ins": inner, "in_runs": ()}
            changes |= {} if outs else {"outs": inner, "out_runs": ()}
            layer.set_width_spec(width_spec and replace(width_spec, **changes))

    def set_width_index(self, index: int) -> None:
        super().set_width_index(index)
        for layer in self._layers():
            layer.set_width_index(index)

    @property
    def inner(self) -> int:
        """Channels that the first layer gives."""
        first = self._layers()[0]
        return int(getattr(first, "out_channels", None) or first.out_features)  # type: ignore[arg-type]

    def fold(self) -> nn.Module:
        """Its layers in a row; those that fold further do so in turn."""
        return nn.Sequential(*self._in_a_row()).train(self.training)

    def _in_a_row(self) -> list[nn.Module]:
        """Its layers in the order in which they run; one that two of them share stands there twice, unlike in ``children()``."""
        return [layer for layer in self._modules.values() if layer is not None]

    def _layers(self) -> list[WidthAware]:
        return [layer for layer in self._in_a_row() if isinstance(layer, WidthAware)]


class ComposedConv2d(Composed):
    """Layers in place of one convolution, with its attributes.

    Args:
        like: The convolution to replace: its geometry is copied.
    """

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    groups: int

    def __init__(self, like: Convolution) -> None:
        super().__init__()
        for name in GEOMETRY:
            setattr(self, name, getattr(like, name))

    @property
    def dense_params(self) -> int:
        """Parameters of the convolution it replaces."""
        kh, kw = self.kernel_size
        return self.out_channels * (self.in_channels // self.groups * kh * kw + (self.has_bias))

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        return text if self.width_spec is None else f"{text}, widths={self.width_spec.widths}"


class ComposedLinear(Composed):
    """Layers in place of one linear layer.

    Args:
        like: The layer to replace: its sizes are copied.
    """

    channel_axis: ClassVar[int] = -1

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features

    @property
    def dense_params(self) -> int:
        """Parameters of the layer it replaces."""
        return self.out_features * (self.in_features + (self.has_bias))

    def extra_repr(self) -> str:
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.has_bias}"
        return text if self.width_spec is None else f"{text}, widths={self.width_spec.widths}"
