"""`thriftnet recipes`: the recipes shipped with the package."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import Parser, emit, parse
from thriftnet.errors import ConfigError
from thriftnet.text import table

if TYPE_CHECKING:
    from thriftnet.train.recipe import Recipe

COLUMNS = ("recipe", "model", "data", "epochs", "published top-1 %", "what")
HEADS = ("recipe", "model", "data", "epochs", "params", "published top-1 %")


def run(arguments: Sequence[str]) -> None:
    parser = Parser("recipes", "List the training recipes, or show one.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="show all fields of this one")
    parser.add_argument("--markdown", action="store_true", help="print the page docs/recipes.md")
    options = parse(parser, arguments)

    from thriftnet.train.recipe import list_recipes, load_recipe

    if options.name and options.markdown:
        raise ConfigError(f"--markdown prints the page of all recipes: leave {options.name!r} or --markdown out")
    if options.name:
        _show(load_recipe(options.name), as_json=options.json)
        return
    recipes = {name: load_recipe(name) for name in list_recipes()}
    result = {name: {"model": recipe.model, "epochs": recipe.epochs, **recipe.about} for name, recipe in recipes.items()}
    emit(markdown(recipes) if options.markdown else _page(recipes), {"recipes": result}, as_json=options.json)


def _show(recipe: Recipe, *, as_json: bool) -> None:
    """All fields of one recipe."""
    import yaml

    plain = json.loads(json.dumps(recipe.to_dict()))  # YAML has no tuples
    emit(yaml.safe_dump(plain, sort_keys=False, width=120).rstrip(), plain, as_json=as_json)


def _page(recipes: Mapping[str, Recipe]) -> str:
    facts = [(name, recipe, recipe.about) for name, recipe in recipes.items()]
    rows = [(name, recipe.model, about["data"], recipe.epochs, _top1(about), about["what"]) for name, recipe, about in facts]
    return table(COLUMNS, rows)


def markdown(recipes: Mapping[str, Recipe]) -> str:
    """The page of the documentation: a table of all recipes, then a section for each."""
    lines = [
        "# Recipes",
        "",
        "The recipes shipped with the package. `thriftnet train --recipe NAME --data D --output DIR` runs one, `thriftnet recipes NAME`",
        "prints its fields, each of which can be replaced ([training](training.md)). This page is what `thriftnet recipes --markdown`",
        "prints.",
        "",
        "Top-1 accuracies are the authors', in percent on the data named; they have not been reproduced with this code. An accuracy in the",
        "tables below belongs to the options beside it.",
        "",
        f"| {' | '.join(HEADS)} |",
        "|---|---|---|--:|--:|--:|",
    ]
    for name, recipe in recipes.items():
        about = recipe.about
        link, model = f"[`{name}`](#{name})", f"`{recipe.model}`"
        cells = (link, model, about["data"], f"{recipe.epochs}", f"{about['params']:,}", _top1(about))
        lines.append(f"| {' | '.join(cells)} |")
    for name, recipe in recipes.items():
        lines += _section(name, recipe)
    return "\n".join(lines)


def _section(name: str, recipe: Recipe) -> list[str]:
    """The section of one recipe."""
    about = recipe.about
    what = str(about["what"])
    lines = ["", f"## {name}", "", f"{what[0].upper()}{what[1:]}."]
    facts = {key: about[key] for key in ("paper", "table", "hardware", "time", "defects", "start", "note") if key in about}
    lines += ["", *(f"* {key}: {value}" for key, value in facts.items() if value != "none")]
    rows: list[dict[str, Any]] = about.get("rows", [])
    if rows:
        lines += ["", "| row | options | params | published top-1 % |", "|---|---|--:|--:|"]
        lines += [f"| {row['row']} | `{row['options']}` | {row['params']:,} | {_top1(row, 'top1')} |" for row in rows]
    return lines


def _top1(facts: Mapping[str, Any], key: str = "expected_top1") -> str:
    """An accuracy as text; "-" if none is stated."""
    value = facts.get(key)
    return f"{value:.2f}" if isinstance(value, float) else "-"
