"""DS-Net's files: slimmable supernets, told by the lists of norms, which have one entry for each width.

Tensors do not tell strides, nor the activation. A file may hold the weights twice: as trained, and their moving average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.importing.dsnet_layout import dsnet_layout
from thriftnet.importing.recognised import (
    IMAGENET,
    Recognised,
    Tensors,
    count,
    resolve_hint,
    shape,
    shared_arguments,
    simplest_ratio,
)
from thriftnet.models.dsnet import MOBILENETV1
from thriftnet.models.dsnet_blocks import divisible

HINTS = {
    "ema": "whether the moving average of the weights is taken, where the file holds both",
    "strides": "of the stages, as (1, 2, 2, 2, 2)",
    "activation": "swish or relu",
    "skip": "whether blocks have shortcuts, where no shortcut has a tensor",
}
STEM = (16, 24)


def recognise(tensors: Tensors, metadata: Mapping[str, Any], hints: Mapping[str, Any]) -> Recognised | None:
    """A supernet of DS-Net's repository, or None."""
    if "conv_stem.weight" not in tensors or not any(".aux_bn." in key for key in tensors):
        return None
    notes: list[str] = []
    number = count(tensors, r"^blocks\.(\d+)\.")
    if not number:
        raise CheckpointError("it has no blocks")
    strides = _strides(number, hints, notes)
    parts = [_stage(tensors, stage, strides[stage]) for stage in range(number)]
    gate = _gate_place([len(widths) for widths, *_ in parts], tensors)
    stages = tuple((*part, place == gate) for place, part in enumerate(parts))
    stem = _widths(tensors, "bn1")
    classes, channels = shape(tensors, "classifier.weight", 2)[0], shape(tensors, "conv_stem.weight", 4)[1]
    kwargs: dict[str, Any] = shared_arguments(classes, channels)
    ratio = _se_ratio(tensors)
    kwargs |= {"se_ratio": ratio} if ratio != 0.25 else {}
    skip = _skip(tensors, hints, notes)
    activation = resolve_hint("activation", None, hints, "swish", notes)
    name = "slimmable_mobilenetv1"
    if (stem, stages, skip, activation) != (STEM, MOBILENETV1, False, "swish") or "conv_head.weight" in tensors:
        name = "dsnet"
        kwargs |= {"stem": stem, "stages": stages, "skip": skip, "activation": activation}
        if "conv_head.weight" in tensors:
            kwargs["head"] = shape(tensors, "conv_head.weight", 4)[0]
    absent = _without_gate(tensors, gate, notes)
    return Recognised(name, kwargs, dsnet_layout, tensors, tuple(notes), IMAGENET, absent=absent)


def _stage(tensors: Tensors, stage: int, stride: int) -> tuple[tuple[int, ...], int, int, int, str]:
    """Widths, blocks, kernel size, stride and kind of one stage."""
    first = f"blocks.{stage}.first_block"
    inverted = f"{first}.conv_pwl.weight" in tensors
    widths = _widths(tensors, f"{first}.{'bn3' if inverted else 'bn2'}")
    blocks = 1 + count(tensors, rf"^blocks\.{stage}\.residual_blocks\.(\d+)\.")
    return widths, blocks, shape(tensors, f"{first}.conv_dw.weight", 4)[2], stride, "ir" if inverted else "ds"


def _widths(tensors: Tensors, norm: str) -> tuple[int, ...]:
    """The widths of a list of norms."""
    number = count(tensors, rf"^{norm.replace('.', '[.]')}\.aux_bn\.(\d+)\.")
    return tuple(shape(tensors, f"{norm}.aux_bn.{i}.running_mean", 1)[0] for i in range(number))


def _strides(number: int, hints: Mapping[str, Any], notes: list[str]) -> tuple[int, ...]:
    strides = resolve_hint("strides", None, hints, (1,) + (2,) * (number - 1), notes)
    if not isinstance(strides, list | tuple) or len(strides) != number:
        raise ConfigError(f"strides={strides!r}: the file has {number} stages, give {number} whole numbers")
    return tuple(strides)


def _gate_place(widths: list[int], tensors: Tensors) -> int | None:
    """The stage that holds the gate: where it is stored, else the first with more widths than those before."""
    stored = [stage for stage in range(len(widths)) if f"blocks.{stage}.first_block.gate.gate.0.weight" in tensors]
    if stored:
        return stored[0]
    return next((stage for stage in range(1, len(widths)) if widths[stage] > widths[stage - 1]), None)


def _without_gate(tensors: Tensors, gate: int | None, notes: list[str]) -> tuple[str, ...]:
    """The key of the gate where the network needs one and the file has none."""
    key = f"blocks.{gate}.first_block.gate.gate.0.weight"
    if gate is None or key in tensors:
        return ()
    notes.append(
        f"The file has no gate: the one of stage {gate} starts at zero. Sub-networks of a fixed width do not use it."
    )
    return (key,)


def _se_ratio(tensors: Tensors) -> float:
    """Reduced features of the channel attention as a part of the channels, in all blocks."""
    reduces = [key for key in tensors if key.endswith(".gate.conv_reduce.weight")]
    pairs = [shape(tensors, key, 4)[:2] for key in reduces]

    def fits(ratio: float) -> bool:
        return all(reduced == divisible(channels * ratio, 1) for reduced, channels in pairs)

    if not pairs:
        raise CheckpointError("its blocks have no channel attention (gate.conv_reduce), which the zoo's supernets have")
    low = max((reduced - 0.5) / channels for reduced, channels in pairs)
    ratio = simplest_ratio(low, min((reduced + 0.5) / channels for reduced, channels in pairs), fits, 0.25)
    if ratio is None:
        raise CheckpointError("the reduced features of its channel attention are not one part of the channels in all blocks")
    return ratio


def _skip(tensors: Tensors, hints: Mapping[str, Any], notes: list[str]) -> bool:
    if any(".downsample." in key for key in tensors):
        return True
    if "skip" in hints:
        return bool(hints["skip"])
    return False
