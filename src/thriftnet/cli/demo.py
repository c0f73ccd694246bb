"""`thriftnet demo`: the whole way on the bundled digits, with a table and a report."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thriftnet import __version__
from thriftnet.cli.common import emit, new_parser, parse
from thriftnet.cli.machine import add_machine_options, use_machine
from thriftnet.text import table

if TYPE_CHECKING:
    from thriftnet.data.dataset import DataSource
    from thriftnet.report.page import Page
    from thriftnet.train.demo import Result
    from thriftnet.train.engine import Progress
    from thriftnet.train.recipe import Recipe

COLUMNS = ("technique", "stored parameters", "MACs", "test accuracy", "seconds", "folded max error")
CLOSE = 2.0  # percent points: accuracy within this of plain needs no explanation


def run(arguments: Sequence[str]) -> None:
    parser = new_parser(
        "demo",
        "Train a small ResNet on scikit-learn's digits, plain and with each technique; fold, check, save and predict.",
    )
    parser.add_argument("--output", metavar="FOLDER", default="demo", help="where report.html and the models go")
    parser.add_argument("--epochs", type=int, help="per technique (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, help="of split, weights, order and augmentation (default 0)")
    add_machine_options(parser)
    options = parse(parser, arguments)

    from thriftnet.report.page import write_page
    from thriftnet.train.demo import SHOWN, compare, demo_recipe

    recipe = demo_recipe(options.epochs, options.seed)
    use_machine(options, recipe.batch_size)
    output = Path(options.output)
    start = time.perf_counter()
    with Bars(1 + len(SHOWN)) as bars:
        source, results = compare(output, recipe, bars.start, bars.watch)
    report = write_page(_page(source, results, recipe, time.perf_counter() - start), output / "report.html")
    notes = _notes(results)
    text = "\n".join(
        [table(COLUMNS, [_cells(r) for r in results]), *notes, "", f"report: {report}", f"models: {output / 'models'}"]
    )
    emit(text, {"results": [_as_dict(r) for r in results], "notes": notes, "report": str(report)}, as_json=options.json)


class Bars:
    """A bar per technique on a terminal; nothing elsewhere."""

    def __init__(self, networks: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        columns = (TextColumn("{task.description:<16}"), BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
        self.bars = RichProgress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty())
        self.networks, self.done = networks, 0

    def __enter__(self) -> Bars:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def start(self, name: str) -> None:
        self.done += 1
        self.task = self.bars.add_task(name, total=None, note=f"{self.done} of {self.networks}")

    def watch(self, progress: Progress) -> None:
        self.bars.update(self.task, total=progress.steps, completed=progress.step)
        if progress.row is not None:
            self.bars.update(self.task, note=f"test accuracy {progress.row['top1']:.1f} %")


def _notes(results: Sequence[Result]) -> list[str]:
    """Why an accuracy is not within reach of plain."""
    plain = results[0].accuracy
    return [
        f"{r.name} is {plain - r.accuracy:.1f} points below plain: it stores {results[0].params / r.params:.1f}x fewer "
        f"parameters and runs {results[0].macs / r.macs:.1f}x fewer MACs; more epochs (--epochs) bring it closer"
        for r in results
        if plain - r.accuracy > CLOSE
    ]


def _cells(result: Result) -> list[object]:
    """One row of the table."""
    error = "-" if result.fold_error is None else f"{result.fold_error:.1e}"
    return [result.name, result.params, result.macs, f"{result.accuracy:.2f}%", f"{result.seconds:.1f}", error]


def _as_dict(result: Result) -> dict[str, Any]:
    keys = ("name", "technique", "params", "macs", "accuracy", "seconds", "fold_error", "folder")
    return {key: getattr(result, key) for key in keys}


def _page(source: DataSource, results: Sequence[Result], recipe: Recipe, seconds: float) -> Page:
    import torch

    from thriftnet.report import plots
    from thriftnet.report.page import Page, Picture
    from thriftnet.train.demo import held_out

    names = [r.name for r in results]
    trained = [r for i, r in enumerate(results) if r.rows is not (results[i - 1].rows if i else None)]
    best = min(results[1:], key=lambda r: r.params)
    summary = [
        "One small ResNet on 1,797 real images of digits: trained plain, then made small with each technique, starting from "
        "the plain weights, and trained as long again.",
        f"The smallest, {best.name}, stores {best.params:,} parameters, {results[0].params / best.params:.1f} times fewer than "
        f"plain, at {best.accuracy:.2f}% test accuracy (plain {results[0].accuracy:.2f}%).",
        *_notes(results),
    ]
    rows = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in _cells(r)] for r in results]
    count = len(results[0].predictions)
    images, labels = next(iter(held_out(source)))
    pictures = [
        Picture(
            "accuracy",
            "Accuracy against stored parameters",
            plots.accuracy_against_params(names, [r.params for r in results], [r.accuracy for r in results]),
            "Further left stores less; the dotted line is the plain network. Widths of a slimmable network share one file.",
        ),
        Picture(
            "training",
            "Training",
            plots.training_curves(
                [r.technique.partition("(")[0] or "plain" for r in trained],
                [[row["train_loss"] for row in r.rows] for r in trained],
                [[row["top1"] for row in r.rows] for r in trained],
            ),
            "Each technique starts from the trained plain network, whose function the conversion changes at first.",
        ),
        Picture(
            "predictions",
            "Predictions of the folded networks",
            plots.predictions(images[:count], labels[:count].tolist(), names, [r.predictions for r in results]),
            "Test images, and what each folded network, loaded from its folder, takes them for. Wrong answers are red.",
        ),
    ]
    facts = {
        "command": f"thriftnet demo --epochs {recipe.epochs} --seed {recipe.seed}",
        "recipe": "digits (thriftnet recipes digits)",
        "images": f"{len(source.split('train'))} to train, {len(source.split('test'))} to test, stratified",
        "versions": f"thriftnet {__version__}, torch {torch.__version__}",
        "time": f"{seconds:.0f} s in all",
    }
    return Page("thriftnet demo", summary, COLUMNS, rows, pictures, facts)
