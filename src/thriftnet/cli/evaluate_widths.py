"""`thriftnet evaluate --mode ...` and ``--sweep-budget``: accuracy and cost of a network of several widths."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import mul
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from thriftnet.cli.common import chosen_width
from thriftnet.cli.machine import one_thread
from thriftnet.cli.options import width_from
from thriftnet.cli.output import write_text
from thriftnet.core.probe import Size
from thriftnet.core.processes import total
from thriftnet.core.width import format_width, set_width, widths
from thriftnet.core.width import width as width_of
from thriftnet.data.loaders import Loader
from thriftnet.dynamic.network import DynamicNetwork
from thriftnet.errors import ConfigError, IncompatibleModelError
from thriftnet.measure import inspect
from thriftnet.measure.latency import time_rounds
from thriftnet.report import plots
from thriftnet.text import short_count, shortened, table
from thriftnet.train.distributed import total_counts
from thriftnet.train.evaluate import evaluate

if TYPE_CHECKING:
    from argparse import Namespace

SINGLE = 20  # calls with one image that are timed
BUDGETS = 7  # in a sweep
SHOWN = 20  # most classes whose decisions are printed; JSON has all
NAME = 24  # most characters of a class's name


@dataclass(frozen=True)
class Point:
    """One way to run a network: the width or budget, mean MACs per image, accuracy in percent, and speed."""

    name: str
    macs: float
    accuracies: dict[int, float]  # by k
    latency_ms: float  # one image
    images_per_second: float  # in batches

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with ``top1`` and so on."""
        fields = asdict(self)
        return fields | {f"top{k}": accuracy for k, accuracy in fields.pop("accuracies").items()}


def measure_widths(
    model: nn.Module, loader: Loader, calibration: Loader, classes: Sequence[str], options: Namespace
) -> tuple[str, dict[str, Any]]:
    """The result as text and for JSON; the cost of a budget is found on ``calibration``, training images."""
    if not widths(model):
        raise IncompatibleModelError(f"{type(model).__name__} has one width only: leave --mode and --sweep-budget out")
    mode, _, chosen = (options.mode or "").partition("=")
    if chosen_width(options) and (mode, chosen) != ("width", ""):
        raise ConfigError("--width and --width-index go with --mode width, or with no mode")
    if options.sweep_budget is not None:
        dynamic = DynamicNetwork(model, input_size=_size(loader)).eval()
        budgets = _by_budget(dynamic, loader, calibration, options.topk)
        names = {format_width(width) for width in dynamic.widths}
        fixed = [point for point in _every_width(model, loader, options.topk) if point.name in names]
        write_text(options.sweep_budget, _curves({"by the gate": budgets, "fixed widths": fixed}))
        rows = {"budgets": [point.to_dict() for point in budgets], "widths": [point.to_dict() for point in fixed]}
        return _text([*budgets, *fixed]), {**rows, "plot": str(options.sweep_budget)}
    if options.budget is not None and mode != "dynamic":
        raise ConfigError("--budget goes with --mode dynamic")
    if mode == "all" and not chosen:
        points = _every_width(model, loader, options.topk)
        if options.plot is not None:
            write_text(options.plot, _curves({"fixed widths": points}))
        return _text(points), {"widths": [point.to_dict() for point in points]}
    if mode == "width":
        if chosen:
            set_width(model, width_from(chosen))
        point = _one_width(model, loader, options.topk)
        return _text([point]), point.to_dict()
    if mode == "dynamic" and not chosen:
        return _dynamic(model, loader, calibration, classes, options)
    raise ConfigError(f"--mode {options.mode}: expected all, dynamic, width, or width=W with a width of the network")


def _dynamic(
    model: nn.Module, loader: Loader, calibration: Loader, classes: Sequence[str], options: Namespace
) -> tuple[str, dict[str, Any]]:
    """By the gate, within a budget if one is given, with the decisions for each class."""
    dynamic = DynamicNetwork(model, input_size=_size(loader)).eval()
    if options.budget is not None:
        dynamic.set_budget(options.budget, calibration)
    point = _by_gate(dynamic, loader, options.topk)
    counts = _decisions_by_class(dynamic, loader, len(classes))
    names = [format_width(width) for width in dynamic.widths]
    if options.plot is not None:
        write_text(options.plot, plots.decisions(counts, classes, names))
    spent = [sum(map(mul, row, dynamic.macs.tolist())) / max(sum(row), 1) for row in counts]
    which, order = "each class", list(range(len(classes)))
    if len(classes) > SHOWN:
        which, order = f"the {SHOWN} classes that cost most", sorted(order, key=lambda i: -spent[i])[:SHOWN]
    rows = [[shortened(classes[i], NAME), *counts[i]] for i in order]
    text = f"{_text([point])}\n\nimages of {which} by the width chosen:\n{table(['class', *names], rows)}"
    by_class = {name: dict(zip(names, row, strict=True)) for name, row in zip(classes, counts, strict=True)}
    return text, {**point.to_dict(), "cost": dynamic.cost, "decisions": by_class}


def _size(loader: Loader) -> Size:
    """(C, H, W) of the images."""
    _, channels, height, width = next(iter(loader))[0].shape
    return channels, height, width


def _curves(curves: Mapping[str, Sequence[Point]]) -> str:
    pairs = {name: [(point.macs, point.accuracies[1]) for point in points] for name, points in curves.items()}
    return plots.accuracy_against_macs(pairs)


def _text(points: Sequence[Point]) -> str:
    accuracies = [f"top-{k}, %" for k in points[0].accuracies]
    rows = [
        [
            p.name,
            round(p.macs),
            *(f"{a:.2f}" for a in p.accuracies.values()),
            f"{p.latency_ms:.2f}",
            f"{p.images_per_second:,.0f}",
        ]
        for p in points
    ]
    return table(("width", "MACs", *accuracies, "ms for one image", "images/s"), rows)


def _every_width(model: nn.Module, loader: Loader, topk: Sequence[int]) -> list[Point]:
    """Each width of a slimmable network; the selected width is restored."""
    before, points = width_of(model), []
    for width in widths(model):
        set_width(model, width)
        points.append(_one_width(model, loader, topk))
    set_width(model, before)
    return points


def _one_width(model: nn.Module, loader: Loader, topk: Sequence[int]) -> Point:
    """The selected width of a slimmable network."""
    result, macs = evaluate(model, loader, topk=topk), inspect(model, _size(loader)).macs
    name = format_width(width_of(model))
    return Point(name, macs, result.accuracies, _latency(model, loader), result.images_per_second)


def _by_gate(dynamic: DynamicNetwork, loader: Loader, topk: Sequence[int], name: str = "gate") -> Point:
    """The widths that the gate chooses."""
    dynamic.reset()
    result = evaluate(dynamic, loader, topk=topk)
    total_counts(dynamic)
    macs = dynamic.mean_macs
    return Point(name, macs, result.accuracies, _latency(dynamic, loader), result.images_per_second)


def _by_budget(dynamic: DynamicNetwork, loader: Loader, calibration: Loader, topk: Sequence[int]) -> list[Point]:
    """The gate at budgets from its narrowest width to its widest, without training; its cost is restored."""
    before, points = dynamic.cost, []
    low, high = float(dynamic.macs.min()), float(dynamic.macs.max())
    for budget in torch.linspace(low, high, BUDGETS).tolist():
        dynamic.set_budget(min(max(budget, low), high), calibration)
        points.append(_by_gate(dynamic, loader, topk, f"budget {short_count(budget)}"))
    dynamic.cost = before
    return points


@torch.no_grad()
def _decisions_by_class(dynamic: DynamicNetwork, loader: Loader, classes: int) -> list[list[int]]:
    """How many images of each class take each width."""
    counts = torch.zeros(classes, len(dynamic.widths), dtype=torch.int64, device=loader.device)
    for images, labels in loader:
        counts.index_put_((labels, dynamic.decisions(images)), torch.ones_like(labels), accumulate=True)
    decided: list[list[int]] = total(counts).tolist()
    return decided


@torch.no_grad()
def _latency(network: nn.Module, loader: Loader) -> float:
    """Milliseconds for one image, on one thread: the median over some."""
    images = next(iter(loader))[0]
    network, image = network.eval(), itertools.cycle(images[:, None])
    with one_thread():
        seconds = time_rounds({"one": lambda: network(next(image))}, SINGLE, device=str(images.device), turn=0)
    return 1e3 * statistics.median(seconds["one"])
