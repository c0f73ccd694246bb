"""`thriftnet evaluate`: accuracy and loss of a network on labelled images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thriftnet.arguments import Classes
from thriftnet.cli.common import Parser, chosen_width, parse_with_kwargs
from thriftnet.cli.inputs import open_inputs
from thriftnet.cli.options import IMAGE_OPTIONS, quantity, reads, svg_file
from thriftnet.cli.output import emit, has_terminal, is_main_process, say, write_text
from thriftnet.errors import ConfigError, IncompatibleModelError, first_line
from thriftnet.text import shortened, table

if TYPE_CHECKING:
    from argparse import Namespace

    from torch import nn

    from thriftnet.data.dataset import DataSource
    from thriftnet.data.loaders import Loader
    from thriftnet.train.evaluate import Evaluation

SHOWN = 20  # most classes that are listed
NAME = 40  # most characters of a class's name in a table
CALIBRATION = 2048  # training images on which the cost of a budget is found


def run(arguments: Sequence[str]) -> None:
    options, kwargs = parse_with_kwargs(_parser(), arguments)
    width = chosen_width(options)
    for name in ("budget", "plot"):
        if getattr(options, name) is not None and options.mode is None:
            raise ConfigError(f"--{name} goes with --mode: give --mode dynamic or all, or leave it out")

    from thriftnet.core.processes import failing_together, joined
    from thriftnet.core.width import set_width
    from thriftnet.train.distributed import process_group

    with process_group(options.device) as device:
        rank, world_size = joined()
        with failing_together():
            model, source, loader_of = open_inputs(options, kwargs, options.split, device)
        with failing_together():
            source.require_labels("evaluate")
        classes = len(source.classes)
        if options.topk is None:
            options.topk = (1, 5) if classes > 5 else (1,)
        if max(options.topk) > classes:
            raise ConfigError(f"--topk {max(options.topk)}: the data has {classes} classes")
        if width:
            set_width(model, **width)
        split = source.split(options.split)
        # without a test split, val replaces it
        options.split = next(name for name, images in source.splits.items() if images is split)
        with failing_together():
            loader = loader_of(split, options.limit, rank=rank, world_size=world_size)
        if options.mode is not None or options.sweep_budget is not None:
            from thriftnet.cli.evaluate_widths import measure_widths

            calibration = loader_of(source.split("train"), CALIBRATION)
            text, measured = measure_widths(model, loader, calibration, source.classes, options)
        else:
            text, measured = _measure(model, loader, source, options)
    emit(text, {"model": options.model, "data": options.data, **measured}, as_json=options.json)


def _parser() -> Parser:
    description = (
        "Measure the accuracy of a network; on several processes: torchrun --nproc-per-node N -m thriftnet evaluate ..."
    )
    parser = Parser("evaluate", description, "model")
    add = parser.add_argument
    add("--split", default="test", metavar="NAME", help="train, val or test, which is val where there is no test split")
    topk = "which accuracies; default: 1,5, or 1 for up to five classes"
    add("--topk", type=reads(tuple[Classes, ...]), metavar="K,K", help=topk)
    add("--confusion", action="store_true", help="print the confusion matrix")
    drawing: Any = {"type": svg_file, "metavar": "FILE.svg"}
    add("--confusion-plot", help="draw the confusion matrix", **drawing)
    parser.add_shared("--width", "--width-index")
    add(
        "--mode",
        metavar="all|dynamic|width[=W]",
        help="accuracy, MACs and latency of every width, by the gate, or at one width (W, or as --width and --width-index say)",
    )
    add("--budget", type=quantity, metavar="N", help="with --mode dynamic: mean MACs that the gate may spend, as 300M")
    add("--plot", help="with --mode: accuracy over MACs, or the gate's decisions by class", **drawing)
    add("--sweep-budget", help="the gate at budgets from narrowest to widest, beside fixed widths", **drawing)
    parser.add_shared(*IMAGE_OPTIONS)
    return parser


def _measure(model: nn.Module, loader: Loader, source: DataSource, options: Namespace) -> tuple[str, dict[str, Any]]:
    """The result at one width, as text and for JSON; with a progress bar on a terminal."""
    from rich.console import Console
    from rich.progress import Progress
    from torch import OutOfMemoryError

    from thriftnet.report.plots import confusion_matrix
    from thriftnet.train.evaluate import evaluate

    confusion = options.confusion or options.confusion_plot is not None
    with Progress(console=Console(stderr=True), transient=True, disable=not has_terminal()) as bar:
        task = bar.add_task("images", total=loader.images_per_epoch)
        how: Any = {"topk": options.topk, "confusion": confusion, "classes": source.classes}
        try:
            result = evaluate(model, loader, **how, on_batch=lambda seen: bar.update(task, completed=seen))
        except OutOfMemoryError:
            raise ConfigError(f"--batch-size {options.batch_size} does not fit into memory: take a smaller one") from None
        except RuntimeError as error:
            raise IncompatibleModelError(f"the network does not take these images: {first_line(error)}") from error
    if is_main_process():
        _warn(source, model)
        if options.confusion_plot is not None:
            write_text(options.confusion_plot, confusion_matrix(result.confusion or (), result.classes))
    return _text(options, result), {"split": options.split, "skipped": list(source.skipped), **result.to_dict()}


def _warn(source: DataSource, model: nn.Module) -> None:
    """Warn of images left out, and of other classes."""
    from thriftnet.core.provenance import data_facts

    if source.skipped:
        say(f"thriftnet evaluate: {len(source.skipped)} broken images are left out, as {source.skipped[0]}")
    names = data_facts(model).class_names
    if names is not None and names != tuple(source.classes):
        say("thriftnet evaluate: the network was trained for classes of other names, or in another order")


def _text(options: Namespace, result: Evaluation) -> str:
    """The result as text."""
    accuracies = ", ".join(f"top-{k} {accuracy:.2f} %" for k, accuracy in result.accuracies.items())
    lines = [
        f"{options.model} on {options.data}, {options.split}: {result.images:,} images",
        f"{accuracies}, loss {result.loss:.4f}, {result.images_per_second:,.0f} images/s",
        "",
    ]
    if result.confusion is not None:
        return "\n".join([*lines, _confusion_text(result.confusion, result.classes)])
    ranked = [(name, share) for name, share in zip(result.classes, result.per_class, strict=True) if share is not None]
    if len(ranked) > SHOWN:
        ranked = sorted(ranked, key=lambda entry: entry[1])[:SHOWN]
        lines.append(f"the {SHOWN} worst classes:")
    return "\n".join(
        [*lines, table(["class", "top-1, %"], [[shortened(name, NAME), round(share, 2)] for name, share in ranked])]
    )


def _confusion_text(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """The matrix, or its largest entries where there are many classes."""
    classes = [shortened(name, NAME) for name in classes]
    if len(classes) <= SHOWN:
        return table(["class \\ predicted", *classes], [[name, *row] for name, row in zip(classes, confusion, strict=True)])
    mistakes = [(count, i, j) for i, row in enumerate(confusion) for j, count in enumerate(row) if i != j and count]
    rows = [[classes[i], classes[j], count] for count, i, j in sorted(mistakes, key=lambda entry: -entry[0])[:SHOWN]]
    return table(["class", "predicted", "images"], rows)
