"""What the verbs that plan share: budgets, images for errors of outputs, and writing a plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import Parser, open_network
from thriftnet.cli.inputs import open_inputs
from thriftnet.cli.options import IMAGE_OPTIONS
from thriftnet.cli.output import write_text
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from argparse import Namespace
    from pathlib import Path

    from torch import nn

    from thriftnet.core.plan import Plan
    from thriftnet.data.loaders import Loader

BUDGETS = ("--params", "--macs", "--bytes")


def planning_parser(verb: str, description: str) -> Parser:
    """The options of a verb that plans: layers, budgets, and images, none of them required."""
    parser = Parser(verb, description, "model", "--select", "--exclude", *BUDGETS, "--input-size")
    add_images(parser)
    return parser


def add_images(parser: Parser) -> None:
    """The options of images, none of them required."""
    for name in IMAGE_OPTIONS:
        parser.add_shared(name, **({"required": False} if name == "--data" else {}))


def budget_of(options: Namespace) -> dict[str, str | None]:
    """The budget, as the functions take it."""
    return {name.removeprefix("--"): getattr(options, name.removeprefix("--")) for name in BUDGETS}


@contextmanager
def network_and_images(options: Namespace, kwargs: Mapping[str, Any]) -> Iterator[tuple[nn.Module, Loader | None]]:
    """The network, and training images if ``--data`` is given; without it, what says how to read images is refused."""
    if options.data is not None:
        from thriftnet.core.fit import IMAGES
        from thriftnet.train.distributed import process_group

        with process_group(options.device) as device:
            model, source, loader_of = open_inputs(options, kwargs, "train", device)
            yield model, loader_of(source.split("train"), options.limit or IMAGES, shuffle=True)
        return
    for name, how in IMAGE_OPTIONS.items():
        if name != "--plain" and getattr(options, name[2:].replace("-", "_")) not in (None, False, how.get("default")):
            raise ConfigError(f"{name} says how --data is read: give both or neither")
    yield open_network(options.model, kwargs, options.plain), None


def write_plan(path: Path, model: str, plan: Plan) -> None:
    """Write a plan as JSON, or as a page."""
    if path.suffix == ".html":
        from thriftnet.report.page import write_page
        from thriftnet.report.plan_page import plan_page

        write_page(plan_page(model, plan), path)
    elif path.suffix == ".json":
        write_text(path, plan.to_json() + "\n")
    else:
        raise ConfigError(f"--output {path}: give a name that ends in .json or .html")
