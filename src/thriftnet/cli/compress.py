"""`thriftnet compress`: from a trained network to a small one, in one command."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from thriftnet.arguments import Count, Epochs, PositiveWeight, Seed
from thriftnet.cli.budgets import BUDGETS, budget_of
from thriftnet.cli.common import Parser, open_network, parse_with_kwargs
from thriftnet.cli.machine import use_machine
from thriftnet.cli.options import MACHINE_OPTIONS, reads
from thriftnet.cli.output import emit, say
from thriftnet.cli.train import Bar
from thriftnet.text import table

if TYPE_CHECKING:
    from thriftnet.train.compress import Compressed

DESCRIPTION = (
    "Make a trained network small, and win back the accuracy: choose a technique, or take --technique, and its settings within a budget; "
    "fit the new layers to data, find a learning rate, train with the network as it was as the teacher, and fold. The same command goes on "
    "after a stop."
)
COLUMNS = ("network", "accuracy", "stored parameters", "MACs", "bytes", "time, 1 image", "64 images")


def run(arguments: Sequence[str]) -> None:
    parser = Parser("compress", DESCRIPTION, "model", "--data", *BUDGETS, "--technique", "--select", "--exclude", "--plain")
    add = parser.add_argument
    add("--output", metavar="DIR", required=True, help="folder of all files; DIR/model is the network")
    add("--epochs", type=reads(Epochs), metavar="N", help="passes over the training images; default: the recipe's")
    add("--minutes", type=reads(PositiveWeight), metavar="M", help="instead: of training, in all")
    add("--rates", type=reads(tuple[float, ...]), metavar="R,R", help="learning rates to try; default: 0.003,0.01,0.03,0.1")
    add("--limit", type=reads(Count), metavar="N", help="only N training images, evenly spread")
    add("--seed", type=reads(Seed), default=0, metavar="N", help="of the training")
    add("--recipe", default="convert-and-recover", metavar="R", help="how to train; default: convert-and-recover")
    parser.add_shared("--device", *MACHINE_OPTIONS)
    options, kwargs = parse_with_kwargs(parser, arguments)

    from thriftnet.train.compress import RATES, compress
    from thriftnet.train.recipe import load_recipe

    recipe = load_recipe(options.recipe)
    use_machine(options, recipe.data.batch_size)
    model = open_network(options.model, kwargs, options.plain)
    with Bar() as bar:

        def on_step(name: str) -> None:
            bar.start(name)
            say(f"{name} ...")

        result = compress(
            model,
            options.data,
            options.output,
            **budget_of(options),
            technique=options.technique,
            select=options.select,
            exclude=options.exclude,
            epochs=options.epochs,
            minutes=options.minutes,
            rates=options.rates or RATES,
            limit=options.limit,
            seed=options.seed,
            recipe=recipe,
            device=options.device,
            on_step=on_step,
            on_progress=bar.on_progress,
        )
    emit(describe(result), result.to_dict(), as_json=options.json)


def describe(result: Compressed) -> str:
    """The result as text."""
    rows = [
        [
            row.name,
            f"{row.top1:.2f}%",
            row.params,
            row.macs,
            row.size_bytes,
            *(f"{row.times[batch]:.2f} x" if batch in row.times else "" for batch in ("1", "64")),
        ]
        for row in result.rows
    ]
    what = "" if result.labelled else " (accuracy is agreement with the plain network: the images have no labels)"
    return "\n".join(
        [
            f"{result.plan.name}, learning rate {result.rate:g}{what}",
            "",
            table(COLUMNS, rows),
            "",
            f"the network: {result.folder}/model    in plain layers: {result.folder}/folded",
            f"report: {result.folder}/report.html",
        ]
    )
