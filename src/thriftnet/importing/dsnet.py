"""DS-Net's files: slimmable supernets, whose norms keep a list of statistics, one entry for each width.

Of a layer's list, ``aux_bn.0`` to ``aux_bn.n``, only the last has an affine. The gate, which chooses among the narrowest
sub-networks, is ``gate.gate.0`` of the first block in its stage. Tensors do not tell strides, nor the activation. A file may
hold the weights twice: as trained, and their moving average.
"""

from __future__ import annotations

import re
from itertools import chain

from thriftnet.core.norm import PlainBatchNorm2d
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.importing.evidence import IMAGENET_BICUBIC, Evidence, Recognised, simplest_ratio
from thriftnet.importing.layout import Layout, Slot, renamed
from thriftnet.models.dsnet import MOBILENETV1, DSNet
from thriftnet.models.dsnet_blocks import divisible

HINTS = {
    "ema": "whether the moving average of the weights is taken, where the file holds both",
    "strides": "of the stages, as (1, 2, 2, 2, 2)",
    "activation": "swish or relu",
    "skip": "whether blocks have shortcuts, where no shortcut has a tensor",
}
STEM = (16, 24)


def _block(match: re.Match[str]) -> str:
    stage, block = match[1], int(match[2])
    return f"blocks.{stage}.{f'residual_blocks.{block - 1}' if block else 'first_block'}."


RULES = (
    (r"^stem\.", "conv_stem."),
    (r"^norm\.", "bn1."),
    (r"^head\.0\.", "conv_head."),
    (r"^head\.1\.", "bn2."),
    (r"^fc\.", "classifier."),
    (r"^stages\.(\d+)\.(\d+)\.", _block),
    (r"\.se\.gate\.conv\.", ".gate.gate.0."),
    (r"\.se\.", ".gate.conv_"),
    (r"\.depthwise\.", ".conv_dw."),
    (r"\.(expand|pointwise)\.", ".conv_pw."),
    (r"\.project\.", ".conv_pwl."),
    (r"\.norm(\d)\.", r".bn\1."),
    (r"\.shortcut\.", ".downsample."),
)


def layout(model: DSNet) -> Layout:
    """The place of each of the authors' tensors in a supernet with all its sub-networks."""
    slots: dict[str, Slot] = {}
    for key, slot in renamed(model, RULES).items():
        place, _, leaf = slot.key.rpartition(".")
        norm = model.get_submodule(place)
        if isinstance(norm, PlainBatchNorm2d) and norm.width_spec is not None:
            last = str(norm.width_spec.bn_set(-1))
            name, _, bn_set = leaf.rpartition("_") if leaf[-1].isdigit() else (leaf, "", last)
            key = f"{key.rpartition('.')[0]}.aux_bn.{bn_set}.{name}"
        slots[key] = slot
    return slots


def recognise(evidence: Evidence) -> Recognised | None:
    """A supernet of DS-Net's repository, or None."""
    if not evidence.has("conv_stem.weight") or not any(".aux_bn." in key for key in evidence.tensors):
        return None
    number = evidence.count(r"^blocks\.(\d+)\.")
    if not number:
        raise CheckpointError("it has no blocks")
    strides = _strides(evidence, number)
    parts = [_stage(evidence, stage, strides[stage]) for stage in range(number)]
    gate = _gate_stage(evidence, [len(widths) for widths, *_ in parts])
    stages = tuple((*part, stage == gate) for stage, part in enumerate(parts))
    stem = _widths(evidence, "bn1")
    kwargs = evidence.classes_and_channels("classifier.weight", "conv_stem.weight")
    ratio = _se_ratio(evidence)
    kwargs |= {"se_ratio": ratio} if ratio != 0.25 else {}
    skip = any(".downsample." in key for key in evidence.tensors) or bool(evidence.hints.get("skip", False))
    activation = evidence.hint("activation", None, "swish")
    name = "slimmable_mobilenetv1"
    if (stem, stages, skip, activation) != (STEM, MOBILENETV1, False, "swish") or evidence.has("conv_head.weight"):
        name = "dsnet"
        kwargs |= {"stem": stem, "stages": stages, "skip": skip, "activation": activation}
        if evidence.has("conv_head.weight"):
            kwargs["head"] = evidence.shape("conv_head.weight", 4)[0]
    absent: tuple[str, ...] = ()
    if gate is not None and not evidence.has(_gate_key(gate)):
        absent = (_gate_key(gate),)
        evidence.notes.append(
            f"The file has no gate: that of stage {gate} starts at zero. Sub-networks of a fixed width do not use it."
        )
    return evidence.network(name, kwargs, layout, IMAGENET_BICUBIC, absent=absent)


def _stage(evidence: Evidence, stage: int, stride: int) -> tuple[tuple[int, ...], int, int, int, str]:
    """Widths, blocks, kernel size, stride and kind of one stage."""
    first = f"blocks.{stage}.first_block"
    inverted = evidence.has(f"{first}.conv_pwl.weight")
    widths = _widths(evidence, f"{first}.{'bn3' if inverted else 'bn2'}")
    blocks = 1 + evidence.count(rf"^blocks\.{stage}\.residual_blocks\.(\d+)\.")
    return widths, blocks, evidence.shape(f"{first}.conv_dw.weight", 4)[2], stride, "ir" if inverted else "ds"


def _widths(evidence: Evidence, norm: str) -> tuple[int, ...]:
    """The widths of a norm, from its list of statistics."""
    number = evidence.count(rf"^{re.escape(norm)}\.aux_bn\.(\d+)\.")
    return tuple(evidence.shape(f"{norm}.aux_bn.{i}.running_mean", 1)[0] for i in range(number))


def _strides(evidence: Evidence, number: int) -> tuple[int, ...]:
    strides = evidence.hint("strides", None, (1,) + (2,) * (number - 1))
    if not isinstance(strides, list | tuple) or len(strides) != number:
        raise ConfigError(f"strides={strides!r}: expected {number} integers, one for each stage of the file")
    return tuple(strides)


def _gate_key(stage: int) -> str:
    return f"blocks.{stage}.first_block.gate.gate.0.weight"


def _gate_stage(evidence: Evidence, widths: list[int]) -> int | None:
    """The stage with the gate: where one is stored, else the first that has more widths than the stage before it."""
    stored = (stage for stage in range(len(widths)) if evidence.has(_gate_key(stage)))
    wider = (stage for stage in range(1, len(widths)) if widths[stage] > widths[stage - 1])
    return next(chain(stored, wider), None)


def _se_ratio(evidence: Evidence) -> float:
    """The reduced features of the channel attention as a share of the channels, the same in all blocks."""
    pairs = [evidence.shape(key, 4)[:2] for key in evidence.tensors if key.endswith(".gate.conv_reduce.weight")]

    def fits(ratio: float) -> bool:
        return all(reduced == divisible(channels * ratio, 1) for reduced, channels in pairs)

    if not pairs:
        raise CheckpointError("its blocks have no channel attention (gate.conv_reduce), which the zoo's supernets have")
    low = max((reduced - 0.5) / channels for reduced, channels in pairs)
    ratio = simplest_ratio(low, min((reduced + 0.5) / channels for reduced, channels in pairs), fits, 0.25)
    if ratio is None:
        raise CheckpointError("the channel attention reduces its blocks' channels by different ratios; expected one for all")
    return ratio
