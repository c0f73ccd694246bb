"""Plain ResNets of the wider world, and state dicts of our own networks.

CIFAR ResNets with option-A shortcuts and a head ``linear`` (as in akamaster/pytorch_resnet_cifar10), projections called
``downsample``, and torchvision's names for ImageNet ResNets. Anything else of our zoo needs its name: ``model="resnet20"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from thriftnet.core.tied import unique_tensors
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.importing import filter_basis
from thriftnet.importing.layout import Layout, Slot, renamed
from thriftnet.importing.recognised import IMAGENET, Recognised, Tensors, counts, in_zoo, shape, shared_arguments
from thriftnet.models import create_model, model_kwargs

HINTS: dict[str, str] = {}
OWN_HINTS = {"model": "a name of the zoo, whose own keys the file has; further hints are its arguments"}


def recognise(tensors: Tensors, metadata: Mapping[str, Any], hints: Mapping[str, Any]) -> Recognised | None:
    """A plain ResNet of basic or bottleneck blocks, or None."""
    heads = [head for head in ("linear", "fc") if f"{head}.weight" in tensors]
    if not heads or not {"conv1.weight", "bn1.weight", "layer1.0.conv2.weight", "layer3.0.conv2.weight"} <= set(tensors):
        return None
    shortcut = next((name for name in ("shortcut", "downsample") if f"layer2.0.{name}.0.weight" in tensors), None)
    small = "layer4.0.conv1.weight" not in tensors
    if filter_basis.is_theirs(tensors) or (small and heads[0] == "linear" and shortcut == "shortcut"):
        return None
    if tensors["layer1.0.conv2.weight"].shape[2:] != (3, 3):
        return None
    blocks = counts(tensors, r"^layer{}\.(\d+)\.", range(1, 4 if small else 5))
    classes, channels = shape(tensors, f"{heads[0]}.weight", 2)[0], shape(tensors, "conv1.weight", 4)[1]
    if small:
        name, kwargs = _small(blocks, shortcut)
    else:
        cifar = shape(tensors, "conv1.weight", 4)[2] == 3
        depth = filter_basis.depth_of(blocks, "layer1.0.conv3.weight" in tensors)
        name = in_zoo(f"{'cifar_' if cifar else ''}resnet{depth}", f"a {'CIFAR' if cifar else 'ImageNet'} ResNet-{depth}")
        kwargs = {}
    ours = "shortcut" if small else "downsample"
    rules = ((r"^fc\.", f"{heads[0]}."), (rf"\.{ours}\.", f".{shortcut or ours}."))

    def layout(model: nn.Module) -> Layout:
        return renamed(model, rules)

    colours = IMAGENET if (small and heads[0] == "linear") or (not small and "cifar" not in name) else None
    return Recognised(name, kwargs | shared_arguments(classes, channels), layout, tensors, (), colours)


def _small(blocks: tuple[int, ...], shortcut: str | None) -> tuple[str, dict[str, Any]]:
    """A network of three stages."""
    if len(set(blocks)) != 1:
        raise CheckpointError(f"its stages have {blocks} blocks: possible are equally many in all three")
    depth = 6 * blocks[0] + 2
    return in_zoo(f"resnet{depth}", f"a ResNet of depth {depth}"), {"shortcut": "projection" if shortcut else "pad"}


def recognise_own(tensors: Tensors, metadata: Mapping[str, Any], hints: Mapping[str, Any]) -> Recognised | None:
    """A network of our zoo under its own keys, where the user names it; else None."""
    if "model" not in hints:
        return None
    name = hints["model"]
    if not isinstance(name, str):
        raise ConfigError(f"model={name!r}: possible is a name of the zoo, see thriftnet models")
    possible = model_kwargs(name)
    given = {key: value for key, value in hints.items() if key not in ("model", "system")}
    with torch.device("meta"):
        model = create_model(name, **given)
    default_cfg: Any = getattr(model, "default_cfg", {})
    found = {"num_classes": (default_cfg.get("classifier"), 0), "in_chans": (default_cfg.get("first_conv"), 1)}
    for argument, (layer, dim) in found.items():
        weight = tensors.get(f"{layer}.weight")
        if argument in possible and argument not in given and weight is not None and weight.ndim > dim:
            given[argument] = int(weight.shape[dim])
    return Recognised(name, given, own_layout, tensors)


def own_layout(model: nn.Module) -> dict[str, Slot]:
    """Each tensor under our own key."""
    return {key: Slot(key) for key in unique_tensors(model)}
