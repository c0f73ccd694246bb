"""`thriftnet plan`: show a conversion without doing it."""

from __future__ import annotations

from collections.abc import Sequence

from thriftnet.cli.common import Parser, open_network, parse_with_kwargs
from thriftnet.cli.output import emit, write_text


def run(arguments: Sequence[str]) -> None:
    parser = Parser("plan", "Show what a conversion would do, layer by layer; nothing is changed.", "model")
    parser.add_shared("--technique", required=True)
    parser.add_shared("--select")
    parser.add_argument("--output", metavar="FILE", help="also write the plan, for thriftnet convert --plan FILE")
    options, kwargs = parse_with_kwargs(parser, arguments)

    from thriftnet.techniques import plan

    planned = plan(open_network(options.model, kwargs), options.technique, select=options.select)
    if options.output:
        write_text(options.output, planned.to_json() + "\n")
    emit(str(planned), planned.to_dict(), as_json=options.json)
