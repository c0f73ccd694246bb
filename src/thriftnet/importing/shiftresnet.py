"""ShiftResNet's files: ResNets with projections, ShiftResNets and DepthwiseResNets.

The authors pickle the whole network. Reductions and expansions are rounded down to channels, so that several give the same
network: the file's own figure is taken where it fits, else the one with the fewest decimals. From 10 to 13 November 2017 the
repository gave reduced blocks a projection wherever the reduced width differed from the block's input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from thriftnet.errors import CheckpointError
from thriftnet.importing.evidence import Evidence, Recognised, in_zoo, normalisation, simplest_ratio
from thriftnet.importing.layout import Layout, renamed

HINTS = {"reduction": "which of the reductions that give these channels", "expansion": "which of the expansions"}
RULES = (
    (r"^fc\.", "linear."),
    (r"\.conv\.expand\.", ".conv1."),
    (r"\.conv\.norm\.", ".bn1."),
    (r"\.conv\.project\.", ".conv2."),
    (r"\.bn\.", ".bn2."),
    (r"\.depthwise\.", ".depth."),
)
COLORS = normalisation((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # for CIFAR-100, too
WIDTHS = (16, 32, 64)
# the argument; how it makes channels of a width, before they are rounded down; which one makes them a given share of the width
RATIOS: dict[str, tuple[str, Callable[[int, float], float], Callable[[float], float]]] = {
    "expansion": ("expansion", lambda width, ratio: width * ratio, lambda share: share),
    "block": ("reduction", lambda width, ratio: width / ratio, lambda share: 1 / share),
    "net": ("reduction", lambda width, ratio: width / ratio**0.5, lambda share: (1 / share) ** 2),
}
EXTRA = re.compile(r"(layer1\.\d+|layer\d\.[1-9]\d*)\.shortcut\.0\.weight")  # where the shape stays the same


def layout(model: nn.Module) -> Layout:
    """The place of each of the authors' tensors in a ResNet with projections, a ShiftResNet or a DepthwiseResNet."""
    return renamed(model, RULES)


def recognise(evidence: Evidence) -> Recognised | None:
    """A network of the ShiftResNet repository, or None."""
    if not evidence.has("linear.weight", "layer3.0.conv1.weight", "layer2.0.shortcut.0.weight"):
        return None
    if any(key.startswith("layer4.") for key in evidence.tensors):
        return None
    blocks = evidence.blocks_per_stage()
    depth = 6 * blocks + 2
    name, kwargs = _architecture(evidence, depth)
    kwargs |= evidence.classes_and_channels("linear.weight", "conv1.weight")
    extra = [match[1] for match in map(EXTRA.fullmatch, evidence.tensors) if match]
    if len(extra) == 3 * blocks - 2 and kwargs.get("reduction_mode") == "block":
        kwargs["shortcut"] = "projection-reduced"
        evidence.notes.append(
            "Every block has a projection, as reduced blocks had in the repository from 10 to 13 November 2017."
        )
        extra = []
    elif extra:
        evidence.notes.append(
            f"Shortcuts of {len(extra)} blocks have a convolution where the zoo's network has none, as reduced blocks had in "
            "the repository from 10 to 13 November 2017: they are kept, so that thriftnet.load needs model=."
        )
    adapt = partial(_add_projections, blocks=extra) if extra else None
    return evidence.network(in_zoo(name, f"a network of depth {depth}"), kwargs, layout, COLORS, adapt=adapt)


def _architecture(evidence: Evidence, depth: int) -> tuple[str, dict[str, Any]]:
    """The name in the zoo, and the arguments that give the channels found."""
    network = evidence.metadata.get("net")
    stated = {**(network if isinstance(network, dict) else {}), **evidence.hints}
    inners = _channels(evidence, "conv1")
    if evidence.has("layer1.0.depth.weight"):
        return f"depthwiseresnet{depth}", _ratio(evidence, "block", inners, stated)
    if evidence.shape("layer1.0.conv1.weight", 4)[2:] == (1, 1):
        return f"shiftresnet{depth}", _ratio(evidence, "expansion", inners, stated)
    outs = _channels(evidence, "conv2")
    if outs == inners == WIDTHS:
        return f"resnet{depth}_projection", {}
    mode = "block" if outs == WIDTHS else "net"
    if mode == "net" and isinstance(stated.get("reduction"), float) and "reduction" not in evidence.hints:
        stated["reduction"] = round(stated["reduction"] ** 2, 6)  # the authors keep its root
    reduction = _ratio(evidence, mode, inners, stated)
    return f"resnet{depth}_projection", {**reduction, "reduction_mode": mode}


def _channels(evidence: Evidence, conv: str) -> tuple[int, ...]:
    return tuple(evidence.shape(f"layer{stage}.0.{conv}.weight", 4)[0] for stage in (1, 2, 3))


def _ratio(evidence: Evidence, mode: str, found: tuple[int, ...], stated: Mapping[str, Any]) -> dict[str, float]:
    """The argument that gives these channels, by a rule of `RATIOS`, with a note where other values do, too."""
    what, channels, ratio_of = RATIOS[mode]
    shares = [(inner / width, (inner + 1) / width) for inner, width in zip(found, WIDTHS)]
    low, high = sorted((ratio_of(max(least for least, _ in shares)), ratio_of(min(most for _, most in shares))))

    def fits(ratio: float) -> bool:
        return tuple(int(channels(width, ratio)) for width in WIDTHS) == found

    value = simplest_ratio(low, high, fits, stated.get(what))
    if value is None:
        raise CheckpointError(f"its blocks have {found} channels inside: no {what} of {WIDTHS} gives these")
    if value != 1 and stated.get(what) != value:
        evidence.notes.append(
            f"{what}={value:g} is one of those that give these channels; which one was asked for makes no difference."
        )
    return {what: value}


def _add_projections(model: nn.Module, blocks: list[str]) -> None:
    """Give these blocks a projection."""
    for name in blocks:
        block: Any = model.get_submodule(name)
        ins = block.conv1.in_channels if hasattr(block, "conv1") else block.conv.expand.in_channels
        norm = block.bn2 if hasattr(block, "bn2") else block.bn
        outs = (block.bn3 if hasattr(block, "bn3") else norm).num_features
        block.shortcut = nn.Sequential(nn.Conv2d(ins, outs, 1, bias=False), nn.BatchNorm2d(outs))
