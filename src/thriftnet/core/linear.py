"""Linear layers whose weight is computed, tied or narrowed. Each behaves as the `nn.Linear` it replaces."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.kinds import Kind, has_own_weight, inherit
from thriftnet.core.tied import Tied, plain_layer
from thriftnet.core.width import WidthAware

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class GeneratedLinear(Kind, Tied, WidthAware, nn.Linear):
    """A linear layer whose weight is computed: subclasses define the property ``weight`` (O, I).

    It may be tied to several users and may run at several widths, and is of the class of the layer it replaces, too.

    Shape: (..., in_features) -> (..., out_features); fewer of each at a narrower width.

    Args:
        like: The linear layer to replace: sizes and widths are copied from it.
    """

    weight: Tensor
    bias: Tensor | None  # type: ignore[assignment]
    channel_axis: ClassVar[int] = -1

    def __init__(self, like: nn.Linear) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = like.in_features, like.out_features
        self.adopt_kind(like)
        self._adopt_bias(like)
        self.adopt_widths(like)

    def _adopt_bias(self, like: nn.Linear) -> None:
        self.register_parameter("bias", None if like.bias is None else nn.Parameter(like.bias.detach().clone()))

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
        if self.kind is not None and self.width_spec is None:
            return self.kind.forward(self, input)  # type: ignore[no-any-return]
        return F.linear(input, *self.active())

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The plain layer that computes the same, at the selected width."""
        return plain_linear(self, *self.active())

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class PlainLinear(GeneratedLinear):
    """A linear layer with a weight of its own, as `nn.Linear`; in addition it may be tied and have several widths."""

    standalone: ClassVar[bool] = True
    replaceable: ClassVar[bool] = True

    def _adopt_bias(self, like: nn.Linear) -> None:
        self.weight = nn.Parameter(like.weight.detach().clone())  # the weight comes first in files
        super()._adopt_bias(like)


class SharedLinear(PlainLinear):
    """A linear layer that several layers of the original network share."""


def is_linear(module: nn.Module) -> TypeIs[nn.Linear | PlainLinear]:
    """Whether ``module`` is a linear layer with a weight of its own, so that a technique may replace it.

    Also of a class derived from `nn.Linear`, but not one whose weight is computed by a parametrization, or is complex.
    """
    return isinstance(module, nn.Linear) and has_own_weight(module)


def plain_linear(like: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer of the class of ``like`` that holds copies of ``weight`` (O, I) and ``bias``."""
    linear = plain_layer(nn.Linear, weight.shape[::-1], weight, bias).train(like.training)
    inherit(linear, like)
    return linear
