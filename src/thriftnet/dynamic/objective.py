"""The loss of a gate: accuracy, the narrowest width that is right, and a budget of multiply-accumulates.

The network stays as it is; only the gate learns. The output for each image is that of the chosen width, so the gradient of a
choice is the gain in the loss.

Source: Li et al., Dynamic Slimmable Network, CVPR 2021, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from thriftnet.arguments import Operations, ProperShare, Weight, checked
from thriftnet.dynamic.gate import check_budget, gumbel_choice
from thriftnet.errors import ConfigError

Hard = Literal["widest", "narrowest"]
Targets = Literal["sandwich", "losses"]


class Decision(NamedTuple):
    """A gate's decision on N images among K widths, each (N, K)."""

    logits: Tensor
    choice: Tensor  # one-hot, with the gradient of soft
    soft: Tensor  # softmax, including noise


class GateLoss(NamedTuple):
    """The loss of a gate and its terms: weighted scalars."""

    total: Tensor
    task: Tensor
    sparsification: Tensor
    macs: Tensor


@checked
@dataclass(frozen=True, kw_only=True)
class GateObjective:
    """Cross-entropy of the chosen outputs + sandwich gate sparsification + distance from the budget; or, ours, the widths' losses.

    With ``targets="losses"`` the logits learn the loss of each width on an image, and nothing else, see `value_loss`: one such gate
    serves every budget, since the budget only enters through the cost of decisions.

    Args:
        budget: Multiply-accumulates per image, on average; None for no budget.
        budget_weight: Of the squared relative distance from the budget.
        sparsification_weight: Of the cross-entropy between the gate and its targets.
        label_smoothing: In both cross-entropies.
        hard: The target of images that no width gets right: the "widest" or the "narrowest".
        targets: What the logits learn: "sandwich", as in the paper, the narrowest width where it is right, else the widest; or
            "losses", the loss of each width, which is ours.
        original: The authors' formulas: a second softmax in the sparsification, and ``(mean MACs / 1e9) ** 2 / 2`` instead of a
            budget.

    Source: Li et al., section 3.3; the budget and ``targets="losses"`` are ours.
    """

    budget: Operations | None = None
    budget_weight: Weight = 10.0
    sparsification_weight: Weight = 1.0
    label_smoothing: ProperShare = 0.1
    hard: Hard = "widest"
    targets: Targets = "sandwich"
    original: bool = False

    def __post_init__(self) -> None:
        if self.original and self.budget is not None:
            raise ConfigError("original=True has no budget, its MACs have a fixed weight: leave budget out")
        if self.original and self.targets != "sandwich":
            raise ConfigError(f"original=True is for targets='sandwich', got {self.targets!r}: leave one of them out")

    def check_budget(self, macs: Tensor) -> None:
        """Raise if no choice of the gate can meet the budget; ``macs`` are those of each width, (K,)."""
        if self.budget is not None:
            check_budget(self.budget, float(macs.min()), float(macs.max()))

    def wanted(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """What the logits learn from the outputs of each width: (K, N, classes) and (N,) -> (N,) for the sandwich, (N, K) for losses."""
        if self.targets == "losses":
            return width_losses(outputs, labels)
        return sparsification_targets(outputs, labels, self.hard)

    def __call__(self, decision: Decision, output: Tensor, labels: Tensor, targets: Tensor, macs: Tensor) -> GateLoss:
        """The loss of one batch.

        Args:
            decision: The gate's.
            output: The network's output for these choices, (N, classes), with the gradient of the choices.
            labels: True classes, (N,).
            targets: From `wanted`.
            macs: Multiply-accumulates of each width, (K,).
        """
        if self.targets == "losses":
            values = value_loss(decision.logits, targets) * self.sparsification_weight
            return GateLoss(values, values.new_zeros(()), values, values.new_zeros(()))
        task = F.cross_entropy(output, labels, label_smoothing=self.label_smoothing)
        spent = (decision.choice @ macs.to(decision.choice)).mean()  # per image, with the gradient of the choices
        if self.original:  # the softmax is taken twice, so that the loss cannot reach 0
            distance, logits = 0.5 * (spent / 1e9) ** 2, decision.soft
        else:
            relative = 0.0 * spent if self.budget is None else spent / self.budget - 1
            distance, logits = self.budget_weight * relative**2, decision.logits
        sparsification = F.cross_entropy(logits, targets, label_smoothing=self.label_smoothing) * self.sparsification_weight
        return GateLoss(task + sparsification + distance, task, sparsification, distance)


def decision_of(
    logits: Tensor, temperature: float = 1.0, noise: bool = True, random: torch.Generator | None = None
) -> Decision:
    """A gate's decision in training, see `gumbel_choice`."""
    return Decision(logits, *gumbel_choice(logits, temperature, noise, random))


@checked
def sparsification_targets(outputs: Tensor, labels: Tensor, hard: Hard = "widest") -> Tensor:
    """The width that each image should take: the narrowest if it is right, else the widest. Those in between are never a target.

    Shape: (K, N, classes) and (N,) -> (N,), indices of widths.

    Args:
        outputs: Of each width, narrowest first.
        labels: True classes.
        hard: The target of images that the widest gets wrong, too: "widest" (try the best) or "narrowest" (give up).

    Source: Li et al., section 3.3, "sandwich gate sparsification".
    """
    easy = outputs[0].argmax(1) == labels
    if hard == "narrowest":
        easy = easy | (outputs[-1].argmax(1) != labels)
    return torch.where(easy, 0, len(outputs) - 1)


def width_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each width on each image: (K, N, classes) and (N,) -> (N, K)."""
    return torch.stack([F.cross_entropy(output, labels, reduction="none") for output in outputs], 1)


def value_loss(logits: Tensor, losses: Tensor) -> Tensor:
    """Squared distance between the logits and the negative losses, each minus its mean over the widths.

    Its minimum is at the expected losses, up to a constant per image. `decide` adds the cost of multiply-accumulates, so its choice
    is the best that the features allow, at every cost and so at every budget.

    Shape: twice (N, K) -> a scalar.

    Args:
        logits: The gate's output, before noise.
        losses: From `width_losses`.
    """
    distance = logits + losses
    return (distance - distance.mean(1, keepdim=True)).square().sum(1).mean()
