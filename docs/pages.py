"""Write the pages that follow from the package's tables: `python docs/pages.py`. A test compares them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from thriftnet.cli.coming_from import options_of_projects
from thriftnet.cli.models import FIGURES, PLAIN, in_order, numbered_notes, zoo_row
from thriftnet.cli.recipes import published_top1
from thriftnet.models import MODELS
from thriftnet.train.recipe import Recipe, list_recipes, load_recipe

RECIPE_HEADS = ("recipe", "model", "data", "epochs", "params", "published top-1 %")


def zoo_page() -> str:
    """Networks, a table for each paper."""
    chosen = {name: MODELS[name] for name in sorted(MODELS, key=in_order)}
    numbers = numbered_notes(chosen)
    lines = [
        "# The zoo",
        "",
        "Every network of `create_model`, with its stored parameters and executed multiply-accumulates at the stated input size,",
        "beside what the authors published. `thriftnet models` prints the same.",
    ]
    for paper in dict.fromkeys(entry.paper for entry in chosen.values()):
        heads = ("name", "technique", "input", *FIGURES, "notes")
        lines += ["", f"## {paper}", "", f"| {' | '.join(heads)} |", "|---|---|---|--:|--:|--:|--:|---|---|"]
        for name, entry in chosen.items():
            if entry.paper == paper:
                row = zoo_row(name, entry, numbers)
                size = "x".join(map(str, entry.input_size))
                cells = (f"`{row[0]}`", row[1] or PLAIN, size, f"{row[2]:,}", f"{row[3]:,}", *row[4:7], row[8])
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, "", "## Notes", "", *(f"{number}. {note}" for note, number in numbers.items())])


def recipes_page() -> str:
    """A table of all recipes, then a section for each."""
    recipes = {name: load_recipe(name) for name in list_recipes()}
    lines = [
        "# Recipes",
        "",
        "The recipes shipped with the package. `thriftnet train --recipe NAME --data D --output DIR` runs one, `thriftnet recipes NAME`",
        "prints its fields, each of which can be replaced ([training](training.md)).",
        "",
        "Top-1 accuracies are the authors', in percent on the data named; they have not been reproduced with this code. An accuracy in the",
        "tables below belongs to the options beside it.",
        "",
        f"| {' | '.join(RECIPE_HEADS)} |",
        "|---|---|---|--:|--:|--:|",
    ]
    for name, recipe in recipes.items():
        about = recipe.about
        link, model = f"[`{name}`](#{name})", f"`{recipe.model}`"
        cells = (link, model, about["data"], f"{recipe.epochs}", f"{about['params']:,}", published_top1(about))
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
        lines += [
            f"| {row['row']} | `{row['options']}` | {row['params']:,} | {published_top1(row, 'top1')} |" for row in rows
        ]
    return lines


def coming_from_page(page: str, project: str) -> str:
    """The page as it is, with the table of the project's options at its end."""
    text = (Path(__file__).parent / page).read_text(encoding="utf-8").partition("## Options\n")[0]
    rows = (f"| `{theirs}` | {ours} |" for theirs, ours in options_of_projects()[project].items())
    return "\n".join([f"{text}## Options", "", "| theirs | here |", "|---|---|", *rows])


PROJECTS = {
    "spin": "SPIN",
    "soft-sharing": "soft-sharing",
    "ds-net": "DS-Net",
    "net-rl2": "Net_RL2",
    "shiftresnet": "ShiftResNet",
}
PAGES = {"zoo.md": zoo_page, "recipes.md": recipes_page}
PAGES |= {
    f"coming-from/{name}.md": partial(coming_from_page, f"coming-from/{name}.md", project)
    for name, project in PROJECTS.items()
}

if __name__ == "__main__":
    for name, page in PAGES.items():
        (Path(__file__).parent / name).write_text(page() + "\n", encoding="utf-8")
