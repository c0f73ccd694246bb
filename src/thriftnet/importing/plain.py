"""Plain ResNets of the wider world, and state dicts of our own networks.

CIFAR ResNets with option-A shortcuts and a head ``linear`` (as in akamaster/pytorch_resnet_cifar10), projections called
``downsample``, and torchvision's names for ImageNet ResNets. Any other network of the zoo needs its name: ``model="resnet20"``.
"""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import torch
from torch import nn

from thriftnet.core.tied import unique_tensors
from thriftnet.errors import ConfigError
from thriftnet.importing.evidence import IMAGENET, IMAGENET_COLORS, UNKNOWN, Evidence, Recognised, in_zoo
from thriftnet.importing.filter_basis import is_resnet, resnet_depth, resnet_place
from thriftnet.importing.layout import Layout, Slot, renamed
from thriftnet.models import create_model, model_kwargs

HINTS: dict[str, str] = {}
OWN_HINTS = {"model": "a name of the zoo, whose own keys the file has; further hints are its arguments"}


def recognise(evidence: Evidence) -> Recognised | None:
    """A plain ResNet of basic or bottleneck blocks, or None."""
    head = next((head for head in ("linear", "fc") if evidence.has(f"{head}.weight")), None)
    if head is None or not evidence.has("conv1.weight", "bn1.weight", "layer1.0.conv2.weight", "layer3.0.conv2.weight"):
        return None
    shortcut = next((name for name in ("shortcut", "downsample") if evidence.has(f"layer2.0.{name}.0.weight")), None)
    small = not evidence.has("layer4.0.conv1.weight")
    if is_resnet(evidence) or (small and head == "linear" and shortcut == "shortcut"):
        return None
    if evidence.tensors["layer1.0.conv2.weight"].shape[2:] != (3, 3):
        return None
    kwargs: dict[str, Any] = {}
    if small:
        depth, ours = 6 * evidence.blocks_per_stage() + 2, "shortcut"
        name = in_zoo(f"resnet{depth}", f"a ResNet of depth {depth}")
        kwargs["shortcut"] = "projection" if shortcut else "pad"
        preprocessing = IMAGENET_COLORS if head == "linear" else UNKNOWN
    else:
        depth, place, ours = resnet_depth(evidence), resnet_place(evidence), "downsample"
        name = in_zoo(f"{place}resnet{depth}", f"a {'CIFAR' if place else 'ImageNet'} ResNet-{depth}")
        preprocessing = UNKNOWN if place else IMAGENET
    kwargs |= evidence.classes_and_channels(f"{head}.weight", "conv1.weight")
    rules = ((r"^fc\.", f"{head}."), (rf"\.{ours}\.", f".{shortcut or ours}."))
    return evidence.network(name, kwargs, partial(renamed, rules=rules), preprocessing)


def recognise_own(evidence: Evidence) -> Recognised | None:
    """A network of our zoo under its own keys, where the user names it; else None."""
    if "model" not in evidence.hints:
        return None
    name = evidence.hints["model"]
    if not isinstance(name, str):
        raise ConfigError(f"model={name!r}: expected a name of the zoo, see thriftnet models")
    arguments = model_kwargs(name)
    given = {key: value for key, value in evidence.hints.items() if key not in ("model", "system")}
    try:
        with torch.device("meta"):
            model = create_model(name, **given)
    except ConfigError as error:
        assumed = {
            key: value for key, value in arguments.items() if key not in given and re.search(rf"\b{key}\b", str(error))
        }
        if not assumed:
            raise
        stated = ", ".join(f"{key}={value!r}" for key, value in assumed.items())
        raise ConfigError(
            f"{error}. {stated} is {name}'s default: give what the file has, as {next(iter(assumed))}=..."
        ) from None
    default_cfg: Any = getattr(model, "default_cfg", {})
    for argument, layer, dim in (("num_classes", "classifier", 0), ("in_chans", "first_conv", 1)):
        weight = evidence.tensors.get(f"{default_cfg.get(layer)}.weight")
        if argument in arguments and argument not in given and weight is not None and weight.ndim > dim:
            given[argument] = int(weight.shape[dim])
    return evidence.network(name, given, own_layout)


def own_layout(model: nn.Module) -> Layout:
    """Each tensor under our own key."""
    return {key: Slot(key) for key in unique_tensors(model)}
