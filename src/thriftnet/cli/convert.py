"""`thriftnet convert`: convert a network with a technique, and save it."""

from __future__ import annotations

from collections.abc import Sequence

from thriftnet.cli.common import Parser, open_network, parse_with_kwargs
from thriftnet.cli.output import emit
from thriftnet.errors import ConfigError
from thriftnet.files import read_text


def run(arguments: Sequence[str]) -> None:
    shared = ("model", "--technique", "--select", "--exclude", "--output")
    parser = Parser("convert", "Convert a network with a technique, starting from its weights.", *shared)
    parser.add_argument(
        "--plan", metavar="FILE", help="instead: a plan written by thriftnet plan --output FILE, for budgets"
    )
    options, kwargs = parse_with_kwargs(parser, arguments)
    if bool(options.technique) == bool(options.plan):
        raise ConfigError("give either --technique or --plan")

    from thriftnet.core.plan import Plan
    from thriftnet.core.tied import count_params
    from thriftnet.store.model_file import save
    from thriftnet.techniques import convert

    model = open_network(options.model, kwargs)
    try:
        what = Plan.from_json(read_text(options.plan)) if options.plan else options.technique
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the plan {options.plan}: {error}") from None
    converted = convert(model, what, select=options.select, exclude=options.exclude)
    folder = save(converted, options.output)
    before, after = count_params(model), count_params(converted)
    result = {"model": options.model, "output": str(folder), "params_before": before, "params": after}
    emit(f"{folder}: {before:,} -> {after:,} stored parameters ({before / after:.2f}x)", result, as_json=options.json)
