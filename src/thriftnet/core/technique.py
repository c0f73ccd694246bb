"""What a technique is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from thriftnet.core.sites import Replacement, Site


class Technique(Protocol):
    """A frozen, keyword-only dataclass with three methods. The verbs know nothing else of it.

    Two class attributes are looked at when present: ``takes``, a phrase for error messages that says which layers it
    accepts; and ``every_layer``, True for a technique that changes every layer with parameters or none. Fields
    ``input_size`` and ``example``, of one that runs the network, are filled with what `convert` is given. A method
    ``choices(sites)`` lets budgets choose its settings: see `thriftnet.planning.allocate.Adjustable`.
    """

    def accepts(self, module: nn.Module) -> bool:
        """Whether it can replace this layer."""
        ...

    def group(self, sites: Sequence[Site[Any]]) -> list[list[Site[Any]]]:
        """Which of the accepted layers belong together; layers in no group are left alone."""
        ...

    def build(self, group: Sequence[Site[Any]]) -> list[Replacement]:
        """New layers for one group, as (old, new) pairs, initialised from the old ones' weights.

        A pair may also wrap a module that is in no group, such as a container: its new module then holds the old one.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Example:
    """A config that the tests apply every law to; the demo trains the first one of each technique.

    The costs are worked out by hand for four convolutions (8 -> 8 channels, 3 x 3, with bias) on 8 x 8 maps. By default
    they are those of the plain layers.

    Args:
        config: The config.
        params: Stored parameters.
        macs: Executed multiply-accumulates.
        generation_macs: Multiply-accumulates of computing the weights.
    """

    config: Technique
    params: int = 4 * (8 * 8 * 9 + 8)
    macs: int = 4 * 64 * (8 * 8 * 9)
    generation_macs: int = 0


def takes(technique: Technique) -> str:
    """Which layers a technique accepts, for messages."""
    return str(getattr(technique, "takes", "layers that its accepts() allows"))


def requires_all_layers(technique: Technique) -> bool:
    """Whether a technique changes every layer with parameters or none."""
    return bool(getattr(technique, "every_layer", False))


def steps(least: int, most: int, count: int = 16) -> list[int]:
    """Integers from ``least`` to ``most``: all of them, or about ``count`` in equal ratios.

    Example:
        >>> steps(1, 5), steps(1, 1000, 4), steps(1, 0)
        ([1, 2, 3, 4, 5], [1, 10, 100, 1000], [])
    """
    if most - least < count:
        return list(range(least, most + 1))
    ratio = math.log(most / least) / (count - 1)
    return sorted({round(least * math.exp(ratio * step)) for step in range(count)})
