"""The demo's job: one small network, trained plain and then with each technique, folded, saved, and used to predict."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thriftnet.core.fold import fold, freeze
from thriftnet.core.spec import format_spec
from thriftnet.core.width import set_width, widths
from thriftnet.data.dataset import DataSource
from thriftnet.data.loaders import Loader, make_loader
from thriftnet.data.sources import open_data
from thriftnet.data.transforms import Augmentation
from thriftnet.errors import IncompatibleModelError
from thriftnet.measure import inspect
from thriftnet.measure.difference import relative_difference
from thriftnet.models import create_model
from thriftnet.store.model_file import load, save
from thriftnet.techniques import TECHNIQUES, convert
from thriftnet.train.engine import Progress
from thriftnet.train.evaluate import evaluate
from thriftnet.train.recipe import Recipe, load_recipe
from thriftnet.train.record import read_rows
from thriftnet.train.sequence import train

MODEL = "resnet20"
SHOWN = tuple(format_spec(TECHNIQUES.module(name).EXAMPLES[0].config) for name in TECHNIQUES)
TOLERANCE = 1e-4  # of float32 outputs, relative to the largest


@dataclass(frozen=True)
class Result:
    """What became of the network under one technique (at one width).

    Args:
        name: "plain" or the technique's name, with the width where there are several.
        technique: The technique's config as text, "" for plain.
        params: Stored parameters, shared ones once.
        macs: Executed multiply-accumulates per image.
        accuracy: On the test images, in percent.
        seconds: Training time.
        fold_error: Largest difference to the folded network, relative to the largest output; None for plain.
        rows: Metrics of each epoch: ``train_loss``, ``top1`` on the test images in percent, ...
        predictions: Class given to each of the first test images by the folded network, loaded from disk.
        folder: Where the trained network was saved.
    """

    name: str
    technique: str
    params: int
    macs: int
    accuracy: float
    seconds: float
    fold_error: float | None
    rows: tuple[Mapping[str, Any], ...]
    predictions: tuple[int, ...]
    folder: str


def compare(
    output: Path, recipe: Recipe, on_start: Callable[[str], None], watch: Callable[[Progress], None]
) -> tuple[DataSource, list[Result]]:
    """Train, convert, fold, save and predict; one result for each technique and width.

    The plain network is trained first; each technique starts from its weights and trains as long again.

    Raises:
        IncompatibleModelError: A folded network that does not compute what the trained one does.
    """
    source = open_data("digits")
    with _one_thread(), tempfile.TemporaryDirectory() as scratch:
        torch.manual_seed(recipe.seed)
        plain = create_model(MODEL, in_chans=1, num_classes=10)
        results = []
        for technique in ("", *SHOWN):
            name = technique.partition("(")[0] or "plain"
            on_start(name)
            model = convert(plain, technique) if technique else plain
            run = Path(scratch) / name
            start = time.perf_counter()
            train(recipe, source, run, model=model, device="cpu", watch=watch)
            seconds = time.perf_counter() - start
            results += _results(model, technique, source, tuple(read_rows(run)), seconds, output)
    return source, results


def demo_recipe(epochs: int | None, seed: int) -> Recipe:
    """The recipe ``digits``, tested on the test images after each epoch but not selected by them."""
    length = {} if epochs is None else {"epochs": epochs}
    return load_recipe("digits", seed=seed, select_on="last", trackers=(), memory_format="contiguous", **length)


def _results(
    model: nn.Module, technique: str, source: DataSource, rows: tuple[Mapping[str, Any], ...], seconds: float, output: Path
) -> list[Result]:
    """One result for a network, or one per width."""
    name = technique.partition("(")[0] or "plain"
    size = (1, 8, 8)
    test = held_out(source)
    facts = {"input_size": size, "mean": source.mean, "std": source.std, "classes": source.classes}
    model.eval()
    folder = save(model, output / "models" / name, metadata={**facts, "metrics": {"top1": rows[-1]["top1"]}})
    results = []
    for width in widths(model) or (None,):
        if width is not None:
            set_width(model, width)
        folded = fold(model) if width is None else freeze(model, width)
        label = name if width is None else f"{name} at {width:g}"
        error = relative_difference(model, folded, size) if technique else None
        if error is not None and not error <= TOLERANCE:
            raise IncompatibleModelError(f"{label}: the folded network differs by {error:.1e} of the largest output")
        place = save(folded, output / "models" / f"{label.replace(' ', '-')}-folded", metadata=facts)
        predicted = load(place)(next(iter(test))[0][:12]).argmax(1).tolist()
        report = inspect(model, size)
        score = evaluate(model, test).top1
        results.append(
            Result(label, technique, report.params, report.macs, score, seconds, error, rows, tuple(predicted), str(folder))
        )
    return results


def held_out(source: DataSource) -> Loader:
    """The test images, as networks are given them."""
    return make_loader(source.split("test"), 256, augmentation=Augmentation().for_source(source), train=False)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Maps of 8 x 8 pixels are too small to share among threads; one is faster, and exact under a seed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
