"""`python -m benchmarks`: time every technique against its floor, and against the targets of the project."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from benchmarks import TOPICS, cases
from benchmarks.measuring import Case, Settings, measure
from benchmarks.report import Results, conditions, floors, picture
from thriftnet.cli.machine import use_machine
from thriftnet.cli.options import MACHINE_OPTIONS
from thriftnet.text import table

DESCRIPTION = (
    "Time every technique against its floor and against what one would write without it. Variants are first checked to compute "
    "the same, then timed in rounds, in random order. Trust the ratios: absolute times depend on the machine."
)
COLUMNS = ("case", "ratio", "value", "quartiles", "target", "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns 1 if ``--check`` finds a missed target, else 0."""
    options = parse(arguments)
    results = measured(options.topics or list(TOPICS), options)
    for path, draw in ((options.svg, picture), (options.floors, floors)):
        if path:
            Path(path).write_text(draw(results), encoding="utf-8")
    sys.stdout.write((json.dumps(results.to_dict()) if options.json else as_text(results)) + "\n")
    return 1 if options.check and results.missed() else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=DESCRIPTION)
    add = parser.add_argument
    add("topics", metavar="TOPIC", nargs="*", help=f"default: all of {', '.join(TOPICS)}")
    add("--quick", action="store_true", help="small sizes, three rounds: shows that everything runs, proves nothing")
    add("--check", action="store_true", help="exit with 1 if a target is missed")
    add("--sweep", action="store_true", help="time against size instead of targets, for --svg")
    add("--svg", metavar="FILE", help="draw the ratios beside their targets, or the sweep")
    add("--floors", metavar="FILE", help="draw each case as multiples of its floor, an SVG")
    add("--json", action="store_true", help="print the results as JSON")
    for name, how in MACHINE_OPTIONS.items():
        add(name, **how)
    options = parser.parse_args(arguments)
    unknown = set(options.topics) - set(TOPICS)
    if unknown:
        parser.error(f"unknown topic {min(unknown)!r}: expected {', '.join(TOPICS)}")
    return options


def measured(topics: Sequence[str], options: argparse.Namespace) -> Results:
    """Everything that the topics measure; several run in a process each, since what one leaves in memory changes the next."""
    memory = use_machine(options, batch_size=1)
    torch.manual_seed(0)
    settings = Settings(quick=options.quick, sweep=options.sweep)
    results = Results(conditions(memory, options.quick), fast_malloc=options.fast_malloc)
    if len(topics) > 1:
        by_name = importlib.import_module(
            "benchmarks.__main__"
        ).measured  # `-m` calls this module __main__, which a child cannot import
        for topic in topics:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                found = process.submit(by_name, [topic], options).result()
            results.measured += found.measured
            results.facts += found.facts
        return results
    for item in cases(topics[0], settings):
        if isinstance(item, Case):
            results.measured.append(measure(item, settings))
        else:
            results.facts.append(item)
    return results


def as_text(results: Results) -> str:
    """Times, then ratios with their targets."""
    lines = ["  ".join(f"{key}: {value}" for key, value in results.conditions.items()), ""]
    for measured in results.measured:
        lines.append(f"{measured.topic}: {measured.name}")
        rows = [[name, spread.median, f"{spread.low:.3g} to {spread.high:.3g}"] for name, spread in measured.ms.items()]
        lines += ["  " + line for line in table(["variant", "ms", "quartiles"], rows).splitlines()]
        lines.append("")
    rows = [[row.case, row.what, f"{row.value:.3g}", row.quartiles, row.bound, row.verdict] for row in results.rows()]
    return "\n".join([*lines, table(list(COLUMNS), rows)])


if __name__ == "__main__":
    sys.exit(main())
