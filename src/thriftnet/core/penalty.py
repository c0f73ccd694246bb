"""What techniques add to training: a term of the loss, and parameters without weight decay."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, cast

import torch
from torch import Tensor, nn

from thriftnet.arguments import Weight, checked
from thriftnet.core.module import ThriftyModule
from thriftnet.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class PenaltyTerm:
    """The penalty of one module.

    Args:
        total: Sum over its entries, a scalar.
        count: Number of entries, for averaging over all modules of the network.
        scale: The technique's own factor (``lambda_r``).
        family: Modules of one family are averaged together; families are added.
    """

    total: Tensor
    count: int
    scale: float
    family: str = ""


@checked
def penalty(model: nn.Module, *, scaled: bool = True) -> Tensor:
    """The term that the techniques in a network add to the loss, as their papers train: each shared part counts once.

    Args:
        model: Any network; the penalty is zero if no layer has one.
        scaled: Whether to multiply by the technique's own factor (``lambda_r``).

    Returns:
        A differentiable scalar.
    """
    holders = [module for module in _ours(model) if callable(getattr(module, "penalty_term", None))]
    terms: list[PenaltyTerm] = [cast(Any, module).penalty_term() for module in holders]
    counts: Counter[str] = Counter()
    for term in terms:
        counts[term.family] += term.count
    shares = [term.total * (term.scale if scaled else 1.0) / counts[term.family] for term in terms if counts[term.family]]
    if not shares:
        like = next(model.parameters(), torch.zeros(()))
        return torch.zeros((), device=like.device, dtype=like.dtype)
    return torch.stack(shares).sum()


@checked
def param_groups(model: nn.Module, weight_decay: Weight) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer: what a layer lists in ``no_decay`` gets no weight decay.

    Raises:
        ConfigError: A negative ``weight_decay``.
    """
    if not isinstance(weight_decay, int | float) or not 0 <= weight_decay < float("inf"):
        raise ConfigError(f"weight_decay={weight_decay!r}: expected a number >= 0")
    no_decay = {id(getattr(m, name)) for m in _ours(model) for name in getattr(m, "no_decay", ())}
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if id(p) not in no_decay], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in no_decay], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _ours(model: nn.Module) -> list[ThriftyModule]:
    return [module for module in model.modules() if isinstance(module, ThriftyModule)]
