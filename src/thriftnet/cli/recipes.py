"""`thriftnet recipes`: the recipes shipped with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import Parser, parse
from thriftnet.cli.output import emit
from thriftnet.text import table

if TYPE_CHECKING:
    from thriftnet.train.recipe import Recipe

COLUMNS = ("recipe", "model", "data", "epochs", "published top-1 %", "what")


def run(arguments: Sequence[str]) -> None:
    parser = Parser("recipes", "List the training recipes, or show one.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="show all fields of this one")
    options = parse(parser, arguments)

    from thriftnet.train.recipe import list_recipes, load_recipe

    if options.name:
        _show(load_recipe(options.name), as_json=options.json)
        return
    recipes = {name: load_recipe(name) for name in list_recipes()}
    result = {name: {"model": recipe.model, "epochs": recipe.epochs, **recipe.about} for name, recipe in recipes.items()}
    emit(_page(recipes), {"recipes": result}, as_json=options.json)


def _show(recipe: Recipe, *, as_json: bool) -> None:
    """All fields of one recipe."""
    import yaml

    plain = json.loads(json.dumps(recipe.to_dict()))  # YAML has no tuples
    emit(yaml.safe_dump(plain, sort_keys=False, width=120).rstrip(), plain, as_json=as_json)


def _page(recipes: Mapping[str, Recipe]) -> str:
    facts = [(name, recipe, recipe.about) for name, recipe in recipes.items()]
    rows = [
        (name, recipe.model, about["data"], recipe.epochs, published_top1(about), about["what"])
        for name, recipe, about in facts
    ]
    return table(COLUMNS, rows)


def published_top1(facts: Mapping[str, Any], key: str = "expected_top1") -> str:
    """An accuracy as text; "-" if none is stated."""
    value = facts.get(key)
    return f"{value:.2f}" if isinstance(value, float) else "-"
