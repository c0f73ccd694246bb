"""`thriftnet search`: the best widths of a trained slimmable network within a budget, as a plain network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import TYPE_CHECKING

from thriftnet.arguments import Natural, OpenShare, Population, Seed
from thriftnet.cli.common import Parser, parse_with_kwargs
from thriftnet.cli.inputs import open_inputs
from thriftnet.cli.options import IMAGE_OPTIONS, quantity, reads
from thriftnet.cli.output import emit, has_terminal, show

if TYPE_CHECKING:
    from thriftnet.dynamic.search import Candidate

DESCRIPTION = "Find the best widths, layer by layer, of a trained slimmable network within a budget, without training; saves a plain one."


def run(arguments: Sequence[str]) -> None:
    parser = Parser("search", DESCRIPTION, "model", *IMAGE_OPTIONS, "--output")
    add = parser.add_argument
    add("--macs", type=quantity, metavar="N", required=True, help="most multiply-accumulates for one image, as 300M")
    add(
        "--validation",
        type=reads(OpenShare),
        default=0.1,
        metavar="SHARE",
        help="share of the training images that candidates are scored on",
    )
    recalibration = "batches to estimate the batch-norm statistics of each candidate from; 0: none"
    add("--recalibration", type=reads(Natural), default=8, metavar="N", help=recalibration)
    add(
        "--population",
        type=reads(Population),
        default=16,
        metavar="N",
        help="candidates kept from one generation to the next",
    )
    add("--generations", type=reads(Natural), default=8, metavar="N", help="rounds of the evolution")
    add("--seed", type=reads(Seed), default=0, metavar="N", help="of the held-out images and the evolution")
    options, kwargs = parse_with_kwargs(parser, arguments)

    from thriftnet.data.split import train_validation
    from thriftnet.dynamic.search import Evolution, search
    from thriftnet.store.model_file import check_place, save
    from thriftnet.train.distributed import process_group
    from thriftnet.train.evaluate import evaluate

    check_place(options.output)
    with process_group(options.device) as device:
        model, source, loader_of = open_inputs(options, kwargs, "train", device)
        source.require_labels("search")
        training, held_out = train_validation(source.split("train"), options.validation, options.seed)
        scored = loader_of(held_out, options.limit)
        batches = loader_of(training, None, shuffle=True, seed=options.seed)
        _, channels, height, width = next(iter(scored))[0].shape
        found = search(
            model,
            lambda candidate: evaluate(candidate, scored).top1,
            macs=options.macs,
            loader=islice(batches, options.recalibration) if options.recalibration else None,
            evolution=Evolution(population=options.population, generations=options.generations, seed=options.seed),
            input_size=(channels, height, width),
            progress=_progress if has_terminal() else None,
        )
        top1 = evaluate(found.model, loader_of(source.split("test"), None)).top1
    folder = save(found.model.cpu(), options.output)
    text = (
        f"{found}\n\n{folder}: {found.best.macs:,} MACs; {found.best.score:.2f} % of the held-out training images, "
        f"{top1:.2f} % of the test images"
    )
    result = {"model": options.model, "output": str(folder), "macs": found.best.macs, "top1": top1, **found.to_dict()}
    emit(text, result, as_json=options.json)


def _progress(tried: int, latest: Candidate) -> None:
    show(f"{tried} tried, latest {latest.score:.2f} at {latest.macs:,} MACs")
