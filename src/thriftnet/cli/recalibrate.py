"""`thriftnet recalibrate`: batch-norm statistics estimated again from training images, for every width."""

from __future__ import annotations

import math
from collections.abc import Sequence

from thriftnet.arguments import Count, Index, PositiveShare, Seed
from thriftnet.cli.common import Parser, parse_with_kwargs
from thriftnet.cli.inputs import open_inputs
from thriftnet.cli.options import IMAGE_OPTIONS, reads, width_from
from thriftnet.cli.output import emit

DESCRIPTION = (
    "Estimate the batch-norm statistics of a network again from the training images, at each width; weights do not change."
)


def run(arguments: Sequence[str]) -> None:
    parser = Parser("recalibrate", DESCRIPTION, "model", *IMAGE_OPTIONS, "--output")
    add = parser.add_argument
    add("--split", default="train", metavar="NAME", help="which images")
    add("--widths", metavar="W,W", help="only these, as 0.5,1.0 or smallest,largest; default: all")
    add(
        "--width-indices",
        type=reads(tuple[Index, ...]),
        metavar="I,I",
        help="instead: indices into the list of widths, as 0,3",
    )
    add("--batches", type=reads(Count), metavar="N", help="at most this many at each width; default: all images")
    add(
        "--momentum",
        type=reads(PositiveShare),
        metavar="M",
        help="a moving average, as 0.1 (DS-Net); default: the exact one",
    )
    add("--seed", type=reads(Seed), default=0, metavar="N", help="of the order of the images")
    options, kwargs = parse_with_kwargs(parser, arguments)
    chosen = None if options.widths is None else [width_from(text) for text in options.widths.split(",")]
    indices = options.width_indices

    from thriftnet.core.recalibrate import recalibrate
    from thriftnet.core.width import format_width, widths
    from thriftnet.store.model_file import check_place, save
    from thriftnet.train.distributed import process_group

    check_place(options.output)
    with process_group(options.device) as device:
        model, source, loader_of = open_inputs(options, kwargs, options.split, device)
        images = source.split(options.split)
        used = min(len(images), options.limit or len(images))
        options.batch_size = math.ceil(
            used / math.ceil(used / options.batch_size)
        )  # a last batch of few images has poor variances
        loader = loader_of(images, options.limit, shuffle=True, seed=options.seed)
        recalibrate(model, loader, chosen, indices=indices, momentum=options.momentum, batches=options.batches)
    folder = save(model.cpu(), options.output)
    available = widths(model)
    done = available if chosen is None and indices is None else [*(chosen or ()), *(available[i] for i in indices or ())]
    names = [format_width(width) for width in done]
    batches = min(len(loader), options.batches or len(loader))
    seen = min(used, batches * options.batch_size)
    result = {"model": options.model, "output": str(folder), "widths": names, "images": seen, "batches": batches}
    at = f" at widths {', '.join(names)}" if names else ""
    emit(
        f"{folder}: statistics of {seen:,} images in {batches} {'batch' if batches == 1 else 'batches'}{at}",
        result,
        as_json=options.json,
    )
