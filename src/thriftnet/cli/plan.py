"""`thriftnet plan`: show a conversion without doing it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thriftnet.cli.budgets import budget_of, network_and_images, planning_parser, write_plan
from thriftnet.cli.common import parse_with_kwargs
from thriftnet.cli.output import emit

DESCRIPTION = (
    "Show what a conversion would do, layer by layer; nothing is changed. A budget chooses the technique's settings for each set of "
    "layers; with --data, errors are those of the layers' outputs for images."
)


def run(arguments: Sequence[str]) -> None:
    parser = planning_parser("plan", DESCRIPTION)
    parser.add_shared("--technique", required=True)
    output = "also write the plan: FILE.json for thriftnet convert --plan, or FILE.html to read"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)
    options, kwargs = parse_with_kwargs(parser, arguments)

    from thriftnet.cli.machine import progress_bar
    from thriftnet.planning import plan

    with network_and_images(options, kwargs) as (model, images), progress_bar("sets of layers") as advance:
        planned = plan(
            model,
            options.technique,
            select=options.select,
            exclude=options.exclude,
            data=images,
            input_size=options.input_size,
            progress=advance,
            **budget_of(options),
        )
    if options.output:
        write_plan(options.output, options.model, planned)
    emit(str(planned), planned.to_dict(), as_json=options.json)
