"""What a technique is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from thriftnet.core.sites import Replacement, Site


class Technique(Protocol):
    """A frozen, keyword-only dataclass with three methods. The verbs know nothing else of it.

    Two class attributes are looked at when present: ``takes``, a phrase for error messages that says which layers it
    accepts; and ``every_layer``, True for a technique that changes every layer with parameters or none.
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


def takes(technique: Technique) -> str:
    """Which layers a technique accepts, in words."""
    return str(getattr(technique, "takes", "layers that its accepts() allows"))


def is_whole(technique: Technique) -> bool:
    """Whether a technique changes every layer with parameters or none."""
    return bool(getattr(technique, "every_layer", False))
