"""What the verbs that look at images share: the network with what is known of its images, and how these reach it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import numbers, open_network
from thriftnet.cli.machine import add_machine_options
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from torch import nn

    from thriftnet.data.dataset import DataSource, ImageDataset
    from thriftnet.data.transforms import Augmentation

DATA_HELP = "digits, cifar10:DIR, cifar100:DIR, folder:DIR, parquet:DIR or hf:OWNER/NAME"
FACTS = ("resize", "crop_pct", "eval_interpolation")  # of a folder's metadata: how images come to its input size


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


def network_of(place: str, kwargs: Mapping[str, Any], plain: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """The network, and what it knows about its images: mean, std, input_size, class_names.

    Args:
        plain: The plain form of a saved network that is not in the zoo.
    """
    if plain is None:
        network = open_network(place, kwargs)
    else:
        from thriftnet.store.model_file import load

        network = load(place, model=open_network(plain, kwargs))
    from thriftnet.core.provenance import data_facts

    known = {name: value for name, value in data_facts(network).to_dict().items() if value is not None}
    return network, known | known.pop("normalisation", {})


def augmentation_of(
    options: Namespace, facts: Mapping[str, Any], source: DataSource, images: ImageDataset, model: nn.Module
) -> Augmentation:
    """How images become inputs: as the options say, else the network, else the data."""
    from thriftnet.core.provenance import stated_input_size
    from thriftnet.data.transforms import Augmentation

    mean = numbers(options.mean, float, "--mean", "0.5,0.5,0.5") if options.mean else facts.get("mean", source.mean)
    std = numbers(options.std, float, "--std", "0.25,0.25,0.25") if options.std else facts.get("std", source.std)
    size, stored = options.image_size, images.input_size
    if size is None and "input_size" in facts:
        size = int(facts["input_size"][1])
    if size is None and stored is None:
        stated = stated_input_size(model)
        if stated is None:
            raise ConfigError(f"the images of {options.data} differ in size: give the network's, as --image-size 224")
        size = stated[1]
    how = {key: facts[key] for key in FACTS if key in facts} if size is not None else {}
    if options.resize is not None:
        how["resize"] = options.resize
        size = size or (stored[1] if stored else None)
    return Augmentation(mean=_tuple(mean), std=_tuple(std), image_size=size, **how)


def limited(images: ImageDataset, limit: int | None) -> ImageDataset:
    """At most ``limit`` images, evenly spread: class folders are sorted by class."""
    if limit is None or limit >= len(images):
        return images
    import torch

    from thriftnet.data.dataset import Subset

    return Subset(images, torch.arange(limit) * len(images) // limit)


def _tuple(value: Any) -> tuple[float, ...]:
    return tuple(value) if isinstance(value, Sequence) else (float(value),)
