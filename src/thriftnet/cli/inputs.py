"""What the verbs that look at images share: the network with what is known of its images, and how these reach it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import numbers, open_network
from thriftnet.cli.machine import add_machine_options
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from torch import nn

    from thriftnet.data.augmentation import Augmentation
    from thriftnet.data.dataset import DataSource, ImageDataset

DATA_HELP = "digits, cifar10:DIR, cifar100:DIR, folder:DIR, parquet:DIR or hf:OWNER/NAME"


def add_image_options(parser: ArgumentParser) -> None:
    """Options on data and on how images become inputs."""
    add = parser.add_argument
    add("--data", metavar="D", required=True, help=DATA_HELP)
    add(
        "--plain",
        metavar="MODEL",
        help="what builds the plain network of a saved one that is not in the zoo, as package.module:callable",
    )
    add("--batch-size", type=int, default=256, metavar="N", help="images at a time")
    add("--device", help="default: a GPU where there is one")
    add("--mean", metavar="M,M,M", help="of each channel, in [0, 1]; default: the network's, else the data's")
    add("--std", metavar="S,S,S", help="the same")
    add("--image-size", type=int, metavar="PIXELS", help="default: the network's, else as stored")
    add("--resize", type=int, metavar="PIXELS", help="shorter side before the centre crop to the image size")
    add("--limit", type=int, metavar="N", help="only N images, evenly spread over the split")
    add("--workers", type=int, default=0, metavar="N", help="processes that decode images")
    add(
        "--on-corrupt",
        choices=["error", "skip"],
        default="error",
        help="stop at images that cannot be decoded, or skip them",
    )
    add_machine_options(parser)


def network_of(source: str, kwargs: Mapping[str, Any], plain: str | None = None) -> nn.Module:
    """The network that MODEL names; of a saved one that is not in the zoo, ``plain`` builds the plain network."""
    if plain is None:
        return open_network(source, kwargs)
    from thriftnet.store.model_file import load

    return load(source, model=open_network(plain, kwargs))


def augmentation_of(options: Namespace, source: DataSource, images: ImageDataset, model: nn.Module) -> Augmentation:
    """How images become inputs: as the options say, else the network, else the data."""
    from thriftnet.core.provenance import data_facts, stated_input_size
    from thriftnet.data.augmentation import Augmentation

    facts, stored = data_facts(model), images.input_size
    known = facts.normalisation or {"mean": source.mean, "std": source.std}
    mean = numbers(options.mean, float, "--mean", "0.5,0.5,0.5") if options.mean else known["mean"]
    std = numbers(options.std, float, "--std", "0.25,0.25,0.25") if options.std else known["std"]
    size = stated_input_size(model) if stored is None else facts.input_size
    side = options.image_size or (size[1] if size else None)
    if side is None and stored is None:
        raise ConfigError(f"the images of {options.data} differ in size: give the network's, as --image-size 224")
    how: dict[str, Any] = {}
    if side is not None:
        how = {"resize": facts.resize, "crop_pct": facts.crop_pct, "eval_interpolation": facts.eval_interpolation}
    if options.resize is not None:
        how["resize"] = options.resize
        side = side or (stored[1] if stored else None)
    how = {name: value for name, value in how.items() if value is not None}
    return Augmentation(mean=mean, std=std, image_size=side, **how)


def limited(images: ImageDataset, limit: int | None) -> ImageDataset:
    """At most ``limit`` images, evenly spread: class folders are sorted by class."""
    if limit is None or limit >= len(images):
        return images
    import torch

    from thriftnet.data.dataset import Subset

    return Subset(images, torch.arange(limit) * len(images) // limit)
