"""A layout: for each of the authors' keys, the place of that tensor in our network."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from thriftnet.core.tied import unique_tensors
from thriftnet.dynamic.gate import gates
from thriftnet.errors import CheckpointError

SHOWN = 5  # keys in a message


@dataclass(frozen=True)
class Slot:
    """A place in our state dict: a tensor's first name and, for stacked ones, which part of it."""

    key: str
    index: tuple[int, ...] = ()

    def of(self, ours: Mapping[str, Tensor]) -> Tensor:
        """The part of our tensors that it names."""
        return ours[self.key][self.index] if self.index else ours[self.key]


Layout: TypeAlias = Mapping[str, Slot]
Rules: TypeAlias = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]  # for re.sub, applied in this order


def rename(key: str, rules: Rules) -> str:
    """The key after all replacements."""
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def renamed(model: nn.Module, rules: Rules = ()) -> dict[str, Slot]:
    """The layout of authors whose tensors are ours under other names, into which the rules turn our keys."""
    own = ours_alone(model)
    return {rename(key, rules): Slot(key) for key in unique_tensors(model) if key not in own}


def ours_alone(model: nn.Module) -> set[str]:
    """Keys of tensors that no authors' network has: the costs of a gate's decisions."""
    return {f"{name}.cost" for name in gates(model)}


def check(model: nn.Module, theirs: Mapping[str, Tensor], layout: Layout) -> None:
    """Raise a `CheckpointError` unless every tensor has its place and every place its tensor; nothing is allocated.

    Shapes may differ by dimensions of size 1, as (T, 1, 1, 1, 1) coefficients do.
    """
    ours, own = unique_tensors(model), ours_alone(model)
    placed = Counter[str]()
    for slot in layout.values():
        placed[slot.key] += slot.of(ours).numel()
    missing = [key for key in layout if key not in theirs]
    missing += [key for key, tensor in ours.items() if placed[key] < tensor.numel() and key not in own]
    unexpected = [key for key in theirs if key not in layout]
    problems = [f"{what}: {_listed(keys)}" for what, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    wrong = []
    for key, tensor in theirs.items():
        if key in layout:
            target = layout[key].of(ours)
            if [side for side in tensor.shape if side != 1] != [side for side in target.shape if side != 1]:
                wrong.append(f"{key} has shape {tuple(tensor.shape)}, the network needs {tuple(target.shape)}")
            elif tensor.is_floating_point() != target.is_floating_point() or tensor.is_complex():
                wrong.append(f"{key} has dtype {tensor.dtype}, the network needs {target.dtype}")
    problems += wrong[:SHOWN] + ([f"{len(wrong) - SHOWN} more differ"] if len(wrong) > SHOWN else [])
    if problems:
        raise CheckpointError(f"the tensors do not fit the network that they show: {'; '.join(problems)}")


@torch.no_grad()
def fill(model: nn.Module, theirs: Mapping[str, Tensor], layout: Layout) -> None:
    """`check` the authors' tensors and copy them into our network; what a gate's decisions cost is ours alone, and starts at 0."""
    check(model, theirs, layout)
    ours = unique_tensors(model)
    for key in ours_alone(model):
        ours[key].zero_()
    for key, tensor in theirs.items():
        target = layout[key].of(ours)
        target.copy_(tensor.reshape(target.shape))


def read(ours: Mapping[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """Our tensors (values or gradients, by our keys) under the authors' keys."""
    return {key: slot.of(ours) for key, slot in layout.items() if slot.key in ours}


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f", ... ({len(keys)} in all)" if len(keys) > SHOWN else "")
