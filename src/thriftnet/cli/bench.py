"""`thriftnet bench`: every technique against its floor, and against the targets of the project."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import TOPICS

from thriftnet.cli.common import add_machine_options, emit, new_parser, parse, use_machine
from thriftnet.errors import unknown_name
from thriftnet.text import table

if TYPE_CHECKING:
    from benchmarks.report import Results

DESCRIPTION = (
    "Time every technique against its floor and against what one would write without it. Forms are first checked to compute "
    "the same, then timed in an order drawn anew for every round. Trust the ratios: absolute times depend on the machine."
)
COLUMNS = ("case", "ratio", "value", "quartiles", "target", "")


def run(arguments: Sequence[str]) -> int:
    parser = new_parser("bench", DESCRIPTION)
    add = parser.add_argument
    add("topics", metavar="TOPIC", nargs="*", help=f"left out: all of {', '.join(TOPICS)}")
    add("--quick", action="store_true", help="small sizes, three rounds: shows that everything runs, proves nothing")
    add("--check", action="store_true", help="exit with 1 when a target is missed")
    add("--sweep", action="store_true", help="time against size instead of targets, for --svg")
    add_machine_options(parser)
    add("--svg", metavar="FILE", help="draw the ratios beside their targets, or the sweep")
    add("--floors", metavar="FILE", help="draw each case as multiples of its floor, an SVG")
    options = parse(parser, arguments)
    topics = options.topics or list(TOPICS)
    for topic in topics:
        if topic not in TOPICS:
            raise unknown_name("topic", topic, TOPICS)
    results = _measured(topics, options)
    _draw(results, options.svg, options.floors)
    emit(_text(results), results.to_dict(), as_json=options.json)
    return 1 if options.check and results.missed() else 0


def _measured(topics: Sequence[str], options: Any) -> Results:
    """Everything that the topics measure."""
    import torch
    from benchmarks import cases
    from benchmarks.measuring import Case, Settings, measure
    from benchmarks.report import Results, conditions

    memory = use_machine(options, batch_size=1)
    torch.manual_seed(0)
    settings = Settings(quick=options.quick, sweep=options.sweep)
    results = Results(conditions(memory, options.quick), fast_malloc=options.fast_malloc)
    if len(topics) > 1:  # what a topic leaves in memory would change the times of the next
        for topic in topics:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                found = process.submit(_measured, [topic], options).result()
            results.measured += found.measured
            results.facts += found.facts
        return results
    for item in cases(topics[0], settings):
        if isinstance(item, Case):
            results.measured.append(measure(item, settings))
        else:
            results.facts.append(item)
    return results


def _draw(results: Results, targets: str | None, multiples: str | None) -> None:
    """Write the pictures that were asked for."""
    from benchmarks.report import floors, picture

    for path, draw in ((targets, picture), (multiples, floors)):
        if path:
            Path(path).write_text(draw(results), encoding="utf-8")


def _text(results: Results) -> str:
    """Times, then ratios with their targets."""
    lines = ["  ".join(f"{key}: {value}" for key, value in results.conditions.items()), ""]
    for measured in results.measured:
        lines.append(f"{measured.topic}: {measured.name}")
        rows = [[name, spread.median, f"{spread.low:.3g} to {spread.high:.3g}"] for name, spread in measured.ms.items()]
        lines += ["  " + line for line in table(["form", "ms", "quartiles"], rows).splitlines()]
        lines.append("")
    rows = [[row.case, row.what, f"{row.value:.3g}", row.quartiles, row.bound, row.verdict] for row in results.rows()]
    return "\n".join([*lines, table(list(COLUMNS), rows)])
