"""`thriftnet plan`: what a conversion would do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from thriftnet.cli.common import emit, new_parser, open_network, parse_with_kwargs
from thriftnet.errors import ConfigError


def run(arguments: Sequence[str]) -> None:
    parser = new_parser("plan", "Show what a conversion would do, layer by layer; nothing is changed.", takes_model=True)
    parser.add_argument("--technique", required=True, help="as 'soft-sharing(templates=2)'")
    parser.add_argument("--select", help="regular expression on layer names; left out, all but stem and classifier")
    parser.add_argument("--output", metavar="FILE", help="also write the plan, for thriftnet convert --plan FILE")
    options, kwargs = parse_with_kwargs(parser, arguments)

    from thriftnet.techniques import plan

    planned = plan(open_network(options.model, kwargs), options.technique, select=options.select)
    if options.output:
        try:
            Path(options.output).write_text(planned.to_json() + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write {options.output}: {error.strerror}") from None
    emit(str(planned), planned.to_dict(), as_json=options.json)
