"""``python -m faults [FIGURE ...] [--quick | --long] [--seed N] [--json] [--page FILE]``."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch

from faults import calls, commands, datasets, disk, flips, hostile, kills, mutants, signals, trainings, writers
from faults.figure import SHOWN, Figure, Length
from faults.page import facts, write_page
from thriftnet.text import table

FIGURES: dict[str, Callable[[Path, int, Length], Figure]] = {
    "kills": kills.measure,
    "disk": disk.measure,
    "flips": flips.measure,
    "mutants": mutants.measure,
    "hostile": hostile.measure,
    "writers": writers.measure,
    "trainings": trainings.measure,
    "datasets": datasets.measure,
    "calls": calls.measure,
    "commands": commands.measure,
    "signals": signals.measure,
    "disk-trainings": disk.measure_trainings,
}


def main(argv: list[str] | None = None) -> int:
    """Measure and print; returns 1 if anything happened that should not."""
    options = parse(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    figures = {}
    for name in options.figure or FIGURES:
        with tempfile.TemporaryDirectory(prefix="thriftnet-faults-") as folder:
            start = time.perf_counter()
            figures[name] = FIGURES[name](Path(folder).resolve(), options.seed, options.length)
            figures[name].seconds = round(time.perf_counter() - start, 1)
        if not options.json:
            print(text(figures[name]), flush=True)
    if options.json:
        print(json.dumps({**facts(options.seed), "figures": {name: asdict(figure) for name, figure in figures.items()}}))
    if options.page:
        write_page(Path(options.page), figures, options.seed, options.length)
    return int(any(figure.failures for figure in figures.values()))


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m faults", description="Measure how thriftnet bears what goes wrong.")
    parser.add_argument("figure", nargs="*", metavar="FIGURE", help=f"which ones: {', '.join(FIGURES)} (default: all)")
    lengths = parser.add_mutually_exclusive_group()
    for length, text in (("quick", "a small part of each, for the test suite"), ("long", "more of each, in hours")):
        value = Length[length.upper()]
        lengths.add_argument(
            f"--{length}", dest="length", action="store_const", const=value, default=Length.USUAL, help=text
        )
    parser.add_argument("--seed", type=int, default=0, help="of kills' moments, mutations and times")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--page", metavar="FILE", help="write the results between the markers of this page")
    options = parser.parse_args(argv)
    if unknown := [name for name in options.figure if name not in FIGURES]:
        parser.error(f"unknown figure {', '.join(unknown)}: possible are {', '.join(FIGURES)}")
    if options.page and (options.length is Length.QUICK or options.figure):
        parser.error("--page takes the whole measurement: leave out --quick and FIGURE")
    return options


def text(figure: Figure) -> str:
    """A figure as it is printed."""
    verdict = f"{len(figure.failures)} FAILURES" if figure.failures else "nothing unexpected"
    lines = [f"{figure.title}: {verdict} ({figure.seconds:.0f} s)", "", table(figure.head, figure.rows), *figure.notes]
    return "\n".join([*lines, *(f"FAILURE {failure}" for failure in figure.failures[:SHOWN]), ""])


if __name__ == "__main__":
    sys.exit(main())
