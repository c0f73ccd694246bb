"""What was done to a network, kept on it as a list of JSON-ready steps so that `load` can replay them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

HISTORY = "thriftnet_history"  # attribute of a network


def record(model: nn.Module, step: dict[str, Any]) -> None:
    """Note in the network what was done to it."""
    setattr(model, HISTORY, [*history(model), step])


def history(model: nn.Module) -> list[dict[str, Any]]:
    """What was done to the network since it was a plain one, oldest first; JSON-ready."""
    return list(getattr(model, HISTORY, []))
