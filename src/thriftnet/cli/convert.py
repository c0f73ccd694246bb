"""`thriftnet convert`: convert a network with a technique, and save it."""

from __future__ import annotations

from collections.abc import Sequence

from thriftnet.cli.budgets import add_images, network_and_images
from thriftnet.cli.common import Parser, parse_with_kwargs
from thriftnet.cli.output import emit
from thriftnet.errors import ConfigError
from thriftnet.files import read_text

DESCRIPTION = (
    "Convert a network with a technique, starting from its weights. With --data, the new layers are fitted to what the old ones give for "
    "some training images (1,024, or --limit), and the statistics of norms are estimated again; labels are not needed."
)


def run(arguments: Sequence[str]) -> None:
    shared = ("model", "--technique", "--select", "--exclude", "--input-size", "--output")
    parser = Parser("convert", DESCRIPTION, *shared)
    add_images(parser)
    parser.add_argument(
        "--plan", metavar="FILE", help="instead: a plan written by thriftnet plan --output FILE, for budgets"
    )
    options, kwargs = parse_with_kwargs(parser, arguments)
    if bool(options.technique) == bool(options.plan):
        raise ConfigError("give either --technique or --plan")

    from thriftnet.cli.machine import progress_bar
    from thriftnet.core.plan import Plan
    from thriftnet.core.tied import count_params
    from thriftnet.store.model_file import check_place, save
    from thriftnet.techniques import convert

    try:
        what = Plan.from_json(read_text(options.plan)) if options.plan else options.technique
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the plan {options.plan}: {error}") from None
    check_place(options.output)
    with network_and_images(options, kwargs) as (model, images), progress_bar("groups of layers") as advance:
        converted = convert(
            model,
            what,
            select=options.select,
            exclude=options.exclude,
            data=images,
            input_size=options.input_size,
            progress=advance,
        )
    folder = save(converted.cpu(), options.output)
    before, after = count_params(model), count_params(converted)
    result = {"model": options.model, "output": str(folder), "params_before": before, "params": after}
    emit(f"{folder}: {before:,} -> {after:,} stored parameters ({before / after:.2f}x)", result, as_json=options.json)
