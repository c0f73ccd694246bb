"""What a technique is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

from torch import nn

from thriftnet.core.sites import Replacement, Site


class Technique(Protocol):
    """A frozen, keyword-only dataclass with three methods. The verbs know nothing else of it.

    Two class attributes are looked at when present: ``takes``, a phrase for error messages that says which layers it
    accepts; and ``every_layer``, True for a technique that changes every layer with parameters or none. Likewise two methods:
    ``adapt(model)`` gives the config with what it leaves to the network filled in, and ``finish(model)`` adds to the
    converted network, in place, what stands for no layer.
    """

    def accepts(self, module: nn.Module) -> bool:
        """Whether it can replace this layer."""
        ...

    def group(self, sites: Sequence[Site[Any]]) -> list[list[Site[Any]]]:
        """Which of the accepted layers belong together; layers in no group are left alone."""
        ...

    def build(self, group: Sequence[Site[Any]]) -> list[Replacement]:
        """New layers for one group, as (old, new) pairs, started from the old ones' weights."""
        ...


def takes(technique: Technique) -> str:
    """Which layers a technique accepts, in words."""
    return str(getattr(technique, "takes", "layers that its accepts() allows"))


def is_whole(technique: Technique) -> bool:
    """Whether a technique changes every layer with parameters or none."""
    return bool(getattr(technique, "every_layer", False))


def adapted(technique: Technique, model: nn.Module) -> Technique:
    """The config with what it leaves to the network filled in."""
    adapt = getattr(technique, "adapt", None)
    return technique if adapt is None else cast(Technique, adapt(model))


def finish(technique: Technique, model: nn.Module) -> None:
    """Add to a converted network what stands for no layer."""
    add = getattr(technique, "finish", None)
    if add is not None:
        add(model)
