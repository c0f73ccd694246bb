"""`thriftnet search`: the best widths of a trained supernet within a budget, as a plain network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from thriftnet.cli.common import emit, new_parser, parse_with_kwargs, quantity
from thriftnet.cli.inputs import add_image_options, augmentation_of, limited, network_of
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from torch import nn

    from thriftnet.train.search import Candidate


def run(arguments: Sequence[str]) -> None:
    parser = new_parser(
        "search",
        "Find the best widths, layer by layer, of a trained supernet within a budget, without training; saves a plain network.",
        takes_model=True,
    )
    add_image_options(parser)
    parser.add_argument("--macs", metavar="N", required=True, help="multiply-accumulates that one image may cost, as 300M")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where to save the network found")
    parser.add_argument(
        "--validation", type=float, default=0.1, help="share of the training images that candidates are scored on"
    )
    parser.add_argument(
        "--recalibration", type=int, default=8, metavar="N", help="batches for each candidate's statistics; 0: none"
    )
    parser.add_argument("--population", type=int, default=16, help="candidates kept from one generation to the next")
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options, kwargs = parse_with_kwargs(parser, arguments)
    if options.batch_size < 1 or options.recalibration < 0:
        raise ConfigError("--batch-size takes whole numbers from 1, --recalibration from 0")
    budget = quantity("--macs", options.macs)

    from itertools import islice

    from thriftnet.data.loaders import make_loader
    from thriftnet.data.sources import open_data
    from thriftnet.data.split import train_validation
    from thriftnet.interop.checkpoints import save
    from thriftnet.train.evaluate import evaluate
    from thriftnet.train.search import Evolution, search

    model, facts = network_of(options.model, kwargs, options.plain)
    source = open_data(options.data, on_corrupt=options.on_corrupt)
    images = source.split("train")
    augmentation = augmentation_of(options, facts, source, images, model)
    training, held_out = train_validation(images, options.validation, options.seed)
    common = {"augmentation": augmentation, "train": False, "device": options.device or "cpu", "workers": options.workers}
    scored = make_loader(limited(held_out, options.limit), options.batch_size, **common)
    fresh = make_loader(training, options.batch_size, shuffle=True, seed=options.seed, **common)

    def score(candidate: nn.Module) -> float:
        return evaluate(candidate, scored).top1

    found = search(
        model.to(options.device or "cpu"),
        score,
        macs=budget,
        loader=islice(fresh, options.recalibration) if options.recalibration else None,
        evolution=Evolution(population=options.population, generations=options.generations, seed=options.seed),
        input_size=next(iter(scored))[0].shape[1:],
        progress=_progress if sys.stderr.isatty() else None,
    )
    folder = save(found.model.cpu(), options.output, metadata=facts)
    test = make_loader(source.split("test"), options.batch_size, **common)
    top1 = evaluate(found.model.to(options.device or "cpu"), test).top1
    text = (
        f"{found}\n\n{folder}: {found.best.macs:,} MACs; {found.best.score:.2f} % of the held-out training images, "
        f"{top1:.2f} % of the test images"
    )
    result = {"model": options.model, "output": str(folder), "macs": found.best.macs, "top1": top1, **found.to_dict()}
    emit(text, result, as_json=options.json)


def _progress(tried: int, latest: Candidate) -> None:
    sys.stderr.write(f"\r{tried} tried, latest {latest.score:.2f} at {latest.macs:,} MACs ")
    sys.stderr.flush()
