"""FLOPs as the papers count them, which differs from the multiply-accumulates counted here: to compare with published tables."""

from __future__ import annotations

import math
from collections.abc import Callable

from thriftnet.measure.report import Report


def published_flops(report: Report, paper: str) -> tuple[int, str] | None:
    """FLOPs of a network of the zoo by the definition of its ``paper``, and that definition; None for papers that state none.

    Sources: README of alvinwan/shiftresnet-cifar, and count.py there before August 2018; README of ssregibility/Net_RL2.
    """
    for start, count in RULES.items():
        if paper.startswith(start):
            return count(report), str(count.__doc__)
    return None


def _shift(report: Report) -> int:
    """MACs, with the stem counted as 3 x 3 filters of one input channel and as many outputs as the last stage"""
    stem = next(row for row in report.rows if row.macs)
    *_, channels = (row.output[1] for row in report.rows if row.output and len(row.output) == 4)
    return report.macs - stem.macs + 9 * math.prod((stem.output or ())[2:]) * channels


def _filter_basis(report: Report) -> int:
    """2 x (MACs + 2 per element of a batch norm)"""
    elements = sum(row.calls * math.prod(row.output or (0,)) for row in report.rows if row.kind == "BatchNorm2d")
    return 2 * (report.macs + 2 * elements)


RULES: dict[str, Callable[[Report], int]] = {"Wu et al., Shift": _shift, "Kang & Kim": _filter_basis}
