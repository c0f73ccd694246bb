"""`thriftnet evaluate --mode ...` and ``--sweep-budget``: what a network of several widths gives for its multiply-accumulates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from thriftnet.cli.common import literal, quantity
from thriftnet.core.width import format_width, set_width, widths
from thriftnet.data.loaders import Loader
from thriftnet.dynamic.network import DynamicNetwork
from thriftnet.errors import ConfigError, IncompatibleModelError
from thriftnet.report import plots
from thriftnet.text import table
from thriftnet.train.widths import Point, as_dicts, by_budget, by_gate, decisions_by_class, every_width, one_width

if TYPE_CHECKING:
    from jsonargparse import Namespace

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
        return _text(points), {"widths": as_dicts(points)}
    if mode == "width" and chosen:
        set_width(model, literal(chosen))
        point = one_width(model, loader)
        return _text([point]), as_dicts([point])[0]
    if mode == "dynamic" and not chosen:
        return _dynamic(model, loader, calibration, classes, options)
    raise ConfigError(f"--mode {options.mode}: possible are all, dynamic, and width=W with a width of the network")


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
    return text, {**as_dicts([point])[0], "cost": dynamic.cost, "decisions": by_class}


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
    return _text([*budgets, *fixed]), {"budgets": as_dicts(budgets), "widths": as_dicts(fixed), "plot": str(path)}


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
    try:
        path.write_text(picture())
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
