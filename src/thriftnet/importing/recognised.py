"""What the recognisers of all systems have in common: reading an architecture from the names and shapes of tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.importing.layout import Layout
from thriftnet.models.table import MODELS

Tensors: TypeAlias = Mapping[str, Tensor]
Colours: TypeAlias = tuple[tuple[float, float, float], tuple[float, float, float]]

IMAGENET: Colours = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class Recognised:
    """A network of the zoo, and which stored tensors go where in it.

    Args:
        name: The network's name in the zoo.
        kwargs: Its arguments.
        layout: Makes the layout of the network, once that is built.
        tensors: What is to be placed: each tensor once, without what the authors' network does not use.
        notes: What was left out or assumed, a sentence each.
        colours: Mean and standard deviation of the images that the authors trained on; None when not known.
        absent: Keys that the file lacks and the network needs: they start at zero.
        adapt: What the network needs beyond the zoo; one that has this is rebuilt by nobody else.
    """

    name: str
    kwargs: Mapping[str, Any]
    layout: Callable[[Any], Layout]
    tensors: Tensors
    notes: tuple[str, ...] = ()
    colours: Colours | None = None
    absent: tuple[str, ...] = ()
    adapt: Callable[[nn.Module], None] | None = None


def shape(tensors: Tensors, key: str, dims: int) -> tuple[int, ...]:
    """The shape of a stored tensor that must be there.

    Raises:
        CheckpointError: It is missing or has another number of dimensions.
    """
    if key not in tensors:
        raise CheckpointError(f"{key} is missing")
    found = tuple(tensors[key].shape)
    if len(found) != dims or 0 in found:
        raise CheckpointError(f"{key} has shape {found}: possible are {dims} dimensions, none of them 0")
    return found


def count(tensors: Tensors, pattern: str) -> int:
    """How many parts of one kind the keys name, numbered from 0 without gaps.

    Args:
        tensors: Stored tensors.
        pattern: Regular expression that matches the beginning of a key; its group is the number.

    Raises:
        CheckpointError: A number is left out.
    """
    compiled = re.compile(pattern)
    numbers = sorted({int(match[1]) for match in map(compiled.match, tensors) if match and len(match[1]) < 10})
    if numbers != list(range(len(numbers))):
        gap = next(number for number, found in enumerate(numbers) if number != found)
        raise CheckpointError(f"keys like {pattern.lstrip('^')} go up to {numbers[-1]}, but number {gap} is missing")
    return len(numbers)


def counts(tensors: Tensors, pattern: str, stages: range) -> tuple[int, ...]:
    """`count` in each of several stages; the pattern has ``{}`` for the stage."""
    return tuple(count(tensors, pattern.format(stage)) for stage in stages)


def deduplicate(tensors: Tensors, rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Each tensor under one key, where the authors repeat a shared one under the name of each of its users.

    Args:
        tensors: Stored tensors.
        rules: Regular expression of a repeated key, and the key that it repeats.

    Raises:
        CheckpointError: Two that are one tensor in the authors' network differ.
    """
    compiled = [(re.compile(pattern), key) for pattern, key in rules]
    kept: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    for key, tensor in tensors.items():
        name = key
        for pattern, replacement in compiled:
            match = pattern.fullmatch(key)
            if match:
                name = match.expand(replacement)
                break
        if name in kept and not same(kept[name], tensor):
            raise CheckpointError(f"{origin[name]} and {key} are one tensor in the authors' network, but they differ here")
        if name not in kept:
            kept[name], origin[name] = tensor, key
    return kept


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are equal, which is quick when they are stored once."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    stored_once = one.untyped_storage()._cdata == other.untyped_storage()._cdata
    if stored_once and one.storage_offset() == other.storage_offset() and one.stride() == other.stride():
        return True
    return torch.allclose(one, other, rtol=0, atol=0, equal_nan=one.is_floating_point())


def resolve_hint(name: str, stated: Any, hints: Mapping[str, Any], default: Any, notes: list[str]) -> Any:
    """What the tensors do not tell: from the user's hint, else from the file, else the default; notes say which.

    Args:
        name: What it is called, in hints too.
        stated: What the file says of itself, None for nothing.
        hints: The user's.
        default: Taken when nobody says anything.
        notes: Added to.
    """
    if name in hints:
        if stated is not None and stated != hints[name]:
            notes.append(f"The file states {name}={stated!r}; {name}={hints[name]!r} was taken, as asked.")
        return hints[name]
    if stated is not None:
        return stated
    notes.append(f"{name}={default!r} is assumed: the tensors do not tell it and the file does not state it.")
    return default


def simplest_ratio(low: float, high: float, fits: Callable[[float], bool], stated: object = None) -> float | None:
    """The number with the fewest decimals from ``low`` to ``high`` that fits; what the file states where it fits, too."""
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
    """The name, when the zoo has it.

    Raises:
        CheckpointError: It has not, with what it has of this kind.
    """
    if name not in MODELS:
        like = [known for known in MODELS if re.sub(r"\d+", "", known) == re.sub(r"\d+", "", name)]
        raise CheckpointError(f"it is {what}, which the zoo does not have; of this kind it has {', '.join(sorted(like))}")
    return name


def shared_arguments(classes: int, channels: int) -> dict[str, Any]:
    """The arguments of every network: classes, and the image's channels where they are not 3."""
    return {"num_classes": classes, **({} if channels == 3 else {"in_chans": channels})}


def positive_int(name: str, value: object) -> int:
    """A hint that must be a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r}: possible is a whole number of at least 1")
    return value
