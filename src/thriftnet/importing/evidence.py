"""Reading an architecture from the names and shapes of stored tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from thriftnet.errors import CheckpointError
from thriftnet.importing.layout import Layout, Rules, rename
from thriftnet.models.table import MODELS

Colors: TypeAlias = tuple[float, float, float]


def normalisation(mean: Colors, std: Colors) -> dict[str, Any]:
    """Preprocessing that subtracts ``mean`` and divides by ``std``."""
    return {"normalisation": {"mean": list(mean), "std": list(std)}}


IMAGENET_COLORS = normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# 224 pixels cut from the centre of an image whose shorter side is 256
IMAGENET = IMAGENET_COLORS | {"crop_pct": 0.875, "eval_interpolation": "bilinear"}
IMAGENET_BICUBIC = IMAGENET | {"eval_interpolation": "bicubic"}
UNKNOWN: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Recognised:
    """A network of the zoo, and which stored tensors go where in it."""

    name: str
    kwargs: Mapping[str, Any]
    layout: Callable[[Any], Layout]  # of the network, once it is built
    tensors: Mapping[str, Tensor]  # each once, without those that the authors' network does not use
    notes: Sequence[str]  # what was left out or assumed, a sentence each
    preprocessing: Mapping[str, Any]  # how the authors prepare images in evaluation, as far as it is known
    absent: tuple[str, ...] = ()  # keys that the network needs and the file lacks: they start at zero
    adapt: Callable[[nn.Module], None] | None = None  # adds what the zoo's network lacks, which its name cannot rebuild


class Evidence:
    """What a file shows of its network, says of itself, and what the user says; one system's recogniser reads it and adds notes.

    Where a method finds what no network of the authors' has, it raises a `CheckpointError`.
    """

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
        self.tensors, self.metadata, self.hints = dict(tensors), metadata, hints
        self.notes: list[str] = []

    def has(self, *keys: str) -> bool:
        """Whether all of these tensors are there."""
        return all(key in self.tensors for key in keys)

    def shape(self, key: str, dims: int | None = None) -> tuple[int, ...]:
        """The shape of a tensor that must be there, with so many dimensions; None for any number above 0."""
        if key not in self.tensors:
            raise CheckpointError(f"{key} is missing")
        found = tuple(self.tensors[key].shape)
        if dims not in (None, len(found)) or not found or 0 in found:
            raise CheckpointError(f"{key} has shape {found}: expected {dims or 'some'} dimensions, none of size 0")
        return found

    def count(self, pattern: str) -> int:
        """How many parts of one kind the keys name, numbered from 0 without gaps; the pattern's group is the number."""
        matches = (re.match(pattern, key) for key in self.tensors)
        numbers = sorted({int(match[1]) for match in matches if match and len(match[1]) < 10})
        if numbers != list(range(len(numbers))):
            gap = next(number for number, found in enumerate(numbers) if number != found)
            raise CheckpointError(f"keys like {pattern.lstrip('^')} go up to {numbers[-1]}, but number {gap} is missing")
        return len(numbers)

    def counts(self, pattern: str, stages: Iterable[int]) -> tuple[int, ...]:
        """`count` in each of several stages; ``{}`` in the pattern is the stage."""
        return tuple(self.count(pattern.format(stage)) for stage in stages)

    def blocks_per_stage(self, pattern: str = r"^layer{}\.(\d+)\.") -> int:
        """The blocks in each of three stages, which must be equally many."""
        blocks = self.counts(pattern, (1, 2, 3))
        if len(set(blocks)) != 1:
            raise CheckpointError(f"its stages have {blocks} blocks: expected the same number in all three")
        return blocks[0]

    def classes_and_channels(self, head: str, stem: str) -> dict[str, Any]:
        """The arguments of every network: its classes, and the image's channels unless there are 3."""
        classes, channels = self.shape(head)[0], self.shape(stem, 4)[1]
        return {"num_classes": classes, **({} if channels == 3 else {"in_chans": channels})}

    def hint(self, name: str, stated: Any, default: Any) -> Any:
        """What tensors do not tell: from the user's hint, else what the file states, else the default; notes say which."""
        if name in self.hints:
            if stated is not None and stated != self.hints[name]:
                self.notes.append(f"The file states {name}={stated!r}; {name}={self.hints[name]!r} was taken, as asked.")
            return self.hints[name]
        if stated is None:
            self.notes.append(f"{name}={default!r} is assumed: the tensors do not tell it and the file does not state it.")
            return default
        return stated

    def deduplicate(self, rules: Rules) -> None:
        """Keep a shared tensor once, where the authors repeat it under the name of each user; the rules rename these."""
        first: dict[str, str] = {}
        for key, tensor in self.tensors.items():
            kept = first.setdefault(rename(key, rules), key)
            if not same(self.tensors[kept], tensor):
                raise CheckpointError(f"{kept} and {key} are one tensor in the authors' network, but they differ here")
        self.tensors = {name: self.tensors[key] for name, key in first.items()}

    def network(
        self,
        name: str,
        kwargs: Mapping[str, Any],
        layout: Callable[[Any], Layout],
        preprocessing: Mapping[str, Any] = UNKNOWN,
        **more: Any,
    ) -> Recognised:
        """The network that the tensors show."""
        return Recognised(name, kwargs, layout, self.tensors, self.notes, preprocessing, **more)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, which is quick when they share storage."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    stored_once = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    if stored_once and one.storage_offset() == other.storage_offset() and one.stride() == other.stride():
        return True
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=one.is_floating_point())


def simplest_ratio(low: float, high: float, fits: Callable[[float], bool], stated: object = None) -> float | None:
    """What the file states where it fits, else the number with the fewest decimals from ``low`` to ``high`` that fits."""
    if isinstance(stated, int | float) and not isinstance(stated, bool) and 0 < stated < 1e6 and fits(float(stated)):
        return float(stated)
    for digits in range(17):
        step: int = 10**digits
        first = ceil(low * step)
        for candidate in (float(first / step), float((first + 1) / step)):
            if 0 < candidate <= high and fits(candidate):
                return candidate
    return None


def in_zoo(name: str, what: str) -> str:
    """The name, if the zoo has it; else a `CheckpointError` lists what it has of this kind."""
    if name not in MODELS:
        like = [known for known in MODELS if re.sub(r"\d+", "", known) == re.sub(r"\d+", "", name)]
        raise CheckpointError(f"it is {what}, which the zoo does not have; of this kind it has {', '.join(sorted(like))}")
    return name
