"""Training: recipes, the loop, and evaluation. The names below load on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__all__ = ["Recipe", "TrainResult", "list_recipes", "load_recipe", "train"]

if TYPE_CHECKING:
    from thriftnet.train.recipe import Recipe, list_recipes, load_recipe
    from thriftnet.train.trainer import TrainResult, train


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'thriftnet.train' has no attribute {name!r}")
    module = "trainer" if name in ("TrainResult", "train") else "recipe"
    return getattr(importlib.import_module(f"thriftnet.train.{module}"), name)
