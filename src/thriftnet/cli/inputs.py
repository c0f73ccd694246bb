"""What the verbs that look at images share: opening the network and the data, and how images become inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import open_network
from thriftnet.cli.machine import use_machine
from thriftnet.errors import ConfigError, IncompatibleModelError

if TYPE_CHECKING:
    from argparse import Namespace

    import torch
    from torch import nn

    from thriftnet.data.augmentation import Augmentation
    from thriftnet.data.dataset import DataSource, ImageDataset
    from thriftnet.data.loaders import Loader


def open_inputs(
    options: Namespace, kwargs: Mapping[str, Any], split: str, device: torch.device
) -> tuple[nn.Module, DataSource, Callable[..., Loader]]:
    """The network on its device, the data, and a function that loads at most ``limit`` images of the data for it."""
    from thriftnet.core.provenance import add_data_facts
    from thriftnet.data.loaders import make_loader
    from thriftnet.data.sources import open_data
    from thriftnet.data.split import limited

    use_machine(options, options.batch_size)
    model = open_network(options.model, kwargs, options.plain)
    source = open_data(options.data, on_corrupt=options.on_corrupt)
    augmentation = augmentation_of(options, source, source.split(split), model)
    add_data_facts(model, augmentation.facts())  # what a verb computes with is what the network is saved with
    common: Any = {"augmentation": augmentation, "train": False}
    common |= {"device": device, "workers": options.workers}

    def loader(images: ImageDataset, limit: int | None, **more: Any) -> Loader:
        return make_loader(limited(images, limit), options.batch_size, **common, **more)

    return model.to(device), source, loader


def augmentation_of(options: Namespace, source: DataSource, images: ImageDataset, model: nn.Module) -> Augmentation:
    """How images become inputs: as the options say, else the network, else the data."""
    from thriftnet.core.provenance import data_facts, stated_input_size
    from thriftnet.data.augmentation import Augmentation

    facts, stored = data_facts(model), images.input_size
    channels = len(facts.normalisation["mean"]) if facts.normalisation else None
    if stored is not None and channels not in (None, stored[0]):
        raise IncompatibleModelError(
            f"{options.model} was trained on images of {channels} channels, those of {options.data} have {stored[0]}: give other data"
        )
    known = facts.normalisation or {"mean": source.mean, "std": source.std}
    mean, std = options.mean or known["mean"], options.std or known["std"]
    size = stated_input_size(model) if stored is None else facts.input_size
    side = options.image_size or (size[1] if size else None)
    if side is None and stored is None:
        raise ConfigError(f"the images of {options.data} differ in size: give the network's, as --image-size 224")
    given = {"resize": options.resize, "crop_pct": options.crop_pct, "eval_interpolation": options.interpolation}
    if options.resize is not None and options.crop_pct is not None:
        raise ConfigError("--resize and --crop-pct both say how much is cropped: give one of them")
    if side is None and stored is not None and any(value is not None for value in given.values()):
        side = stored[1]
    of_network: dict[str, Any] = {} if side is None else {name: getattr(facts, name) for name in given}
    if options.crop_pct is not None:
        of_network["resize"] = None
    how: dict[str, Any] = {name: value for name, value in of_network.items() if value is not None}
    how |= {name: value for name, value in given.items() if value is not None}
    return Augmentation(mean=mean, std=std, image_size=side, **how)
