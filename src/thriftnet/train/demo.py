"""The demo's job: one small network, trained plain and then with each technique, folded, saved, and used to predict."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from thriftnet.core.verbs import fold, freeze
from thriftnet.core.width import set_width, widths
from thriftnet.data.digits import Digits, load_digits
from thriftnet.errors import IncompatibleModelError
from thriftnet.interop.checkpoints import load, save
from thriftnet.measure import inspect
from thriftnet.measure.difference import relative_difference
from thriftnet.models import create_model
from thriftnet.techniques import convert
from thriftnet.train.loop import Curve, Settings, accuracy, fit

MODEL = "resnet20"
SHOWN = (
    "weight-sharing(rate=2)",
    "soft-sharing(templates=2)",
    "filter-basis(shared_rank=16, unique_rank=1)",
    "shift(expansion=2.0)",
    "slimmable(widths=(0.5, 1.0))",
)
TOLERANCE = 1e-4  # of float32 outputs, relative to the largest


@dataclass(frozen=True)
class Result:
    """What became of the network under one technique (at one width).

    Args:
        name: "plain" or the technique's name, with the width where there are several.
        technique: The technique's config as text, "" for plain.
        params: Stored parameters, shared ones once.
        macs: Executed multiply-accumulates per image.
        accuracy: On the test images, in [0, 1].
        seconds: Training time.
        fold_error: Largest difference to the folded network, relative to the largest output; None for plain.
        curve: Loss and test accuracy per epoch.
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
    curve: Curve
    predictions: tuple[int, ...]
    folder: str


def compare(
    output: Path, settings: Settings, on_start: Callable[[str], None], on_epoch: Callable[[Curve], None]
) -> tuple[Digits, list[Result]]:
    """Train, convert, fold, save and predict; one result for each technique and width.

    The plain network is trained first; each technique starts from its weights and trains as long again.

    Raises:
        IncompatibleModelError: A folded network that does not compute what the trained one does.
    """
    data = load_digits(settings.seed)
    with _one_thread():
        torch.manual_seed(settings.seed)
        plain = create_model(MODEL, in_chans=1, num_classes=10)
        results = []
        for technique in ("", *SHOWN):
            on_start(technique.partition("(")[0] or "plain")
            torch.manual_seed(settings.seed)
            model = convert(plain, technique) if technique else plain
            start = time.perf_counter()
            curve = fit(model, data.train, data.test, settings, on_epoch)
            seconds = time.perf_counter() - start
            results += _results(model, technique, data, curve, seconds, output)
    return data, results


def _results(model: nn.Module, technique: str, data: Digits, curve: Curve, seconds: float, output: Path) -> list[Result]:
    """One result for a network, or one per width."""
    name = technique.partition("(")[0] or "plain"
    facts = {"input_size": data.input_size, "mean": data.mean, "std": data.std, "classes": data.classes}
    folder = save(model.eval(), output / "models" / name, metadata={**facts, "test_accuracy": curve.test_accuracy[-1]})
    results = []
    for width in widths(model) or (None,):
        if width is not None:
            set_width(model, width)
        folded = fold(model) if width is None else freeze(model, width)
        label = name if width is None else f"{name} at {width:g}"
        error = relative_difference(model, folded, data.input_size) if technique else None
        if error is not None and not error <= TOLERANCE:
            raise IncompatibleModelError(f"{label}: the folded network differs by {error:.1e} of the largest output")
        place = save(folded, output / "models" / f"{label.replace(' ', '-')}-folded", metadata=facts)
        predicted = load(place)(data.test.images[:12]).argmax(1).tolist()
        report = inspect(model, data.input_size)
        score = accuracy(model, data.test)
        results.append(
            Result(label, technique, report.params, report.macs, score, seconds, error, curve, tuple(predicted), str(folder))
        )
    return results


@contextmanager
def _one_thread() -> Iterator[None]:
    """Maps of 8 x 8 pixels are too small to share among threads; one is faster, and exact under a seed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
