"""What a network of several widths, or with a gate, gives for its multiply-accumulates: width by width, by the gate, by budget."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from thriftnet.core.width import format_width, set_width, widths
from thriftnet.core.width import width as width_of
from thriftnet.data.loaders import Loader
from thriftnet.dynamic.network import DynamicNetwork
from thriftnet.measure import inspect
from thriftnet.train.evaluate import Evaluation, evaluate

SINGLE = 20  # images that are timed one by one


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
    counts = summed(dynamic.counts)
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
    return summed(counts).cpu()


def summed(counts: Tensor) -> Tensor:
    """Over all processes."""
    counts = counts.clone()
    if dist.is_initialized():
        dist.all_reduce(counts)
    return counts


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


def as_dicts(points: Sequence[Point]) -> list[dict[str, Any]]:
    """JSON-ready."""
    return [{name: getattr(point, name) for name in Point.__dataclass_fields__} for point in points]


def _first(loader: Loader) -> Tensor:
    return next(iter(loader))[0]


def _point(name: str, macs: float, result: Evaluation, latency_ms: float) -> Point:
    return Point(name, macs, result.top1, latency_ms, result.images_per_second)
