"""`thriftnet search`: the best widths of a trained slimmable network within a budget, as a plain network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import add_output, check_positive, emit, new_parser, parse_with_kwargs, quantity
from thriftnet.cli.inputs import add_image_options, augmentation_of, limited, network_of
from thriftnet.cli.machine import use_machine
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from torch import nn

    from thriftnet.data.augmentation import Augmentation
    from thriftnet.data.dataset import DataSource
    from thriftnet.data.loaders import Loader
    from thriftnet.dynamic.search import Candidate


def run(arguments: Sequence[str]) -> None:
    options, kwargs = parse_with_kwargs(_parser(), arguments)
    check_positive(options, "batch_size")
    if options.recalibration < 0:
        raise ConfigError(f"--recalibration {options.recalibration}: expected an integer >= 0")
    budget, device = quantity("--macs", options.macs), options.device or "cpu"

    from thriftnet.data.sources import open_data
    from thriftnet.dynamic.search import Evolution, search
    from thriftnet.store.model_file import save
    from thriftnet.train.evaluate import evaluate

    use_machine(options, options.batch_size)
    model = network_of(options.model, kwargs, options.plain)
    source = open_data(options.data, on_corrupt=options.on_corrupt)
    augmentation = augmentation_of(options, source, source.split("train"), model)
    scored, fresh, test = _loaders(source, augmentation, options, device)

    def score(candidate: nn.Module) -> float:
        return evaluate(candidate, scored).top1

    found = search(
        model.to(device),
        score,
        macs=budget,
        loader=islice(fresh, options.recalibration) if options.recalibration else None,
        evolution=Evolution(population=options.population, generations=options.generations, seed=options.seed),
        input_size=next(iter(scored))[0].shape[1:],
        progress=_progress if sys.stderr.isatty() else None,
    )
    top1 = evaluate(found.model, test).top1
    folder = save(found.model.cpu(), options.output)
    text = (
        f"{found}\n\n{folder}: {found.best.macs:,} MACs; {found.best.score:.2f} % of the held-out training images, "
        f"{top1:.2f} % of the test images"
    )
    result = {"model": options.model, "output": str(folder), "macs": found.best.macs, "top1": top1, **found.to_dict()}
    emit(text, result, as_json=options.json)


def _parser() -> ArgumentParser:
    parser = new_parser(
        "search",
        "Find the best widths, layer by layer, of a trained slimmable network within a budget, without training; saves a plain one.",
        takes_model=True,
    )
    add_image_options(parser)
    add = parser.add_argument
    add("--macs", metavar="N", required=True, help="most multiply-accumulates for one image, as 300M")
    add_output(parser)
    add("--validation", type=float, default=0.1, help="share of the training images that candidates are scored on")
    add(
        "--recalibration",
        type=int,
        default=8,
        metavar="N",
        help="batches to estimate the batch-norm statistics of each candidate from; 0: none",
    )
    add("--population", type=int, default=16, help="candidates kept from one generation to the next")
    add("--generations", type=int, default=8, help="rounds of the evolution")
    add("--seed", type=int, default=0, help="of the held-out images and the evolution")
    return parser


def _loaders(
    source: DataSource, augmentation: Augmentation, options: Namespace, device: str
) -> tuple[Loader, Loader, Loader]:
    """Images to score candidates on, to recalibrate them with, and to measure the result on."""
    from thriftnet.data.loaders import make_loader
    from thriftnet.data.split import train_validation

    training, held_out = train_validation(source.split("train"), options.validation, options.seed)
    common: Any = {"augmentation": augmentation, "train": False, "device": device, "workers": options.workers}
    return (
        make_loader(limited(held_out, options.limit), options.batch_size, **common),
        make_loader(training, options.batch_size, shuffle=True, seed=options.seed, **common),
        make_loader(source.split("test"), options.batch_size, **common),
    )


def _progress(tried: int, latest: Candidate) -> None:
    sys.stderr.write(f"\r{tried} tried, latest {latest.score:.2f} at {latest.macs:,} MACs ")
    sys.stderr.flush()
