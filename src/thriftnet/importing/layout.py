"""A layout: for each of the authors' keys, the place of that tensor in our network."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from thriftnet.core.tied import unique_tensors
from thriftnet.dynamic.gate import gates
from thriftnet.errors import CheckpointError


@dataclass(frozen=True)
class Slot:
    """A place in our state dict.

    Args:
        key: Our key, under the tensor's first name.
        index: Which part of our tensor, as for stacked ones; () for all of it.
    """

    key: str
    index: tuple[int, ...] = ()


Layout: TypeAlias = Mapping[str, Slot]


def renamed(model: nn.Module, rules: Sequence[tuple[str, str]]) -> dict[str, Slot]:
    """The layout of authors whose tensors are ours under other names.

    Args:
        model: Our network.
        rules: Regular expression and replacement, applied in this order to each of our keys.
    """
    layout = {}
    for ours in unique_tensors(model):
        theirs = ours
        for pattern, replacement in rules:
            theirs = re.sub(pattern, replacement, theirs)
        layout[theirs] = Slot(ours)
    return layout


def ours_alone(model: nn.Module) -> set[str]:
    """Keys of tensors that no authors' network has: what decisions cost."""
    return {f"{name}.cost" for name in gates(model)}


@torch.no_grad()
def fill(model: nn.Module, theirs: Mapping[str, Tensor], layout: Layout) -> None:
    """Put the authors' tensors into our network; every tensor of ours must be given, and every one of theirs placed.

    Tensors are reshaped where only the shape's form differs (as (T, 1, 1, 1, 1) coefficients).

    Raises:
        CheckpointError: A tensor is missing, unexpected, or of another size.
    """
    ours = unique_tensors(model)
    unplaced = sorted(set(theirs) - set(layout))
    if unplaced:
        raise CheckpointError(f"unexpected keys: {', '.join(unplaced[:5])}{' ...' if len(unplaced) > 5 else ''}")
    filled: dict[str, int] = {}
    for key, value in theirs.items():
        slot = layout[key]
        if slot.key not in ours:
            raise CheckpointError(f"{key} belongs to {slot.key}, which {type(model).__name__} does not have")
        target = ours[slot.key][slot.index] if slot.index else ours[slot.key]
        if target.numel() != value.numel():
            raise CheckpointError(f"{key} has shape {tuple(value.shape)}, {slot.key} needs {tuple(target.shape)}")
        target.copy_(value.reshape(target.shape))
        filled[slot.key] = filled.get(slot.key, 0) + target.numel()
    for gate in gates(model).values():
        gate.cost.zero_()  # ours alone
    own = ours_alone(model)
    missing = [key for key, tensor in ours.items() if key not in own and filled.get(key, 0) < tensor.numel()]
    if missing:
        raise CheckpointError(f"missing: nothing was given for {', '.join(missing[:5])}{' ...' if len(missing) > 5 else ''}")


def read(ours: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our tensors (values or gradients, by our keys) under the authors' keys."""
    return {
        key: ours[slot.key][slot.index] if slot.index else ours[slot.key] for key, slot in layout.items() if slot.key in ours
    }
