"""Linear layers whose weight is computed, tied or narrowed. Each behaves as the `nn.Linear` it replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.tied import Tied, plain_layer
from thriftnet.core.width import WidthAware

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class GeneratedLinear(Tied, WidthAware):
    """A linear layer whose weight is computed: subclasses define the properties ``weight`` (O, I) and ``bias`` (O,) or None.

    It may be tied to several users and may run at several widths.

    Shape: (..., in_features) -> (..., out_features); fewer of each at a narrower width.

    Args:
        like: The linear layer to replace: sizes and widths are copied from it.
    """

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    channel_axis: ClassVar[int] = -1

    def __init__(self, like: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = like.in_features, like.out_features
        self.adopt_widths(like)

    @property
    def generation_macs(self) -> int:
        """Multiply-accumulates that computing the weight takes, per forward."""
        return 0

    @property
    def dense_params(self) -> int:
        """Parameters of the plain layer it replaces."""
        return self.out_features * (self.in_features + (self.bias is not None))

    def active(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias at the selected width."""
        weight, bias, spec = self.weight, self.bias, self.width_spec
        if spec is not None:
            weight = spec.take_outs(spec.take_ins(weight, self.width_index, 1), self.width_index)
            bias = None if bias is None else spec.take_outs(bias, self.width_index)
        return weight, bias

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *self.active())

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The plain layer that computes the same, at the selected width."""
        weight, bias = self.active()
        return plain_layer(nn.Linear, weight.shape[::-1], weight, bias).train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PlainLinear(GeneratedLinear, nn.Linear):  # type: ignore[misc]
    """A linear layer with a weight of its own, as `nn.Linear`; in addition it may be tied and have several widths."""

    standalone: ClassVar[bool] = True

    def __init__(self, like: nn.Linear) -> None:
        factory: dict[str, Any] = {"device": like.weight.device, "dtype": like.weight.dtype}
        nn.Linear.__init__(self, like.in_features, like.out_features, like.bias is not None, **factory)
        self.load_state_dict(like.state_dict())
        self.adopt_widths(like)


class SharedLinear(PlainLinear):
    """A linear layer that several layers of the original network share."""


def is_linear(module: nn.Module) -> TypeIs[nn.Linear | PlainLinear]:
    """Whether ``module`` is a linear layer with a weight of its own, so that a technique may replace it."""
    return type(module) in (nn.Linear, PlainLinear, SharedLinear)
