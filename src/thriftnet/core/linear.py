"""Linear layers that may be tied and have several widths."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.init import skip_init

from thriftnet.core.tied import Tied
from thriftnet.core.width import WidthAware


class PlainLinear(Tied, WidthAware, nn.Linear):
    """A linear layer as `nn.Linear`; in addition it may be tied and have several widths.

    Shape: (..., in_features) -> (..., out_features); fewer of each at a narrower width.
    """

    def __init__(self, like: nn.Linear) -> None:
        super().__init__(
            like.in_features, like.out_features, like.bias is not None, device=like.weight.device, dtype=like.weight.dtype
        )
        self.load_state_dict(like.state_dict())

    def active(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias at the selected width."""
        ins, outs = self.active_ins(self.in_features), self.active_outs(self.out_features)
        return self.weight[:outs, :ins], None if self.bias is None else self.bias[:outs]

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, *self.active())

    @property
    def dense_params(self) -> int:
        """Parameters of the plain layer it stands for."""
        return self.weight.numel() + (0 if self.bias is None else self.bias.numel())

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The plain layer that computes the same, at the selected width."""
        weight, bias = self.active()
        linear: nn.Linear = skip_init(  # type: ignore[no-untyped-call]
            nn.Linear, weight.shape[1], weight.shape[0], bias is not None, device=weight.device, dtype=weight.dtype
        )
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
        return linear.train(self.training)
