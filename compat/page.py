"""Results as text, and as a part of docs/compatibility.md."""

from __future__ import annotations

import datetime
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from faults.page import write_between

from compat import networks, odd
from compat.cell import MEANING, VERDICTS, Cell
from compat.runner import Configs
from thriftnet import __version__
from thriftnet.core.spec import format_spec
from thriftnet.text import table

BEGIN, END = "<!-- cells: written by `make compat` -->", "<!-- end of the cells -->"
SHOWN = 4  # networks named beside a reason


def summary(cells: Sequence[Cell], configs: Configs) -> str:
    """The first table, and what should not be, as text."""
    lines = [table(HEAD, _rows(cells, configs)), "", reasons_text(cells)]
    return "\n".join(lines)


HEAD = ["technique", "cells", *VERDICTS, "exact of those with a meaning", "median saved"]


def _rows(cells: Sequence[Cell], configs: Configs) -> list[list[str]]:
    rows = []
    for config in [*map(format_spec, configs.values()), None]:
        mine = [cell for cell in cells if config in (None, cell.technique)]
        if not mine:
            continue
        counts = [sum(cell.verdict == verdict for cell in mine) for verdict in VERDICTS]
        meant = len(mine) - counts[VERDICTS.index("no meaning")]
        share = f"{100 * counts[0] / meant:.0f} %" if meant else "-"
        rows.append([config or "all", str(len(mine)), *map(str, counts), share, _saved(mine)])
    return rows


def _saved(cells: Iterable[Cell]) -> str:
    saved = [1 - cell.after / cell.before for cell in cells if cell.verdict == "exact" and cell.before]
    return f"{100 * statistics.median(saved):.0f} %" if saved else "-"


def general(reason: str) -> str:
    """A message without the names and numbers of one network."""
    text = re.sub(r"(layer|parameter|select=)\s*r?'[^']*'", r"\1 '...'", reason.replace("\n", " "))
    text = re.sub(r"does not fit \w+", "does not fit ...", text)
    text = re.sub(r"^(\w+ )?(\w+) (cannot be copied|does not run|finds|runs on none)", r"\1... \3", text)
    return re.sub(r"\d+(?:\.\d+)?", "N", text)[:300]


def grouped(cells: Iterable[Cell]) -> list[tuple[str, str, str, list[Cell]]]:
    """(verdict, technique, reason, cells) of everything that is not exact, the most frequent first."""
    found: dict[tuple[str, str, str], list[Cell]] = defaultdict(list)
    for cell in cells:
        if cell.verdict != "exact":
            found[cell.verdict, cell.technique.partition("(")[0], general(cell.reason)].append(cell)
    order = sorted(found.items(), key=lambda item: (-VERDICTS.index(item[0][0]), item[0][1], -len(item[1])))
    return [(*key, members) for key, members in order]


def reasons_text(cells: Sequence[Cell]) -> str:
    rows = [
        [verdict, technique, len(members), members[0].reason[:200], _names(members)]
        for verdict, technique, _, members in grouped(cells)
    ]
    return table(["verdict", "technique", "cells", "reason of the first", "networks"], rows) if rows else ""


def _names(members: Sequence[Cell]) -> str:
    more = f" and {len(members) - SHOWN} more" if len(members) > SHOWN else ""
    return ", ".join(cell.network for cell in members[:SHOWN]) + more


# -- the page


def write_page(page: Path, done: Mapping[tuple[str, str], Cell], configs: Configs) -> None:
    """Put the results between the markers of a page."""
    write_between(page, BEGIN, _results(done, configs), END)


def _results(done: Mapping[tuple[str, str], Cell], configs: Configs) -> str:
    families = [sample.name for sample in networks.samples()]
    odds = {sample.name: sample.about for sample in odd.samples()}
    versions = f"torch {torch.__version__}, timm {_version('timm')}, torchvision {_version('torchvision')}"
    of_families = [cell for cell in done.values() if cell.network not in odds]
    of_odds = [cell for cell in done.values() if cell.network in odds]
    seconds = sum(cell.seconds for cell in done.values())
    lines = [
        f"Measured on {datetime.date.today()} in {seconds / 60:.0f} minutes of one core by `make compat`: "
        f"thriftnet {__version__}, {versions}.",
        "",
        f"### {len(families)} networks of timm and torchvision",
        "",
        *_table(HEAD, _rows(of_families, configs)),
        "",
        f"### {len(odds)} odd modules",
        "",
        *_table(HEAD, _rows(of_odds, configs)),
        "",
        *(f"* **{verdict}**: {MEANING[verdict]}." for verdict in VERDICTS),
    ]
    for title, verdicts in (
        ("What should not be", VERDICTS[3:]),
        ("Refusals", ("refused",)),
        ("No meaning", ("no meaning",)),
    ):
        rows = [
            [technique, str(len(members)), members[0].reason.replace("\n", " "), _names(members)]
            for verdict, technique, _, members in grouped(done.values())
            if verdict in verdicts
        ]
        if rows:
            lines += ["", f"### {title}", "", *_table(["technique", "cells", "reason (of the first)", "networks"], rows)]
    names = [config.partition("(")[0] for config in map(format_spec, configs.values())]
    for title, listed in (("Every network", families), ("Every odd module", [*odds])):
        rows = [
            [
                name,
                *([odds[name]] if name in odds else []),
                *(_cell(done.get((name, format_spec(c)))) for c in configs.values()),
            ]
            for name in listed
        ]
        head = ["network", *(["what is odd"] if title != "Every network" else []), *names]
        lines += ["", f"### {title}", "", "Exact cells show the parameters saved.", "", *_table(head, rows)]
    return "\n".join(lines) + "\n"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"{100 - 100 * cell.after / max(1, cell.before):.0f} %" if cell.verdict == "exact" else cell.verdict


def _version(package: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(package)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    clean = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *clean)]
