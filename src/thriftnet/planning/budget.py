"""A limit on what a network stores or computes, as it is given: ``params=0.5``, ``macs="300M"``, ``bytes="1MB"``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated

from thriftnet.arguments import Operations, shown
from thriftnet.errors import ConfigError
from thriftnet.text import short_count

Limit = Annotated[Operations | str | None, "a share of what the network has, as 0.5, or a number, as '300K'"]
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 2.0**10, "mi": 2.0**20, "gi": 2.0**30}
MEASURES = {"params": "parameters", "macs": "MACs", "bytes": "bytes"}


@dataclass(frozen=True)
class Budget:
    """At most this much.

    Args:
        measure: "params", "macs" or "bytes" (of all parameters and buffers as they are saved).
        limit: The number.
    """

    measure: str
    limit: float

    def __str__(self) -> str:
        return f"{short_count(self.limit)} {MEASURES[self.measure]}"


def read_budget(whole: dict[str, int], **given: float | str | None) -> Budget | None:
    """The one budget among ``params``, ``macs`` and ``bytes``; None if none is given.

    Args:
        whole: What the network has of each measure now.
        **given: A share of that in (0, 1), or an absolute number, which may be text with a unit: "300K", "1.5M", "1MB".

    Raises:
        ConfigError: Two budgets, or one that is no positive number.
    """
    asked = {name: value for name, value in given.items() if value is not None}
    if not asked:
        return None
    if len(asked) > 1:
        raise ConfigError(
            f"{' and '.join(f'{name}={shown(value)}' for name, value in asked.items())}: give one budget at a time"
        )
    ((name, value),) = asked.items()
    number = _number(value)
    if number is None or not (0 < number < math.inf):
        raise ConfigError(f"{name}={shown(value)}: expected a share of what the network has, as 0.5, or a number, as '300K'")
    share = number < 1 and (not isinstance(value, str) or re.fullmatch(r"[\d.]+", value.strip()) is not None)
    return Budget(name, number * whole[name] if share else number)


def _number(value: object) -> float | None:
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmg]i?|)b?\s*", value, re.IGNORECASE) if isinstance(value, str) else None
    return float(match[1]) * UNITS[match[2].lower()] if match and len(match[1]) < 20 else None
