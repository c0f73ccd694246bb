"""`thriftnet demo`: every technique on scikit-learn's digits, with a table and a report."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thriftnet import __version__
from thriftnet.arguments import Epochs, Seed, as_path
from thriftnet.cli.common import Parser, parse
from thriftnet.cli.fold import checked_fold
from thriftnet.cli.machine import one_thread, use_machine
from thriftnet.cli.options import MACHINE_OPTIONS, reads
from thriftnet.cli.output import emit
from thriftnet.cli.train import Bar
from thriftnet.errors import ConfigError
from thriftnet.text import table

if TYPE_CHECKING:
    from torch import nn

    from thriftnet.data.dataset import DataSource
    from thriftnet.data.loaders import Loader
    from thriftnet.report.page import Page
    from thriftnet.train.recipe import Recipe

DESCRIPTION = "Train a small ResNet on scikit-learn's digits, plain and with each technique; fold, check, save and predict."
COLUMNS = ("technique", "stored parameters", "MACs", "test accuracy", "seconds", "folded max error")
CLOSE = 2.0  # percent points: accuracy within this of plain needs no explanation
PREDICTED = 12  # test images shown
TOLERANCE = 1e-4  # of float32 outputs, relative to the largest


@dataclass(frozen=True)
class Result:
    """The network under one technique (at one width)."""

    name: str  # "plain" or the technique's name, with the width if there are several
    technique: str  # its config as text, "" for plain
    params: int  # stored, shared ones once
    macs: int  # per image
    accuracy: float  # on the test images, in percent
    seconds: float  # of training
    fold_error: float | None  # largest difference to the folded network, relative to the largest output; None for plain
    folder: str  # of the trained network
    rows: Sequence[Mapping[str, Any]]  # metrics of each epoch: train_loss, top1 on the test images in percent, ...
    predictions: Sequence[int]  # classes of the first test images by the folded network, loaded from disk


def run(arguments: Sequence[str]) -> None:
    parser = Parser("demo", DESCRIPTION)
    parser.add_argument("--output", metavar="FOLDER", default="demo", help="where report.html and the models go")
    parser.add_argument("--epochs", type=reads(Epochs), metavar="N", help="per technique; default: the recipe's")
    parser.add_argument("--seed", type=reads(Seed), default=0, metavar="N", help="of weights, order and augmentation")
    parser.add_shared(*MACHINE_OPTIONS)
    options = parse(parser, arguments)

    from thriftnet.report.page import write_page
    from thriftnet.train.recipe import load_recipe

    length = {} if options.epochs is None else {"epochs": options.epochs}
    recipe = load_recipe("digits", seed=options.seed, trackers=(), **length)
    use_machine(options, recipe.data.batch_size)
    output = as_path(options.output, "--output")
    if output.exists() and not output.is_dir():
        raise ConfigError(f"--output {output} is no folder: give another")
    start = time.perf_counter()
    with Bar() as bar, one_thread() if options.threads is None else nullcontext():
        source, results = compare(output, recipe, bar)
    report = write_page(_page(source, results, recipe, time.perf_counter() - start), output / "report.html")
    notes = _notes(results)
    text = "\n".join(
        [table(COLUMNS, [_cells(r) for r in results]), *notes, "", f"report: {report}", f"models: {output / 'models'}"]
    )
    shown_in_json = [{k: v for k, v in vars(r).items() if k not in ("rows", "predictions")} for r in results]
    emit(text, {"results": shown_in_json, "notes": notes, "report": str(report)}, as_json=options.json)


def shown() -> tuple[str, ...]:
    """The first example of each technique, as text."""
    from thriftnet.core.spec import format_spec
    from thriftnet.techniques import TECHNIQUES

    return tuple(format_spec(TECHNIQUES.module(name).EXAMPLES[0].config) for name in TECHNIQUES)


def compare(output: Path, recipe: Recipe, bar: Bar) -> tuple[DataSource, list[Result]]:
    """Train, convert, fold, save and predict; one result for each technique and width.

    The plain network is trained first; each technique starts from its weights and trains as long again.

    Raises:
        IncompatibleModelError: A folded network that does not compute what the trained one does.
    """
    from thriftnet.data.sources import open_data
    from thriftnet.techniques import convert
    from thriftnet.train.prepare import prepare_model, seed_everything
    from thriftnet.train.run_folder import read_metrics
    from thriftnet.train.trainer import train

    source = open_data("digits")
    with tempfile.TemporaryDirectory() as scratch:
        seed_everything(recipe.seed)
        plain = prepare_model(recipe, source)
        results: list[Result] = []
        for technique in ("", *shown()):
            bar.start(_name(technique))
            model = convert(plain, technique) if technique else plain
            run = Path(scratch) / _name(technique)
            trained = train(recipe, source, run, model=model, device="cpu", on_progress=bar.on_progress)
            results += _results(model, technique, source, read_metrics(run), trained.seconds, output)
    return source, results


def _results(
    model: nn.Module, technique: str, source: DataSource, rows: list[dict[str, Any]], seconds: float, output: Path
) -> Iterator[Result]:
    """One result for each width of a trained network, folded, checked and saved."""
    from thriftnet.core.width import widths
    from thriftnet.measure import inspect
    from thriftnet.store.model_file import load, save
    from thriftnet.train.evaluate import evaluate

    name, size, test = _name(technique), (1, 8, 8), held_out(source)
    folder = save(model.eval(), output / "models" / name, metadata={"metrics": {"top1": rows[-1]["top1"]}})
    for width in widths(model) or (None,):
        label = name if width is None else f"{name} at {width:g}"
        chosen: dict[str, Any] = {} if width is None else {"width": width}
        folded, difference = checked_fold(model, size, TOLERANCE, **chosen)
        error = difference if technique else None
        place = save(folded, output / "models" / f"{label.replace(' ', '-')}-folded")
        predicted = load(place)(next(iter(test))[0][:PREDICTED]).argmax(1).tolist()
        report, top1 = inspect(model, size), evaluate(model, test).top1
        yield Result(label, technique, report.params, report.macs, top1, seconds, error, str(folder), rows, predicted)


def _name(technique: str) -> str:
    return technique.partition("(")[0] or "plain"


def held_out(source: DataSource) -> Loader:
    """Batches of the test images."""
    from thriftnet.data.augmentation import Augmentation
    from thriftnet.data.loaders import make_loader

    return make_loader(source.split("test"), 256, augmentation=Augmentation().for_source(source), train=False)


def _notes(results: Sequence[Result]) -> list[str]:
    """Explains each accuracy clearly below that of plain."""
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


def _page(source: DataSource, results: Sequence[Result], recipe: Recipe, seconds: float) -> Page:
    import torch

    from thriftnet.report import plots
    from thriftnet.report.page import Page, Picture

    names = [r.name for r in results]
    trained = {_name(r.technique): r.rows for r in results}
    best = min(results[1:], key=lambda r: r.params)
    summary = [
        "One small ResNet on 1,797 real images of digits: trained plain, then made small with each technique, starting from "
        "the plain weights, and trained as long again.",
        f"The smallest, {best.name}, stores {best.params:,} parameters, {results[0].params / best.params:.1f} times fewer than "
        f"plain, at {best.accuracy:.2f}% test accuracy (plain {results[0].accuracy:.2f}%).",
        *_notes(results),
    ]
    cells = [[f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in _cells(r)] for r in results]
    images, labels = (batch[:PREDICTED] for batch in next(iter(held_out(source))))
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
                list(trained),
                [[row["train_loss"] for row in rows] for rows in trained.values()],
                [[row["top1"] for row in rows] for rows in trained.values()],
            ),
            "Each technique starts from the trained plain network, whose function the conversion changes at first.",
        ),
        Picture(
            "predictions",
            "Predictions of the folded networks",
            plots.predictions(images, labels.tolist(), names, [r.predictions for r in results]),
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
    return Page("thriftnet demo", summary, COLUMNS, cells, pictures, facts)
