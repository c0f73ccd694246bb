"""`thriftnet recipes`: the recipes shipped with the package."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from thriftnet.cli.common import emit, new_parser, parse
from thriftnet.text import table

COLUMNS = ("recipe", "model", "data", "epochs", "published top-1 %", "what")


def run(arguments: Sequence[str]) -> None:
    parser = new_parser("recipes", "List the training recipes, or show one.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="show all fields of this one")
    options = parse(parser, arguments)

    import yaml

    from thriftnet.train.recipe import list_recipes, load_recipe

    if options.name:
        fields = load_recipe(options.name).to_dict()
        plain: dict[str, Any] = {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}
        emit(yaml.safe_dump(plain, sort_keys=False, width=120).rstrip(), plain, as_json=options.json)
        return
    recipes = {name: load_recipe(name) for name in list_recipes()}
    rows = [
        [
            name,
            recipe.model,
            recipe.about.get("data", "any"),
            recipe.epochs,
            recipe.about.get("expected_top1", "-"),
            recipe.about.get("what", ""),
        ]
        for name, recipe in recipes.items()
    ]
    result = {name: {"model": recipe.model, "epochs": recipe.epochs, **recipe.about} for name, recipe in recipes.items()}
    emit(table(COLUMNS, rows), {"recipes": result}, as_json=options.json)
