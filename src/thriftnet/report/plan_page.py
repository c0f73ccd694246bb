"""A plan as a page to read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from thriftnet import __version__
from thriftnet.core.spec import format_spec
from thriftnet.report import plots
from thriftnet.report.page import Page, Picture
from thriftnet.techniques import resolve

if TYPE_CHECKING:
    from thriftnet.core.plan import Plan

COLUMNS = ("layer", "now", "becomes", "group", "error of the weight", "error of the outputs")


def plan_page(model: str, plan: Plan) -> Page:
    """Layers, errors and counts of a plan for the network that is called ``model``."""
    steps = list(_steps(plan))
    summary = [f"{plan.name}: {plan.params_before:,} stored parameters become {plan.last.params_after:,}."]
    if plan.macs_before is not None and plan.last.macs_after is not None:
        summary.append(f"{plan.macs_before:,} multiply-accumulates for one image become {plan.last.macs_after:,}.")
    summary.append("Errors are relative, and before any training; 0 is the same layer.")
    rows = [
        [row.names[0], row.layer, row.becomes, str(row.group), _number(row.relative_error), _number(row.output_error)]
        for step in steps
        for row in step.rows
    ]
    pictures = [
        Picture(
            f"errors-{number}",
            "Errors layer by layer" + (f": {step.name.partition(',')[0]}" if len(steps) > 1 else ""),
            plots.layer_errors([row.names[0] for row in step.rows], [row.error for row in step.rows]),
            "Of the layer's outputs where they were measured, else of its weight.",
        )
        for number, step in enumerate(steps, 1)
    ]
    techniques = {f"technique {number}": format_spec(resolve(each.technique)) for number, each in enumerate(steps, 1)}
    return Page(f"Plan for {model}", summary, COLUMNS, rows, pictures, {**techniques, "thriftnet": __version__})


def _steps(plan: Plan) -> Iterator[Plan]:
    yield plan
    if plan.then is not None:
        yield from _steps(plan.then)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
