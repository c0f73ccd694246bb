"""`thriftnet suggest`: what each technique, and useful pairs, would do within a budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thriftnet.cli.budgets import budget_of, network_and_images, planning_parser, write_plan
from thriftnet.cli.common import parse_with_kwargs
from thriftnet.cli.options import svg_file
from thriftnet.cli.output import emit, write_text
from thriftnet.text import table

DESCRIPTION = (
    "Compare all techniques, and useful pairs, within a budget: plans with their errors before any training, the least first. With "
    "--data, errors are those of the layers' outputs for images."
)


def run(arguments: Sequence[str]) -> None:
    parser = planning_parser("suggest", DESCRIPTION)
    add = parser.add_argument
    again = "only this technique, without pairs; may be given several times"
    add("--technique", action="append", metavar="T", help=again)
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="write the first plan: FILE.json for thriftnet convert --plan, or FILE.html",
    )
    add("--plot", type=svg_file, metavar="FILE.svg", help="draw errors, parameters and MACs")
    options, kwargs = parse_with_kwargs(parser, arguments)

    from thriftnet.cli.machine import status
    from thriftnet.planning import suggest
    from thriftnet.report import plots

    with network_and_images(options, kwargs) as (model, images), status() as show:
        plans = suggest(
            model,
            techniques=options.technique,
            select=options.select,
            exclude=options.exclude,
            data=images,
            input_size=options.input_size,
            progress=show,
            **budget_of(options),
        )
    first = plans[0]
    rows = [
        {
            "technique": plan.name,
            "error": plan.error,
            "params": plan.last.params_after,
            "macs": plan.last.macs_after or 0,
            "bytes": {kind: (plan.last.size_bytes or 0) // parts for kind, parts in (("fp32", 1), ("fp16", 2), ("int8", 4))},
        }
        for plan in plans
    ]
    if options.output:
        write_plan(options.output, options.model, first)
    if options.plot:
        write_text(options.plot, plots.suggestions(rows, first.params_before, first.macs_before or 0))
    cells = [[row["technique"], row["error"], row["params"], row["macs"], *row["bytes"].values()] for row in rows]  # type: ignore[attr-defined]
    text = table(["technique", "error", "parameters", "MACs", "bytes fp32", "fp16", "int8"], cells)
    text += f"\nnow: {first.params_before:,} parameters, {first.macs_before or 0:,} MACs"
    result = {"model": options.model, "suggestions": rows, "plans": [plan.to_dict() for plan in plans]}
    emit(text, result, as_json=options.json)
