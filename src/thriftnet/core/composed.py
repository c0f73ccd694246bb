"""Several layers in a row that replace one convolution."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from thriftnet.core.tied import Tied
from thriftnet.core.width import WidthAware, WidthSpec, exact_share
from thriftnet.errors import IncompatibleModelError


class ComposedConv2d(Tied, WidthAware):
    """Layers that run one after the other in place of one convolution; subclasses register them in this order.

    It may be tied to several users and may run at several widths: the first layer has the inputs and the last the outputs of
    the convolution, and between them there are `inner_channels`.

    Shape: as the convolution.

    Args:
        in_channels: Inputs of the first layer.
        out_channels: Outputs of the last layer.
        kernel_size: Of the convolution it replaces.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, ...]) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.kernel_size, self.groups = in_channels, out_channels, kernel_size, 1

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x

    @property
    def dense_params(self) -> int:
        """Parameters of the convolution it replaces."""
        kh, kw = self.kernel_size
        has_bias = getattr(self._layers()[-1], "bias", None) is not None
        return self.out_channels * (self.in_channels * kh * kw + has_bias)

    def inner_channels(self, width_spec: WidthSpec) -> tuple[int, ...]:
        """Channels between its layers at each width; by default, they narrow as the others do."""
        full = int(getattr(self._layers()[0], "out_channels"))  # noqa: B009  # a Module's attributes have no known type
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

    def fold(self) -> nn.Module:
        """Its layers in a row; those that fold further do so in turn."""
        return nn.Sequential(*self.children()).train(self.training)

    def extra_repr(self) -> str:
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}"
        return text if self.width_spec is None else f"{text}, widths={self.width_spec.widths}"

    def _layers(self) -> list[WidthAware]:
        return [layer for layer in self.children() if isinstance(layer, WidthAware)]
