"""What a gate is trained for: right answers, the narrowest width that gives them, and a budget of multiply-accumulates.

The network stays as it is; only the gate learns. Each image's output is the one of the width that was chosen for it, so the
gradient of a choice is what the loss would gain by it.

Source: Li et al., Dynamic Slimmable Network, CVPR 2021, section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from thriftnet.core.spec import check_choice, check_number
from thriftnet.dynamic.gate import gumbel_choice
from thriftnet.errors import ConfigError

HARD = ("widest", "narrowest")
TARGETS = ("sandwich", "losses")


class Decision(NamedTuple):
    """What a gate decided, for N images and K widths, each (N, K)."""

    logits: Tensor
    choice: Tensor  # one-hot, with the gradient of soft
    soft: Tensor  # softmax, noise included


class GateLoss(NamedTuple):
    """The loss of a gate and what it is made of: scalars, all of them weighted."""

    total: Tensor
    task: Tensor
    sparsification: Tensor
    macs: Tensor


@dataclass(frozen=True, kw_only=True)
class GateObjective:
    """Cross-entropy of the chosen outputs + sandwich gate sparsification + distance from the budget; or, ours, the widths' losses.

    With ``targets="losses"`` the logits learn what each width loses on an image, and nothing else, see `value_loss`: such a gate
    serves every budget, which enters by the cost of decisions only.

    Args:
        budget: Multiply-accumulates that images should spend on average; None for no budget.
        budget_weight: Of the squared relative distance from the budget.
        sparsification_weight: Of the cross-entropy between the gate and its targets.
        label_smoothing: In both cross-entropies.
        hard: Where images belong that no width gets right: to the "widest" or the "narrowest".
        targets: What the logits learn: "sandwich", the narrowest width where it is right, else the widest, as in the paper; or
            "losses", what each width loses, which is ours.
        original: The authors' forms: a second softmax in the sparsification, and ``(mean MACs / 1e9) ** 2 / 2`` instead of a
            budget.

    Source: Li et al., section 3.3; the budget and ``targets="losses"`` are ours.
    """

    budget: float | None = None
    budget_weight: float = 10.0
    sparsification_weight: float = 1.0
    label_smoothing: float = 0.1
    hard: str = "widest"
    targets: str = "sandwich"
    original: bool = False

    def __post_init__(self) -> None:
        check_choice("hard", self.hard, HARD)
        check_choice("targets", self.targets, TARGETS)
        if self.budget is not None:
            check_number("budget", self.budget, 0)
        if self.original and self.budget is not None:
            raise ConfigError("original=True has no budget, it has a weight of its own: leave budget out")
        if self.original and self.targets != "sandwich":
            raise ConfigError(f"original=True is for targets='sandwich', got {self.targets!r}: leave one of them out")

    def check_budget(self, macs: Tensor) -> None:
        """Raise where no choice of the gate could meet the budget.

        Args:
            macs: Multiply-accumulates of each width, (K,).
        """
        least, most = float(macs.min()), float(macs.max())
        if self.budget is not None and not least <= self.budget <= most:
            raise ConfigError(
                f"a budget of {self.budget:,} multiply-accumulates is out of reach: possible are {least:,.0f} to {most:,.0f}"
            )

    def wanted(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """What the logits learn: (K, N, classes) and (N,) -> (N,) of the sandwich, (N, K) of losses.

        Args:
            outputs: What each width gives, narrowest first.
            labels: Right classes.
        """
        return (
            width_losses(outputs, labels) if self.targets == "losses" else sparsification_targets(outputs, labels, self.hard)
        )

    def __call__(self, decision: Decision, output: Tensor, labels: Tensor, targets: Tensor, macs: Tensor) -> GateLoss:
        """The loss of one batch.

        Args:
            decision: What the gate decided.
            output: What the network gives at these choices, (N, classes), with the choices' gradient.
            labels: Right classes, (N,).
            targets: From `wanted`.
            macs: Multiply-accumulates of each width, (K,).
        """
        if self.targets == "losses":
            values = value_loss(decision.logits, targets) * self.sparsification_weight
            return GateLoss(values, values.new_zeros(()), values, values.new_zeros(()))
        task = F.cross_entropy(output, labels, label_smoothing=self.label_smoothing)
        if self.original:
            sparsification = original_sparsification_loss(decision.soft, targets, self.label_smoothing)
            spent = original_macs_loss(decision.choice, macs)
        else:
            sparsification = sparsification_loss(decision.logits, targets, self.label_smoothing)
            spent = task.new_zeros(()) if self.budget is None else budget_loss(decision.choice, macs, self.budget)
            spent = spent * self.budget_weight
        sparsification = sparsification * self.sparsification_weight
        return GateLoss(task + sparsification + spent, task, sparsification, spent)


def decision_of(
    logits: Tensor, temperature: float = 1.0, noise: bool = True, random: torch.Generator | None = None
) -> Decision:
    """A gate's decision in training, see `gumbel_choice`."""
    choice, soft = gumbel_choice(logits, temperature, noise, random)
    return Decision(logits, choice, soft)


def sparsification_targets(outputs: Tensor, labels: Tensor, hard: str = "widest") -> Tensor:
    """The width that each image should take: the narrowest if it is right, else the widest.

    Shape: (K, N, classes) and (N,) -> (N,), positions among the K widths. Only the ends of the sandwich are looked at.

    Args:
        outputs: What each width gives, narrowest first.
        labels: Right classes.
        hard: Where images belong that the widest gets wrong, too: "widest" (try the best) or "narrowest" (give up).

    Source: Li et al., section 3.3, "sandwich gate sparsification".
    """
    check_choice("hard", hard, HARD)
    easy = outputs[0].argmax(1) == labels
    if hard == "narrowest":
        easy = easy | (outputs[-1].argmax(1) != labels)
    return torch.where(easy, 0, len(outputs) - 1)


def width_losses(outputs: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of each width on each image: (K, N, classes) and (N,) -> (N, K)."""
    return torch.stack([F.cross_entropy(output, labels, reduction="none") for output in outputs], 1)


def value_loss(logits: Tensor, losses: Tensor) -> Tensor:
    """Squared distance of the logits from the losses' opposites, each less its mean over the widths.

    It is least where the logits are, up to a number that all widths of an image share, what can be expected of each. `decide`
    adds what multiply-accumulates cost, so its choice is the best that the features allow, at every cost and so at every budget.

    Shape: twice (N, K) -> a scalar.

    Args:
        logits: What the gate says, before noise.
        losses: From `width_losses`.
    """
    distance = logits + losses
    return (distance - distance.mean(1, keepdim=True)).square().sum(1).mean()


def sparsification_loss(logits: Tensor, targets: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """Cross-entropy between what the gate says, before noise, and the targets: one softmax."""
    return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)


def original_sparsification_loss(soft: Tensor, targets: Tensor, label_smoothing: float = 0.1) -> Tensor:
    """As the authors have it: probabilities taken for logits, so that the softmax is taken twice. Its least value is above 0."""
    return F.cross_entropy(soft, targets, label_smoothing=label_smoothing)


def mean_macs(choice: Tensor, macs: Tensor) -> Tensor:
    """What the images of a batch spend on average, with the choices' gradient: each choice costs what it really costs."""
    return (choice @ macs.to(choice)).mean()


def budget_loss(choice: Tensor, macs: Tensor, budget: float) -> Tensor:
    """Squared relative distance of what is spent from what should be."""
    return (mean_macs(choice, macs) / budget - 1) ** 2


def original_macs_loss(choice: Tensor, macs: Tensor) -> Tensor:
    """As the authors have it: half the squared mean in billions, which no budget enters."""
    return 0.5 * (mean_macs(choice, macs) / 1e9) ** 2
