"""`thriftnet evaluate`: how well a network classifies."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import emit, literal, new_parser, open_network, parse_with_kwargs
from thriftnet.errors import ConfigError, IncompatibleModelError
from thriftnet.text import table

if TYPE_CHECKING:
    import torch
    from jsonargparse import ArgumentParser, Namespace
    from torch import nn

    from thriftnet.data.dataset import DataSource, ImageDataset
    from thriftnet.data.loaders import Loader
    from thriftnet.data.transforms import Augmentation
    from thriftnet.train.evaluate import Evaluation

SHOWN = 20  # more classes than that are not listed
FACTS = ("resize", "crop_pct", "eval_interpolation")  # of a folder's metadata: how images come to its input size


def run(arguments: Sequence[str]) -> None:
    options, kwargs = parse_with_kwargs(_parser(), arguments)
    ks = _numbers(options.topk, int, "--topk", "1,5")
    if min(ks) < 1 or (options.limit is not None and options.limit < 1) or options.batch_size < 1:
        raise ConfigError("--topk, --limit and --batch-size take whole numbers from 1")
    if options.confusion_plot is not None and options.confusion_plot.suffix != ".svg":
        raise ConfigError(f"--confusion-plot {options.confusion_plot}: give a name that ends in .svg")

    from thriftnet.core.width import set_width
    from thriftnet.data.sources import open_data

    model, facts = _network(options.model, kwargs)
    if options.width is not None:
        set_width(model, literal(options.width))
    source = open_data(options.data, on_corrupt=options.on_corrupt)
    split = source.split(options.split)
    options.split = next(name for name, images in source.splits.items() if images is split)  # val may stand for test
    images = _limited(split, options.limit)
    augmentation = _augmentation(options, facts, source, images, model)
    with _processes(options.device) as (device, rank, world_size):
        loader = _loader(images, augmentation, options, device, rank, world_size)
        result = _measure(model.to(device), loader, source, ks, options, quiet=rank > 0)
    if rank > 0:
        return
    _warn(source, facts)
    if options.confusion_plot is not None:
        _draw(options.confusion_plot, result)
    facts_of_run = {"model": options.model, "data": options.data, "split": options.split, "skipped": list(source.skipped)}
    emit(_text(options, result), {**facts_of_run, **result.to_dict()}, as_json=options.json)


def _parser() -> ArgumentParser:
    parser = new_parser(
        "evaluate",
        "Measure how well a network classifies; on several processes: torchrun --nproc-per-node N -m thriftnet evaluate ...",
        takes_model=True,
    )
    add = parser.add_argument
    add("--data", metavar="D", required=True, help="digits, cifar10:DIR, cifar100:DIR, folder:DIR or parquet:DIR")
    add("--split", default="test", help="train, val or test (default; val where there is no test)")
    add("--topk", metavar="K,K", default="1,5", help="which accuracies (1,5)")
    add("--confusion", action="store_true", help="count what is taken for what")
    add("--confusion-plot", metavar="FILE.svg", type=Path, help="the same as a picture")
    add("--width", help="of a slimmable network: 0.5, a position, smallest or largest")
    add("--batch-size", type=int, default=256)
    add("--device", help="left out: a GPU where there is one")
    add("--mean", metavar="M,M,M", help="of each channel, in [0, 1]; left out, what the folder says, else the data's")
    add("--std", metavar="S,S,S", help="the same")
    add("--image-size", type=int, metavar="PIXELS", help="left out: what the folder says, else as stored")
    add("--resize", type=int, metavar="PIXELS", help="shorter side before a centre crop of the image size")
    add("--limit", type=int, metavar="N", help="only N images, evenly spread over the split")
    add("--workers", type=int, default=0, metavar="N", help="processes that decode images")
    add("--on-corrupt", choices=["error", "skip"], default="error", help="what to do about images that cannot be decoded")
    return parser


def _network(place: str, kwargs: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and what its folder or file says about its images: mean, std, input_size, class_names."""
    path = Path(place)
    if path.is_file() and not kwargs:
        from thriftnet.interop.importer import import_checkpoint

        imported = import_checkpoint(path)
        return imported.model, _facts(imported.preprocessing)
    if (path / "run.json").is_file():
        path = path / "model"
    if path.is_dir():
        from thriftnet.interop.checkpoints import read_config

        config = read_config(path)
        return open_network(str(path), kwargs), _facts(config["metadata"] | config)
    return open_network(place, kwargs), {}


def _facts(stated: Mapping[str, Any]) -> dict[str, Any]:
    known = ("input_size", "class_names", "classes", "mean", "std", *FACTS)
    return {key: stated[key] for key in known if stated.get(key) is not None} | (stated.get("normalisation") or {})


def _augmentation(
    options: Namespace, facts: Mapping[str, Any], source: DataSource, images: ImageDataset, model: nn.Module
) -> Augmentation:
    """How images become inputs: as the options say, else the folder, else the data."""
    from thriftnet.data.transforms import Augmentation

    mean = _numbers(options.mean, float, "--mean", "0.5,0.5,0.5") if options.mean else facts.get("mean", source.mean)
    std = _numbers(options.std, float, "--std", "0.25,0.25,0.25") if options.std else facts.get("std", source.std)
    size, stored = options.image_size, images.input_size
    if size is None and "input_size" in facts:
        size = int(facts["input_size"][1])
    if size is None and stored is None:
        stated = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
        if "input_size" not in stated:
            raise ConfigError(
                f"the images of {options.data} differ in size: say which one the network takes, as --image-size 224"
            )
        size = int(stated["input_size"][1])
    how = {key: facts[key] for key in FACTS if key in facts} if size is not None else {}
    if options.resize is not None:
        how["resize"] = options.resize
        size = size or (stored[1] if stored else None)
    return Augmentation(mean=_tuple(mean), std=_tuple(std), image_size=size, **how)


def _loader(
    images: ImageDataset, augmentation: Augmentation, options: Namespace, device: torch.device, rank: int, world_size: int
) -> Loader:
    from thriftnet.data.loaders import make_loader

    return make_loader(
        images,
        options.batch_size,
        augmentation=augmentation,
        train=False,
        device=device,
        rank=rank,
        world_size=world_size,
        workers=options.workers,
    )


def _measure(
    model: nn.Module, loader: Loader, source: DataSource, ks: Sequence[int], options: Namespace, *, quiet: bool
) -> Evaluation:
    from torch import OutOfMemoryError

    from thriftnet.train.evaluate import evaluate

    confusion = options.confusion or options.confusion_plot is not None
    with _bar(loader.images_per_epoch, quiet) as watch:
        try:
            return evaluate(model, loader, topk=ks, confusion=confusion, classes=source.classes, watch=watch)
        except OutOfMemoryError:
            raise ConfigError(f"--batch-size {options.batch_size} does not fit into memory: take a smaller one") from None
        except RuntimeError as error:
            raise IncompatibleModelError(f"the network does not take these images: {str(error).splitlines()[0]}") from error


@contextmanager
def _processes(wanted: str | None) -> Iterator[tuple[torch.device, int, int]]:
    """Device, rank and number of the processes that torchrun started; one alone otherwise."""
    import torch
    import torch.distributed as dist

    kind = wanted or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(kind)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {kind} is not possible here: {str(error).splitlines()[0]}. Give cpu") from None
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1:
        yield device, 0, 1
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device, dist.get_rank(), world_size
    finally:
        dist.destroy_process_group()


@contextmanager
def _bar(total: int, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A progress bar, if someone is looking."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("images", total=total)
        yield lambda seen: progress.update(task, completed=seen)


def _limited(images: ImageDataset, limit: int | None) -> ImageDataset:
    """At most ``limit`` images, evenly spread: class folders are sorted by class."""
    if limit is None or limit >= len(images):
        return images
    import torch

    from thriftnet.data.dataset import Subset

    return Subset(images, torch.arange(limit) * len(images) // limit)


def _numbers(text: str, kind: type[int] | type[float], option: str, example: str) -> tuple[Any, ...]:
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text}: write numbers with commas, as {example}") from None


def _tuple(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, Sequence) else (float(value),)


def _warn(source: DataSource, facts: Mapping[str, Any]) -> None:
    """Say what the figures do not show."""
    if source.skipped:
        sys.stderr.write(f"thriftnet evaluate: {len(source.skipped)} broken images are left out, as {source.skipped[0]}\n")
    names = facts.get("class_names", facts.get("classes"))
    if names is not None and list(names) != list(source.classes):
        sys.stderr.write("thriftnet evaluate: the network was trained for classes of other names, or in another order\n")


def _draw(path: Path, result: Evaluation) -> None:
    from thriftnet.report.confusion import confusion_matrix

    drawn = confusion_matrix(result.confusion or (), result.classes)
    try:
        path.write_text(drawn)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def _text(options: Namespace, result: Evaluation) -> str:
    """The result for people."""
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
        return table(["class \\ taken for", *classes], [[name, *row] for name, row in zip(classes, confusion, strict=True)])
    mistakes = [(count, i, j) for i, row in enumerate(confusion) for j, count in enumerate(row) if i != j and count]
    rows = [[classes[i], classes[j], count] for count, i, j in sorted(mistakes, key=lambda entry: -entry[0])[:SHOWN]]
    return table(["class", "taken for", "images"], rows)
