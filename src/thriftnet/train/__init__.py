"""Training: recipes, the loop, and evaluation. The names below load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PLACES = {
    "Recipe": "thriftnet.train.recipe",
    "TrainResult": "thriftnet.train.trainer",
    "list_recipes": "thriftnet.train.recipe",
    "load_recipe": "thriftnet.train.recipe",
    "train": "thriftnet.train.trainer",
}

__all__ = ["Recipe", "TrainResult", "list_recipes", "load_recipe", "train"]

if TYPE_CHECKING:
    from thriftnet.train.recipe import Recipe, list_recipes, load_recipe
    from thriftnet.train.trainer import TrainResult, train


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'thriftnet.train' has no attribute {name!r}")
