"""ShiftResNet's files: ResNets with projections, ShiftResNets and DepthwiseResNets, told by their tensors.

The authors pickle the whole network. Reductions and expansions are rounded down to whole channels, so that several give one
network: the file's own figure is taken where it fits, else the one with the fewest decimals.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from thriftnet.errors import CheckpointError
from thriftnet.importing.recognised import (
    Colours,
    Recognised,
    Tensors,
    counts,
    in_zoo,
    shape,
    shared_arguments,
    simplest_ratio,
)
from thriftnet.importing.shiftresnet_layout import shiftresnet_layout

HINTS = {"reduction": "which of the reductions that give these channels", "expansion": "which of the expansions"}
COLOURS: Colours = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # for CIFAR-100, too
WIDTHS = (16, 32, 64)
EXTRA = re.compile(r"layer(\d)\.(\d+)\.shortcut\.0\.weight")


def recognise(tensors: Tensors, metadata: Mapping[str, Any], hints: Mapping[str, Any]) -> Recognised | None:
    """A network of the ShiftResNet repository, or None."""
    if not {"linear.weight", "layer3.0.conv1.weight", "layer2.0.shortcut.0.weight"} <= set(tensors):
        return None
    if any(key.startswith("layer4.") for key in tensors):
        return None
    blocks = counts(tensors, r"^layer{}\.(\d+)\.", range(1, 4))
    if len(set(blocks)) != 1:
        raise CheckpointError(f"its stages have {blocks} blocks: possible are equally many in all three")
    notes: list[str] = []
    name, kwargs = _architecture(6 * blocks[0] + 2, tensors, metadata, hints, notes)
    stem = shape(tensors, "conv1.weight", 4)
    extra = _extra_shortcuts(tensors)
    if len(extra) == 3 * blocks[0] - 2 and kwargs.get("reduction_mode") == "block":
        kwargs["shortcut"] = "projection-reduced"
        notes.append("Every block has a projection, as reduced blocks had in the repository from 10 to 13 November 2017.")
        extra = []
    elif extra:
        notes.append(
            f"Shortcuts of {len(extra)} blocks have a convolution where the zoo's network has none, as reduced blocks had in "
            "the repository from 10 to 13 November 2017: they are kept, so that thriftnet.load needs model=."
        )
    return Recognised(
        in_zoo(name, f"a network of depth {6 * blocks[0] + 2}"),
        kwargs | shared_arguments(shape(tensors, "linear.weight", 2)[0], stem[1]),
        shiftresnet_layout,
        tensors,
        tuple(notes),
        COLOURS,
        adapt=_adding(extra) if extra else None,
    )


def _architecture(
    depth: int, tensors: Tensors, metadata: Mapping[str, Any], hints: Mapping[str, Any], notes: list[str]
) -> tuple[str, dict[str, Any]]:
    """Name in the zoo and arguments that give the channels found."""
    stated = _stated(metadata, hints)
    inners = tuple(shape(tensors, f"layer{stage}.0.conv1.weight", 4)[0] for stage in (1, 2, 3))
    if "layer1.0.depth.weight" in tensors:
        reduction = _reduction(inners, WIDTHS, 1, stated.get("reduction"))
        _say("reduction", reduction, stated, notes)
        return f"depthwiseresnet{depth}", {"reduction": reduction}
    if shape(tensors, "layer1.0.conv1.weight", 4)[2:] == (1, 1):
        low = max(inner / width for inner, width in zip(inners, WIDTHS, strict=True))
        high = min((inner + 1) / width for inner, width in zip(inners, WIDTHS, strict=True))

        def fits(expansion: float) -> bool:
            return tuple(int(width * expansion) for width in WIDTHS) == inners

        expansion = _found("expansion", simplest_ratio(low, high, fits, stated.get("expansion")), inners)
        _say("expansion", expansion, stated, notes)
        return f"shiftresnet{depth}", {"expansion": expansion}
    outs = tuple(shape(tensors, f"layer{stage}.0.conv2.weight", 4)[0] for stage in (1, 2, 3))
    plain = {"shortcut": "projection"}
    if outs == inners == WIDTHS:
        return f"resnet{depth}", plain
    mode = "block" if outs == WIDTHS else "net"
    if mode == "net" and isinstance(stated.get("reduction"), float) and "reduction" not in hints:
        stated = {**stated, "reduction": round(stated["reduction"] ** 2, 6)}  # the authors keep its root
    reduction = _reduction(inners, WIDTHS, 1 if mode == "block" else 2, stated.get("reduction"))
    _say("reduction", reduction, stated, notes)
    return f"resnet{depth}", plain | {"reduction": reduction, "reduction_mode": mode}


def _reduction(found: tuple[int, ...], widths: tuple[int, ...], power: int, stated: object) -> float:
    """A reduction that gives these channels; under "net" (power 2) its root divides the widths."""

    def fits(reduction: float) -> bool:
        return tuple(int(width / (reduction if power == 1 else reduction**0.5)) for width in widths) == found

    low = max((width / (inner + 1)) ** power for inner, width in zip(found, widths, strict=True))
    high = min((width / inner) ** power for inner, width in zip(found, widths, strict=True))
    return _found("reduction", simplest_ratio(low, high, fits, stated), found)


def _found(what: str, value: float | None, channels: tuple[int, ...]) -> float:
    if value is None:
        raise CheckpointError(f"its stages have {channels} channels inside: no {what} of {WIDTHS} gives these")
    return value


def _say(what: str, value: float, stated: Mapping[str, Any], notes: list[str]) -> None:
    if value != 1 and stated.get(what) != value:
        notes.append(
            f"{what}={value:g} is one of those that give these channels; which one was asked for makes no difference."
        )


def _stated(metadata: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Reduction and expansion as the user or the pickled network states them."""
    network = metadata.get("net")
    return {**(network if isinstance(network, dict) else {}), **hints}


def _extra_shortcuts(tensors: Tensors) -> list[str]:
    """Blocks with a projection although their shape stays."""
    found = [match for match in map(EXTRA.fullmatch, tensors) if match]
    return [f"layer{match[1]}.{match[2]}" for match in found if match[2] != "0" or match[1] == "1"]


def _adding(blocks: list[str]) -> Callable[[nn.Module], None]:
    """What gives these blocks a projection."""

    def adapt(model: nn.Module) -> None:
        for name in blocks:
            block: Any = model.get_submodule(name)
            ins = block.conv1.in_channels if hasattr(block, "conv1") else block.conv.expand.in_channels
            norm = block.bn2 if hasattr(block, "bn2") else block.bn
            outs = (block.bn3 if hasattr(block, "bn3") else norm).num_features
            block.shortcut = nn.Sequential(nn.Conv2d(ins, outs, 1, bias=False), nn.BatchNorm2d(outs))

    return adapt
