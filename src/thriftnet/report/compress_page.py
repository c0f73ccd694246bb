"""The report of a compression."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thriftnet import __version__
from thriftnet.core.spec import format_spec
from thriftnet.report import plots
from thriftnet.report.page import Page, Picture
from thriftnet.techniques import resolve

if TYPE_CHECKING:
    from thriftnet.core.plan import Plan

COLUMNS = ("network", "accuracy", "stored parameters", "MACs", "bytes", "time, one image", "time, 64 images")
CAPTIONS = {
    "plain": "plain",
    "fitted": "converted and fitted",
    "trained": "trained: model/",
    "folded": "plain layers: folded/",
}


def compress_page(result: Mapping[str, Any], plan: Plan, training: Sequence[Mapping[str, Any]]) -> Page:
    """What came of each step.

    Args:
        result: As JSON.
        plan: What was converted, and how.
        training: The metrics of the training's epochs.
    """
    rows = result["rows"]
    plain, trained = rows[0], rows[2]
    kind = "accuracy" if result["labelled"] else "agreement with the plain network"
    summary = [
        f"{plan.name}: {trained['top1']:.2f}% {kind} instead of {plain['top1']:.2f}%, with {_share(trained, plain, 'params')} of the "
        f"parameters, {_share(trained, plain, 'macs')} of the MACs, and {_share(trained, plain, 'size_bytes')} of the bytes.",
        "Accuracies are of the test images, which chose nothing. Times are of the CPU, as a multiple of the plain network's.",
    ]
    steps = [plan] if plan.then is None else [plan, plan.then]
    pictures = [
        Picture(
            "accuracy",
            "Accuracy after each step",
            plots.accuracy_against_params(
                [CAPTIONS[row["name"]] for row in rows], [row["params"] for row in rows], [row["top1"] for row in rows]
            ),
            "Further left stores less; the dotted line is the plain network.",
        ),
        Picture("training", "Training", plots.run_curves(training), "Accuracy of the held-out training images."),
        *(
            Picture(
                f"errors-{number}",
                "Errors layer by layer, after the fit",
                plots.layer_errors([row.names[0] for row in step.rows], [row.error for row in step.rows]),
                "Of each layer's outputs, relative, before any training.",
            )
            for number, step in enumerate(steps, 1)
        ),
    ]
    tried = ", ".join(f"{rate}: {top1:.2f}%" for rate, top1 in result["rates"].items())
    facts = {
        "technique": "; then ".join(format_spec(resolve(step.technique)) for step in steps),
        "learning rate": f"{result['rate']:g}"
        + (f" (of {tried} on held-out images, after short trainings)" if tried else ""),
        "seconds": ", ".join(f"{name} {seconds:.0f}" for name, seconds in result["seconds"].items()),
        "thriftnet": __version__,
    }
    return Page("Compression", summary, COLUMNS, [_cells(row) for row in rows], pictures, facts)


def _cells(row: Mapping[str, Any]) -> list[str]:
    times = [f"{row['times'][batch]:.2f} x" if batch in row["times"] else "" for batch in ("1", "64")]
    return [
        CAPTIONS[row["name"]],
        f"{row['top1']:.2f}%",
        f"{row['params']:,}",
        f"{row['macs']:,}",
        f"{row['size_bytes']:,}",
        *times,
    ]


def _share(row: Mapping[str, Any], plain: Mapping[str, Any], name: str) -> str:
    return f"{row[name] / plain[name]:.0%}"
