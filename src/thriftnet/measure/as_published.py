"""FLOPs as the papers count them, which differs from the multiply-accumulates counted here: to compare with published tables."""

from __future__ import annotations

import math
from collections.abc import Callable

from thriftnet.measure.report import LayerRow, Report
from thriftnet.models.entry import ModelEntry


def published_flops(report: Report, entry: ModelEntry) -> tuple[int, str] | None:
    """A network's FLOPs by its paper's definition, and that definition; None for papers that state none.

    Args:
        report: Of a network of the zoo.
        entry: What the zoo knows of it.

    Sources: README of alvinwan/shiftresnet-cifar, and count.py there before August 2018; README of ssregibility/Net_RL2.
    """
    for paper, count in RULES.items():
        if entry.paper.startswith(paper):
            return count(report), str(count.__doc__)
    return None


def _shift(report: Report) -> int:
    """MACs, with the stem counted as 3 x 3 filters of one input channel and as many outputs as the last stage"""
    stem, *_ = (row for row in report.rows if row.kind == "Conv2d")
    *_, head = (row for row in report.rows if row.kind == "Linear")
    _, _, height, width = stem.output or (0, 0, 0, 0)
    channels = head.macs // math.prod(head.output or (1,))
    return report.macs - stem.macs + 9 * height * width * channels


def _filter_basis(report: Report) -> int:
    """2 x (MACs + 2 per element of a batch norm)"""
    return 2 * (report.macs + 2 * sum(map(_elements, (row for row in report.rows if row.kind == "BatchNorm2d"))))


def _elements(row: LayerRow) -> int:
    return row.calls * math.prod(row.output or (0,))


RULES: dict[str, Callable[[Report], int]] = {"Wu et al., Shift": _shift, "Kang & Kim": _filter_basis}
