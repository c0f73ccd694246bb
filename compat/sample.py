"""A network to be tried, and what it is fed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]  # arguments of the forward, by position and by name


@dataclass(frozen=True)
class Sample:
    """A network to be tried.

    Args:
        name: As it is listed.
        build: Makes it, with random weights, and says what it is fed.
        kind: Section of the page: "timm", "torchvision" or "odd".
        about: What is odd about it.
    """

    name: str
    build: Callable[[], tuple[nn.Module, Inputs]] = field(repr=False)
    kind: str = "odd"
    about: str = ""
