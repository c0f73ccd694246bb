"""Results as a part of docs/reliability.md."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thriftnet import __version__

if TYPE_CHECKING:
    from faults.figure import Figure, Length

BEGIN, END = "<!-- figures: written by `make faults` -->", "<!-- end of the figures -->"
PACKAGES = ("torch", "safetensors", "hypothesis", "atheris", "accelerate")


def facts(seed: int) -> dict[str, Any]:
    """When, with what and on what class of machine."""
    versions = {"thriftnet": __version__, "Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = f"{platform.system()} on {platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB of memory"
    return {"date": str(datetime.date.today()), "seed": seed, "machine": machine, "versions": versions}


def write_page(page: Path, figures: dict[str, Figure], seed: int, length: Length) -> None:
    """Put the results between the markers of a page."""
    write_between(page, BEGIN, _results(figures, seed, length), END)


def write_between(page: Path, begins: str, text: str, ends: str) -> None:
    """Put text between two markers of a page, whose other text stays.

    Raises:
        ValueError: The page lacks the markers.
    """
    head, begin, rest = page.read_text(encoding="utf-8").partition(begins)
    _, end, tail = rest.partition(ends)
    if not (begin and end):
        raise ValueError(f"{page} lacks the lines {begins!r} and {ends!r}")
    page.write_text(f"{head}{begins}\n\n{text}\n{ends}{tail}", encoding="utf-8")


def _results(figures: dict[str, Figure], seed: int, length: Length) -> str:
    known = facts(seed)
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    command = length.pick("", "make faults", 'make faults ARGS="--long"')
    seconds = sum(figure.seconds for figure in figures.values())
    failures = sum(len(figure.failures) for figure in figures.values())
    lines = [
        f"Measured on {known['date']} in {seconds:.0f} s by `{command}` with seed {seed}: {known['machine']}; {versions}.",
        "",
        f"**{failures or 'No'} failure{'' if failures == 1 else 's'} in all.**",
    ]
    for figure in figures.values():
        lines += ["", f"### {figure.title}", "", *_table(figure), *(f"\n{note}" for note in figure.notes)]
        lines += [f"\nFailure: {failure}" for failure in figure.failures]
    return "\n".join(lines) + "\n"


def _table(figure: Figure) -> list[str]:
    numeric = [all(isinstance(row[index], int | float) for row in figure.rows) for index in range(len(figure.head))]
    rules = ["---:" if number else "---" for number in numeric]
    rows = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row] for row in figure.rows]
    return ["| " + " | ".join(cells) + " |" for cells in (figure.head, rules, *rows)]
