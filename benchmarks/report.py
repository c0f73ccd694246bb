"""What a benchmark gave: as rows, as JSON-ready dict, and as a picture."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from benchmarks.measuring import Fact, Measured, Target
from thriftnet.measure import latency
from thriftnet.measure.latency import Spread
from thriftnet.report.plots import COLOURS, MARKERS, figure, svg

GOOD, BAD, NEUTRAL = "#009E73", "#D50000", "#777777"


@dataclass(frozen=True)
class Row:
    """One ratio.

    Args:
        case: What was measured.
        what: Which variant against which.
        value, low, high: Median and quartiles.
        target: What it should be; None where nothing is asked, or not under these conditions.
    """

    topic: str
    case: str
    what: str
    value: float
    low: float
    high: float
    target: Target | None

    @property
    def quartiles(self) -> str:
        """The spread as text; empty if there is none."""
        return Spread(self.value, self.low, self.high).quartiles

    @property
    def bound(self) -> str:
        """The target in words."""
        return "" if self.target is None else str(self.target)

    @property
    def verdict(self) -> str:
        """Whether the target is met."""
        return "" if self.target is None else "met" if self.target.is_met(self.value) else "MISSED"


@dataclass
class Results:
    """Everything that was measured in one run.

    Args:
        conditions: Versions, machine class, allocator.
        fast_malloc: Whether the C library was told to keep memory: some targets hold with it only, some without only.
    """

    conditions: dict[str, str | int | bool]
    fast_malloc: bool
    measured: list[Measured] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)

    def rows(self) -> list[Row]:
        """Every ratio. A quick run has no targets: its sizes are not those that targets are for."""
        skipped, quick = "no mallopt" if self.fast_malloc else "mallopt", self.conditions["quick"]
        found = [
            Row(
                m.topic,
                m.name,
                f"{ratio.of} / {ratio.to}",
                spread.median,
                spread.low,
                spread.high,
                None if quick else ratio.target,
            )
            for m in self.measured
            for ratio, spread in m.ratios
            if ratio.condition != skipped
        ]
        return found + [
            Row(f.topic, f.name, "size", f.value, f.value, f.value, None if quick else f.target) for f in self.facts
        ]

    def missed(self) -> list[Row]:
        """Ratios on the wrong side of their target."""
        return [row for row in self.rows() if row.verdict == "MISSED"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "conditions": self.conditions,
            "rows": [{**asdict(row), "verdict": row.verdict} for row in self.rows()],
            "times": [
                {"topic": m.topic, "case": m.name, "ms": {name: asdict(spread) for name, spread in m.ms.items()}}
                for m in self.measured
            ],
            "missed": [row.bound for row in self.missed()],
        }


def conditions(allocator: str, quick: bool) -> dict[str, str | int | bool]:
    """What the numbers depend on."""
    return {**latency.conditions(), "threads": torch.get_num_threads(), "allocator": allocator, "quick": quick}


def picture(results: Results) -> str:
    """An SVG: ratios beside their targets, or for a sweep time against size."""
    return _sweep(results) if any(m.size is not None for m in results.measured) else _targets(results)


def _targets(results: Results) -> str:
    """One line per ratio that has a target: where it is, as a share of the bound, and on which side the good one lies."""
    rows = [row for row in results.rows() if row.target is not None] or results.rows()
    with figure(9.6, 1.2 + 0.42 * len(rows)) as drawn:
        axes = drawn.subplots()
        for place, row in enumerate(reversed(rows)):
            bound = row.target.bound if row.target else 1.0
            colour = {"met": GOOD, "MISSED": BAD}.get(row.verdict, NEUTRAL)
            axes.plot([row.low / bound, row.high / bound], [place, place], color=colour, linewidth=4, alpha=0.35)
            axes.plot([row.value / bound], [place], marker="o", color=colour, markersize=7)
            axes.annotate(
                f"{row.value:.3g}  ({row.bound or 'no target'})",
                (max(row.value, row.high) / bound, place),
                xytext=(8, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.axvline(1.0, color="#000000", linewidth=1)
        axes.set_yticks(range(len(rows)), [_label(row) for row in reversed(rows)], fontsize=7)
        _log_axis(axes, room=2.5)
        axes.set_xlabel("ratio as a share of its bound (line: the bound; '<=' is met to its left, '>=' to its right)")
        axes.set_title(_conditions(results), fontsize=8, loc="left")
        return svg(drawn)


def _log_axis(axes: Any, room: float) -> None:
    """A logarithmic x axis with powers of 2, or of 10 where there are many, and room for text on its right."""
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * room)
    base = 2 if right / left < 64 else 10
    ticks = [float(base) ** power for power in range(-20, 21) if left <= float(base) ** power <= right * room]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()


def floors(results: Results) -> str:
    """An SVG: for each case, how many times its floor takes what one would write, and what this library does."""
    cases = [(m, [(r, s) for r, s in m.ratios if r.to == m.ratios[0][0].to]) for m in results.measured if m.ratios]
    shown = [(m, found) for m, found in cases if {_is_ours(r.of) for r, _ in found} == {True, False}]
    with figure(9.6, 1.3 + 0.4 * len(shown)) as drawn:
        axes = drawn.subplots()
        for place, (_, found) in enumerate(reversed(shown)):
            best = min(spread.median for ratio, spread in found if _is_ours(ratio.of))
            worst = max(spread.median for ratio, spread in found if not _is_ours(ratio.of))
            axes.plot([best, worst], [place, place], color="#cccccc", linewidth=2, zorder=1)
            for ratio, spread in found:
                colour = GOOD if _is_ours(ratio.of) else NEUTRAL
                axes.plot([spread.median], [place], marker="o", color=colour, markersize=7, zorder=2)
            axes.annotate(
                f"{worst:.3g} x to {best:.3g} x", (worst, place), (8, 0), textcoords="offset points", va="center", fontsize=8
            )
        axes.axvline(1.0, color="#000000", linewidth=1)
        axes.set_yticks(range(len(shown)), [f"{m.name}\nfloor: {f[0][0].to}" for m, f in reversed(shown)], fontsize=7)
        _log_axis(axes, room=4)
        axes.set_xlabel("time as a multiple of the floor (line); grey: what one would write, green: thriftnet")
        axes.set_title(_conditions(results), fontsize=8, loc="left")
        return svg(drawn)


def _is_ours(variant: str) -> bool:
    return variant.startswith("thriftnet")


def _label(row: Row) -> str:
    return f"{row.case}\n{row.what}"


def _sweep(results: Results) -> str:
    """Time against size, a panel for each topic and layout; the floor is the dashed line."""
    groups: dict[str, list[Measured]] = {}
    for measured in results.measured:
        layout = next((name for name in ("NCHW", "channels_last") if measured.name.endswith(name)), "")
        groups.setdefault(f"{measured.topic} {layout}".strip(), []).append(measured)
    columns = min(3, len(groups))
    lines = -(-len(groups) // columns)
    with figure(4.6 * columns, 3.7 * lines) as drawn:
        panels = list(drawn.subplots(lines, columns, squeeze=False).flat)
        for axes in panels[len(groups) :]:
            axes.set_axis_off()
        for axes, (title, found) in zip(panels, groups.items(), strict=False):
            for number, name in enumerate(found[0].ms):
                is_floor = name == found[0].ratios[0][0].to
                axes.plot(
                    [m.size for m in found],
                    [m.ms[name].median for m in found],
                    label=name,
                    color=COLOURS[number % 7],
                    marker=MARKERS[number % 7],
                    markersize=4,
                    linestyle="--" if is_floor else "-",
                )
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_title(title, fontsize=9)
            axes.set_xlabel(SWEPT.get(found[0].topic, "size"))
            axes.set_ylabel("ms")
            axes.legend(frameon=False, fontsize=7)
        drawn.suptitle(_conditions(results), fontsize=8)
        return svg(drawn)


SWEPT = {
    "shift": "height and width of 144 maps, 32 images",
    "soft-sharing": "layers and templates of 160 x 160 x 3 x 3",
    "filter-basis": "channels, 16 images of 32 x 32",
    "weight-sharing": "channels of a weight for 2 layers, from 4",
    "deploy": "channels of a 1 x 1 convolution, 14 x 14",
}


def _conditions(results: Results) -> str:
    return ", ".join(f"{key} {value}" for key, value in results.conditions.items() if key != "quick")
