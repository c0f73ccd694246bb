"""The five techniques, and the verbs that take them as configs, text or JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import nn

from thriftnet.core import convert as conversion
from thriftnet.core import spec
from thriftnet.core.plan import Plan
from thriftnet.core.sites import Select
from thriftnet.core.technique import Technique
from thriftnet.errors import ConfigError
from thriftnet.techniques.filter_basis import FilterBasis
from thriftnet.techniques.shift import Shift
from thriftnet.techniques.slimmable import Slimmable
from thriftnet.techniques.soft_sharing import SoftSharing
from thriftnet.techniques.weight_sharing import WeightSharing

TECHNIQUES: dict[str, type[Technique]] = {
    "weight-sharing": WeightSharing,
    "soft-sharing": SoftSharing,
    "filter-basis": FilterBasis,
    "shift": Shift,
    "slimmable": Slimmable,
}

TechniqueLike: TypeAlias = Technique | str | Mapping[str, Any]


def resolve(technique: TechniqueLike) -> Technique:
    """A technique's config from its text (``soft-sharing(templates=4)``) or JSON form; a config comes back as it is.

    Raises:
        ConfigError: Unknown technique or field, with close matches, or a value it refuses.
    """
    if isinstance(technique, str):
        return spec.parse_spec(technique, TECHNIQUES)
    if isinstance(technique, Mapping):
        return spec.from_dict(technique, TECHNIQUES)
    if isinstance(technique, type):
        raise ConfigError(f"{technique.__name__} is a class: write {technique.__name__}() for its config")
    if not all(callable(getattr(technique, method, None)) for method in ("accepts", "group", "build")):
        raise ConfigError(
            f"a technique is a config or its text, got {technique!r}. Possible: {', '.join(sorted(TECHNIQUES))}"
        )
    return technique


def plan(model: nn.Module, technique: TechniqueLike, *, select: Select | None = None) -> Plan:
    return conversion.plan(model, resolve(technique), select=select)


def convert(
    model: nn.Module, technique: TechniqueLike | Plan, *, select: Select | None = None, inplace: bool = False
) -> nn.Module:
    if isinstance(technique, Plan):
        resolved: Technique | Plan = dataclasses.replace(technique, technique=resolve(technique.technique))
    else:
        resolved = resolve(technique)
    return conversion.convert(model, resolved, select=select, inplace=inplace)


plan.__doc__ = conversion.plan.__doc__
convert.__doc__ = conversion.convert.__doc__
