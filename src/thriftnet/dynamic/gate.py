"""Gates: small modules that choose a width for each image.

A network with a gate has three parts. The *front* is the same at every width and runs once. The *gate* reads the front's output,
pooled to one number per channel, and chooses. The *tails* are the rest of the network, one for each width.

Source: Li et al., Dynamic Slimmable Network, CVPR 2021, section 3.3.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.module import ThriftyModule
from thriftnet.core.width import Width, WidthAware, WidthSpec
from thriftnet.errors import ConfigError, IncompatibleModelError

REDUCTION = 4  # channels per hidden feature of a gate


class Gate(ThriftyModule):
    """Base class of gates. A gate is registered, as ``gate``, in the module whose output ends the front.

    At a fixed width a gate does not run, and folding removes it. Its parameters have ``requires_grad=False`` until its own
    training, so that distributed training of the widths has no parameter without a gradient.

    Shape: (N, C) or (N, C, h, w) -> (N, choices) logits.

    Args:
        widths: The widths it chooses among, as `set_width` takes them, narrowest first.
        split_after: Name of the module that ends the front, relative to the module that holds the gate; "" for that module.
        reads: Name of the module whose output the gate reads, relative likewise.

    State: ``cost``, the price of multiply-accumulates in its decisions (see `decide`), saved with the weights.
    """

    cost: Tensor

    def __init__(self, widths: Sequence[Width], split_after: str = "", reads: str = "") -> None:
        super().__init__()
        self.widths, self.split_after, self.reads = tuple(widths), split_after, reads
        self.register_buffer("cost", torch.zeros(()))

    def fold(self) -> nn.Identity:
        """An identity: at a fixed width there is nothing to choose."""
        return nn.Identity()

    def extra_repr(self) -> str:
        return f"widths={self.widths}"


class SqueezeGate(Gate):
    """Global average pooling, a reduction to a quarter of the channels, ReLU, a linear layer.

    Shape: (N, C, h, w) -> (N, choices) logits.

    Source: Li et al., section 3.3, on any feature maps instead of those of a squeeze-and-excitation.
    """

    def __init__(self, channels: int, widths: Sequence[Width], like: Tensor) -> None:
        super().__init__(widths, split_after="body", reads="body")
        hidden = max(4, channels // REDUCTION)
        self.reduce_weight = nn.Parameter(like.new_empty(hidden, channels))
        self.reduce_bias = nn.Parameter(like.new_zeros(hidden))
        self.choose_weight = nn.Parameter(like.new_empty(len(self.widths), hidden))
        nn.init.kaiming_normal_(self.reduce_weight, nonlinearity="relu")
        nn.init.normal_(self.choose_weight, std=0.01)
        self.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        hidden = F.linear(squeeze(features), self.reduce_weight, self.reduce_bias).relu()
        return F.linear(hidden, self.choose_weight)


class Narrow(WidthAware):
    """Passes on the first channels, as many as the width has.

    Shape: (N, C, h, w) -> (N, c, h, w).
    """

    standalone: ClassVar[bool] = True

    def forward(self, x: Tensor) -> Tensor:
        return x[:, : self.active_outs(x.shape[1])]

    def fold(self) -> nn.Module:
        """A padding by a negative number, which drops channels."""
        kept = self.active_outs(0) - self.active_ins(0)
        layer = nn.ConstantPad3d((0, 0, 0, 0, 0, kept), 0.0) if kept else nn.Identity()
        return layer.train(self.training)


class SplitPoint(ThriftyModule):
    """The end of the front: modules up to ``body`` keep all channels, and a narrower tail reads the first of them.

    Shape: as ``body``, with fewer channels at a narrower width.
    """

    def __init__(self, body: nn.Module, gate: Gate, width_spec: WidthSpec) -> None:
        super().__init__()
        self.body, self.gate, self.narrow = body, gate, Narrow()
        self.narrow.set_width_spec(width_spec)
        self.train(body.training)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.narrow(self.body(x))
        return out

    def fold(self) -> nn.Sequential:
        """The body and the narrowing, without the gate."""
        return nn.Sequential(OrderedDict(body=self.body, narrow=self.narrow)).train(self.training)


def squeeze(features: Tensor) -> Tensor:
    """Global average pooling: (N, C, h, w) or (N, C) -> (N, C)."""
    return features.mean((2, 3)) if features.ndim == 4 else features


def gates(model: nn.Module) -> dict[str, Gate]:
    """The gates of a network by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Gate)}


def gate_of(model: nn.Module) -> tuple[str, Gate]:
    """Name and gate of a network that has one.

    Raises:
        IncompatibleModelError: It has none, or several.
    """
    found = gates(model)
    if len(found) != 1:
        raise IncompatibleModelError(
            f"{type(model).__name__} has {'no gate' if not found else f'{len(found)} gates: ' + ', '.join(found)}; expected one. "
            "Convert a plain network with Slimmable(widths=(0.5, 1.0), gate=True), give a slimmable one a gate with add_gate(model), "
            "or create_model('slimmable_mobilenetv1')"
        )
    return next(iter(found.items()))


def gumbel_choice(
    logits: Tensor, temperature: float = 1.0, noise: bool = True, random: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Straight-through Gumbel-softmax: one-hot in the forward, the gradient of the softmax in the backward.

    Shape: (N, choices) -> (one-hot choice, softmax), each (N, choices).

    Args:
        logits: The gate's output.
        temperature: At a lower one the softmax is nearer to one-hot.
        noise: Sample a choice with the probabilities of the softmax of ``logits``; else take the largest logit.
        random: Generator of the noise.

    Source: Jang et al., Categorical Reparameterization with Gumbel-Softmax, ICLR 2017, section 2.2.
    """
    if noise:
        logits = logits - torch.empty_like(logits).exponential_(generator=random).log()
    soft = (logits / temperature).softmax(1)
    hard = F.one_hot(soft.argmax(1), soft.shape[1]).to(soft)
    return hard - soft.detach() + soft, soft


def decide(logits: Tensor, macs: Tensor, cost: float | Tensor = 0.0) -> Tensor:
    """The choice of each image without noise, when multiply-accumulates have a price.

    Shape: (N, choices) -> (N,), indices of choices.

    Args:
        logits: The gate's output.
        macs: Multiply-accumulates of each choice.
        cost: What is subtracted from the logit of the most expensive choice; others lose in proportion to their MACs. More than 0
            moves images to narrower tails, less than 0 to wider ones.
    """
    return (logits - cost * (macs / macs.max()).to(logits)).argmax(1)


def check_budget(budget: float, least: float, most: float) -> None:
    """Raise ConfigError for a budget of MACs below the narrowest width's or above the widest's."""
    if not isinstance(budget, int | float) or not least <= budget <= most:
        given = f"{budget:,.0f}" if isinstance(budget, int | float) else repr(budget)
        raise ConfigError(f"a budget of {given} multiply-accumulates is out of reach: expected {least:,.0f} to {most:,.0f}")
