"""Gates: what chooses a width for each image.

A network with a gate has three parts. The *front* is the same at every width and runs once. The *gate* reads what the front
gives, pooled to one number per channel, and chooses. The *tails* are the rest of the network, one for each width.

Source: Li et al., Dynamic Slimmable Network, CVPR 2021, section 3.3.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.width import Width, WidthAware, WidthSpec
from thriftnet.errors import IncompatibleModelError

REDUCTION = 4  # channels per hidden feature of a gate


class Gate(nn.Module):
    """Base of all gates. It is registered in the module whose output ends the front, under the name ``gate``.

    At a fixed width it plays no part: it does not run, and folding leaves nothing of it. It does not train either until
    ``requires_grad_(True)``, so that distributed training of the widths has no parameter without a gradient.

    Shape: (N, C) or (N, C, h, w) -> (N, choices) logits.

    Args:
        widths: What it chooses among, as `set_width` takes them, narrowest first.
        cut: The module whose output ends the front, as seen from the one that holds the gate; "" for that one itself.
        reads: The module whose output the gate reads, likewise.

    State: ``cost``, what multiply-accumulates cost in its decisions (see `decide`), kept with the weights.
    """

    cost: Tensor

    def __init__(self, widths: Sequence[Width], cut: str = "", reads: str = "") -> None:
        super().__init__()
        self.widths, self.cut, self.reads = tuple(widths), cut, reads
        self.register_buffer("cost", torch.zeros(()))

    def fold(self) -> nn.Identity:
        """Nothing: at a fixed width there is nothing to choose."""
        return nn.Identity()

    def extra_repr(self) -> str:
        return f"widths={self.widths}"


class SqueezeGate(Gate):
    """Global average pooling, a reduction to a quarter of the channels, ReLU, a linear layer.

    Shape: (N, C, h, w) -> (N, choices) logits.

    Source: Li et al., section 3.3, on any feature maps instead of those of a squeeze-and-excitation.
    """

    def __init__(self, channels: int, widths: Sequence[Width], like: Tensor) -> None:
        super().__init__(widths, cut="body", reads="body")
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


class SplitPoint(WidthAware):
    """The end of the front: the module before it runs whole, and a narrower tail reads the first of its channels.

    Shape: as ``body``, with fewer channels at a narrower width.

    Args:
        body: The last module of the front.
        gate: What chooses the width of the tail.
        width_spec: Channels that the tails read.
    """

    def __init__(self, body: nn.Module, gate: Gate, width_spec: WidthSpec) -> None:
        super().__init__()
        self.body, self.gate = body, gate
        self.set_width_spec(width_spec)
        self.train(body.training)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out[:, : self.active_outs(out.shape[1])]

    def fold(self) -> nn.Sequential:
        """The module, and a padding by less than nothing, which takes channels away."""
        full, kept = self.width_spec.outs[-1] if self.width_spec else 0, self.active_outs(0)
        narrow = nn.ConstantPad3d((0, 0, 0, 0, 0, kept - full), 0.0) if kept < full else nn.Identity()
        return nn.Sequential(OrderedDict(body=self.body, narrow=narrow)).train(self.training)


def squeeze(features: Tensor) -> Tensor:
    """One number per channel: (N, C, h, w) or (N, C) -> (N, C)."""
    return features.mean((2, 3)) if features.ndim == 4 else features


def gates(model: nn.Module) -> dict[str, Gate]:
    """The gates of a network by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Gate)}


def gate_of(model: nn.Module) -> tuple[str, Gate]:
    """Name and gate of a network that chooses its width.

    Raises:
        IncompatibleModelError: It has none.
    """
    found = gates(model)
    if len(found) != 1:
        raise IncompatibleModelError(
            f"{type(model).__name__} has {'no gate' if not found else f'{len(found)} gates: ' + ', '.join(found)}; one is needed. "
            "Convert a plain network with Slimmable(widths=(0.5, 1.0), gate=True), or create_model('slimmable_mobilenetv1')"
        )
    return next(iter(found.items()))


def gumbel_choice(
    logits: Tensor, temperature: float = 1.0, noise: bool = True, random: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """A choice per image that gradients pass: one-hot in the forward, softmax in the backward.

    Shape: (N, choices) -> twice (N, choices).

    Args:
        logits: What the gate says.
        temperature: The lower, the nearer the softmax is to one-hot.
        noise: Draw the choice, each with the probability that the softmax of the logits gives it; else take the largest.
        random: Where the noise comes from.

    Returns:
        The one-hot choice, and the softmax that its gradient is taken of.

    Source: Jang et al., Categorical Reparameterization with Gumbel-Softmax, ICLR 2017, section 2.2.
    """
    if noise:
        logits = logits - torch.empty_like(logits).exponential_(generator=random).log()
    soft = (logits / temperature).softmax(1)
    hard = F.one_hot(soft.argmax(1), soft.shape[1]).to(soft)
    return hard - soft.detach() + soft, soft


def decide(logits: Tensor, macs: Tensor, cost: float | Tensor = 0.0) -> Tensor:
    """The choice of each image without noise, when multiply-accumulates cost something.

    Shape: (N, choices) -> (N,), positions among the choices.

    Args:
        logits: What the gate says.
        macs: Multiply-accumulates of each choice.
        cost: What the most expensive choice loses in its logit; others lose in proportion. 0 takes the gate at its word,
            more moves images to narrower tails, less than 0 to wider ones.
    """
    return (logits - cost * (macs / macs.max()).to(logits)).argmax(1)
