"""`thriftnet evaluate`: accuracy and loss of a network on labelled images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import add_width_options, chosen_width, emit, new_parser, numbers, parse_with_kwargs, write_text
from thriftnet.cli.inputs import add_image_options, augmentation_of, limited, network_of
from thriftnet.cli.machine import use_machine
from thriftnet.errors import ConfigError, IncompatibleModelError
from thriftnet.text import table

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from torch import nn

    from thriftnet.data.dataset import DataSource
    from thriftnet.data.loaders import Loader
    from thriftnet.train.evaluate import Evaluation

SHOWN = 20  # most classes that are listed
CALIBRATION = 2048  # training images on which the cost of a budget is found


def run(arguments: Sequence[str]) -> None:
    options, kwargs = parse_with_kwargs(_parser(), arguments)
    ks = numbers(options.topk, int, "--topk", "1,5")
    if min(ks) < 1 or (options.limit is not None and options.limit < 1) or options.batch_size < 1:
        raise ConfigError("--topk, --limit and --batch-size: expected integers >= 1")
    for option in ("confusion_plot", "plot", "sweep_budget"):
        if options[option] is not None and options[option].suffix != ".svg":
            raise ConfigError(f"--{option.replace('_', '-')} {options[option]}: give a name that ends in .svg")
    width = chosen_width(options)

    from thriftnet.core.width import set_width
    from thriftnet.data.loaders import make_loader
    from thriftnet.data.sources import open_data
    from thriftnet.train.distributed import joined, process_group

    use_machine(options, options.batch_size)
    model = network_of(options.model, kwargs, options.plain)
    if width:
        set_width(model, **width)
    source = open_data(options.data, on_corrupt=options.on_corrupt)
    split = source.split(options.split)
    # without a test split, val replaces it
    options.split = next(name for name, images in source.splits.items() if images is split)
    images = limited(split, options.limit)
    common: Any = {
        "augmentation": augmentation_of(options, source, images, model),
        "train": False,
        "workers": options.workers,
    }
    with process_group(options.device) as device:
        rank, world_size = joined()
        common["device"] = device
        loader = make_loader(images, options.batch_size, rank=rank, world_size=world_size, **common)
        if options.mode is not None or options.sweep_budget is not None:
            from thriftnet.cli.evaluate_widths import measure_widths

            calibration = make_loader(limited(source.split("train"), CALIBRATION), options.batch_size, **common)
            text, measured = measure_widths(model.to(device), loader, calibration, source.classes, options)
            if rank == 0:
                emit(text, {"model": options.model, "data": options.data, **measured}, as_json=options.json)
            return
        result = _measure(model.to(device), loader, source, ks, options, quiet=rank > 0)
    if rank > 0:
        return
    _warn(source, model)
    if options.confusion_plot is not None:
        from thriftnet.report.confusion import confusion_matrix

        write_text(options.confusion_plot, confusion_matrix(result.confusion or (), result.classes))
    facts_of_run = {"model": options.model, "data": options.data, "split": options.split, "skipped": list(source.skipped)}
    emit(_text(options, result), {**facts_of_run, **result.to_dict()}, as_json=options.json)


def _parser() -> ArgumentParser:
    parser = new_parser(
        "evaluate",
        "Measure the accuracy of a network; on several processes: torchrun --nproc-per-node N -m thriftnet evaluate ...",
        takes_model=True,
    )
    add = parser.add_argument
    add("--split", default="test", help="train, val or test, which is val where there is no test split")
    add("--topk", metavar="K,K", default="1,5", help="which accuracies")
    add("--confusion", action="store_true", help="print the confusion matrix")
    add("--confusion-plot", metavar="FILE.svg", type=Path, help="draw the confusion matrix")
    add_width_options(parser)
    add(
        "--mode",
        metavar="all|dynamic|width[=W]",
        help="accuracy, MACs and latency of every width, by the gate, or at one width (W, or as --width and --width-index say)",
    )
    add("--budget", metavar="N", help="with --mode dynamic: mean multiply-accumulates that the gate may spend, as 300M")
    add("--plot", metavar="FILE.svg", type=Path, help="with --mode: accuracy over MACs, or the gate's decisions by class")
    add(
        "--sweep-budget",
        metavar="FILE.svg",
        type=Path,
        help="the gate at budgets from narrowest to widest, beside fixed widths",
    )
    add_image_options(parser)
    return parser


def _measure(
    model: nn.Module, loader: Loader, source: DataSource, ks: Sequence[int], options: Namespace, *, quiet: bool
) -> Evaluation:
    from torch import OutOfMemoryError

    from thriftnet.train.evaluate import evaluate

    confusion = options.confusion or options.confusion_plot is not None
    with _bar(loader.images_per_epoch, quiet) as on_batch:
        try:
            return evaluate(model, loader, topk=ks, confusion=confusion, classes=source.classes, on_batch=on_batch)
        except OutOfMemoryError:
            raise ConfigError(f"--batch-size {options.batch_size} does not fit into memory: take a smaller one") from None
        except RuntimeError as error:
            raise IncompatibleModelError(f"the network does not take these images: {str(error).splitlines()[0]}") from error


@contextmanager
def _bar(total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar on a terminal."""
    if quiet or not sys.stderr.isatty():
        yield lambda seen: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("images", total=total)
        yield lambda seen: progress.update(task, completed=seen)


def _warn(source: DataSource, model: nn.Module) -> None:
    """Warn of images left out, and of other classes."""
    from thriftnet.core.provenance import data_facts

    if source.skipped:
        sys.stderr.write(f"thriftnet evaluate: {len(source.skipped)} broken images are left out, as {source.skipped[0]}\n")
    names = data_facts(model).class_names
    if names is not None and names != tuple(source.classes):
        sys.stderr.write("thriftnet evaluate: the network was trained for classes of other names, or in another order\n")


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
    return "\n".join([*lines, table(["class", "top-1, %"], [[name, round(share, 2)] for name, share in ranked])])


def _confusion_text(confusion: Sequence[Sequence[int]], classes: Sequence[str]) -> str:
    """The matrix, or its largest entries where there are many classes."""
    if len(classes) <= SHOWN:
        return table(["class \\ predicted", *classes], [[name, *row] for name, row in zip(classes, confusion, strict=True)])
    mistakes = [(count, i, j) for i, row in enumerate(confusion) for j, count in enumerate(row) if i != j and count]
    rows = [[classes[i], classes[j], count] for count, i, j in sorted(mistakes, key=lambda entry: -entry[0])[:SHOWN]]
    return table(["class", "predicted", "images"], rows)
