"""`thriftnet evaluate --mode ...` and ``--sweep-budget``: what a network of several widths gives for its multiply-accumulates."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from thriftnet.cli.common import quantity, width_from, write_text
from thriftnet.core.width import format_width, set_width, widths
from thriftnet.core.width import width as width_of
from thriftnet.data.loaders import Loader
from thriftnet.dynamic.network import DynamicNetwork
from thriftnet.errors import ConfigError, IncompatibleModelError
from thriftnet.measure import inspect
from thriftnet.report import plots
from thriftnet.text import table
from thriftnet.train.distributed import total
from thriftnet.train.evaluate import Evaluation, evaluate

if TYPE_CHECKING:
    from jsonargparse import Namespace

SINGLE = 20  # images that are timed one by one
COLUMNS = ("width", "MACs", "top-1, %", "ms for one image", "images/s")


def measure_widths(
    model: nn.Module, loader: Loader, calibration: Loader, classes: Sequence[str], options: Namespace
) -> tuple[str, dict[str, Any]]:
    """The result for people and for machines.

    Args:
        calibration: Training images, on which the cost of a budget is found.

    Raises:
        ConfigError: No such mode, or options that do not go with it.
        IncompatibleModelError: The network has one width only, or no gate.
    """
    if not widths(model):
        raise IncompatibleModelError(f"{type(model).__name__} has one width only: leave --mode and --sweep-budget out")
    if options.sweep_budget is not None:
        return _sweep(model, loader, calibration, options.sweep_budget)
    mode, _, chosen = options.mode.partition("=")
    if options.budget is not None and mode != "dynamic":
        raise ConfigError("--budget goes with --mode dynamic")
    if mode == "all" and not chosen:
        points = every_width(model, loader)
        _draw(options.plot, lambda: plots.accuracy_against_macs({"fixed widths": [(p.macs, p.top1) for p in points]}))
        return _text(points), {"widths": [asdict(point) for point in points]}
    if mode == "width":
        if chosen:
            set_width(model, width_from(chosen))
        point = one_width(model, loader)
        return _text([point]), asdict(point)
    if mode == "dynamic" and not chosen:
        return _dynamic(model, loader, calibration, classes, options)
    raise ConfigError(f"--mode {options.mode}: expected all, dynamic, width, or width=W with a width of the network")


def _dynamic(
    model: nn.Module, loader: Loader, calibration: Loader, classes: Sequence[str], options: Namespace
) -> tuple[str, dict[str, Any]]:
    """By the gate, within a budget if one is given, with the decisions for each class."""
    dynamic = DynamicNetwork(model, input_size=_size(loader)).eval()
    if options.budget is not None:
        dynamic.set_budget(quantity("--budget", options.budget), calibration)
    point = by_gate(dynamic, loader)
    counts = decisions_by_class(dynamic, loader, len(classes)).tolist()
    names = [format_width(width) for width in dynamic.widths]
    _draw(options.plot, lambda: plots.decisions(counts, classes, names))
    rows = [[name, *row] for name, row in zip(classes, counts, strict=True)]
    text = f"{_text([point])}\n\nimages of each class by the width chosen:\n{table(['class', *names], rows)}"
    by_class = {name: dict(zip(names, row, strict=True)) for name, row in zip(classes, counts, strict=True)}
    return text, {**asdict(point), "cost": dynamic.cost, "decisions": by_class}


def _sweep(model: nn.Module, loader: Loader, calibration: Loader, path: Path) -> tuple[str, dict[str, Any]]:
    """The gate at several budgets, beside the fixed widths that it chooses among."""
    dynamic = DynamicNetwork(model, input_size=_size(loader)).eval()
    budgets = by_budget(dynamic, loader, calibration)
    fixed = [
        point for point in every_width(model, loader) if point.name in {format_width(width) for width in dynamic.widths}
    ]
    curves = {"by the gate": budgets, "fixed widths": fixed}
    pairs = {name: [(point.macs, point.top1) for point in points] for name, points in curves.items()}
    _draw(path, lambda: plots.accuracy_against_macs(pairs))
    rows = {"budgets": [asdict(point) for point in budgets], "widths": [asdict(point) for point in fixed]}
    return _text([*budgets, *fixed]), {**rows, "plot": str(path)}


def _size(loader: Loader) -> tuple[int, ...]:
    return tuple(next(iter(loader))[0].shape[1:])


def _text(points: Sequence[Point]) -> str:
    rows = [[p.name, round(p.macs), f"{p.top1:.2f}", f"{p.latency_ms:.2f}", f"{p.images_per_second:,.0f}"] for p in points]
    return table(COLUMNS, rows)


def _draw(path: Path | None, picture: Any) -> None:
    if path is None:
        return
    if path.suffix != ".svg":
        raise ConfigError(f"{path}: give a name that ends in .svg")
    write_text(path, picture())


@dataclass(frozen=True)
class Point:
    """One way to run a network.

    Args:
        name: The width, or the budget.
        macs: Multiply-accumulates for one image, on average.
        top1: In percent.
        latency_ms: Of one image alone: the median of some.
        images_per_second: In batches.
    """

    name: str
    macs: float
    top1: float
    latency_ms: float
    images_per_second: float


def every_width(model: nn.Module, loader: Loader) -> list[Point]:
    """Each width of a slimmable network by itself; the selected width stays."""
    before, points = width_of(model), []
    for width in widths(model):
        set_width(model, width)
        points.append(one_width(model, loader))
    set_width(model, before)
    return points


def one_width(model: nn.Module, loader: Loader) -> Point:
    """The selected width of a slimmable network."""
    images = _first(loader)
    _, channels, height, side = images.shape
    macs = inspect(model, (channels, height, side)).macs
    return _point(format_width(width_of(model)), macs, evaluate(model, loader), latency(model, images))


def by_gate(dynamic: DynamicNetwork, loader: Loader, name: str = "gate") -> Point:
    """As the gate decides."""
    dynamic.eval().reset()
    result = evaluate(dynamic, loader)
    counts = total(dynamic.counts)
    macs = float((counts * dynamic.macs).sum()) / int(counts.sum())
    return _point(name, macs, result, latency(dynamic, _first(loader)))


def by_budget(dynamic: DynamicNetwork, loader: Loader, calibration: Loader, steps: int = 7) -> list[Point]:
    """The gate at budgets from its narrowest width to its widest, without training; its cost stays as it was.

    Args:
        calibration: Images, whose labels are not looked at, on which each budget's cost is found.
    """
    before, points = dynamic.cost, []
    for budget in torch.linspace(float(dynamic.macs.min()), float(dynamic.macs.max()), steps).tolist():
        dynamic.set_budget(min(max(budget, float(dynamic.macs.min())), float(dynamic.macs.max())), calibration)
        points.append(by_gate(dynamic, loader, f"budget {budget / 1e6:.1f}M"))
    dynamic.cost = before
    return points


@torch.no_grad()
def decisions_by_class(dynamic: DynamicNetwork, loader: Loader, classes: int) -> Tensor:
    """How many images of each class take each width: (classes, widths)."""
    dynamic.eval()
    counts = torch.zeros(classes, len(dynamic.widths), dtype=torch.int64, device=loader.device)
    for images, labels in loader:
        counts.index_put_((labels, dynamic.decisions(images)), torch.ones_like(labels), accumulate=True)
    return total(counts).cpu()


@torch.no_grad()
def latency(network: nn.Module, images: Tensor) -> float:
    """Milliseconds for one image alone, on one thread: the median of some, the first left out."""
    before, network = torch.get_num_threads(), network.eval()
    torch.set_num_threads(1)
    times = []
    try:
        for place in range(SINGLE):
            image = images[place % len(images)][None]
            start = time.perf_counter()
            network(image)
            if image.is_cuda:
                torch.cuda.synchronize(image.device)
            times.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return 1e3 * statistics.median(times[1:])


def _first(loader: Loader) -> Tensor:
    return next(iter(loader))[0]


def _point(name: str, macs: float, result: Evaluation, latency_ms: float) -> Point:
    return Point(name, macs, result.top1, latency_ms, result.images_per_second)
