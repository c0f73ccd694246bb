"""`thriftnet recalibrate`: batch-norm statistics estimated again from training images, for every width."""

from __future__ import annotations

from collections.abc import Sequence

from thriftnet.cli.common import add_output, check_positive, emit, new_parser, numbers, parse_with_kwargs, width_from
from thriftnet.cli.inputs import add_image_options, augmentation_of, limited, network_of
from thriftnet.cli.machine import use_machine


def run(arguments: Sequence[str]) -> None:
    parser = new_parser(
        "recalibrate",
        "Estimate the batch-norm statistics of a network again from the training images, at each width; weights do not change.",
        takes_model=True,
    )
    add_image_options(parser)
    add_output(parser)
    parser.add_argument("--split", default="train", help="which images")
    parser.add_argument("--widths", metavar="W,W", help="only these, as 0.5,1.0 or smallest,largest; default: all")
    parser.add_argument("--width-indices", metavar="I,I", help="instead: indices into the list of widths, as 0,3")
    parser.add_argument("--batches", type=int, metavar="N", help="at most this many at each width; default: all images")
    parser.add_argument("--momentum", type=float, help="a moving average, as 0.1 (DS-Net); default: the exact one")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the images")
    options, kwargs = parse_with_kwargs(parser, arguments)
    check_positive(options, "batch_size")
    chosen = None if options.widths is None else [width_from(text) for text in options.widths.split(",")]
    indices = None if options.width_indices is None else numbers(options.width_indices, int, "--width-indices", "0,3")

    from thriftnet.core.recalibrate import recalibrate
    from thriftnet.core.width import format_width, widths
    from thriftnet.data.loaders import make_loader
    from thriftnet.data.sources import open_data
    from thriftnet.store.model_file import save

    use_machine(options, options.batch_size)
    model = network_of(options.model, kwargs, options.plain)
    source = open_data(options.data, on_corrupt=options.on_corrupt)
    images = limited(source.split(options.split), options.limit)
    augmentation = augmentation_of(options, source, images, model)
    loader = make_loader(
        images,
        options.batch_size,
        augmentation=augmentation,
        train=False,
        shuffle=True,
        drop_last=len(images) > options.batch_size,  # all batches have the same weight
        seed=options.seed,
        device=options.device or "cpu",
        workers=options.workers,
    )
    model = model.to(options.device or "cpu")
    recalibrate(model, loader, chosen, indices=indices, momentum=options.momentum, batches=options.batches)
    folder = save(model.cpu(), options.output)
    available = widths(model)
    done = available if chosen is None and indices is None else [*(chosen or ()), *(available[i] for i in indices or ())]
    names = [format_width(width) for width in done]
    batches = min(len(loader), options.batches or len(loader))
    result = {"model": options.model, "output": str(folder), "widths": names, "batches": batches}
    at = f" at widths {', '.join(names)}" if names else ""
    emit(f"{folder}: statistics of {batches} batches of {options.batch_size} images{at}", result, as_json=options.json)
