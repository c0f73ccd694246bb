"""Where the tensors of DS-Net's repository are in our supernets.

The authors keep a norm's statistics in a list of norms, ``aux_bn.0`` to ``aux_bn.n``, one for each distinct width of that
layer; only the last has an affine. The gate, which chooses among the narrowest sub-networks, is ``gate.gate.0`` of the first
block in its stage.
"""

from __future__ import annotations

import re

from torch import nn

from thriftnet.core.norm import PlainBatchNorm2d
from thriftnet.core.tied import unique_tensors
from thriftnet.importing.layout import Slot, ours_alone
from thriftnet.models.dsnet import DSNet
from thriftnet.models.dsnet_blocks import InvertedResidual

ENDS = {"stem": "conv_stem", "norm": "bn1", "head.0": "conv_head", "head.1": "bn2", "fc": "classifier"}
COMMON = {
    "depthwise": "conv_dw",
    "norm1": "bn1",
    "norm2": "bn2",
    "norm3": "bn3",
    "se.reduce": "gate.conv_reduce",
    "se.expand": "gate.conv_expand",
    "se.gate.conv": "gate.gate.0",
    "pointwise": "conv_pw",
}
INVERTED = COMMON | {"expand": "conv_pw", "project": "conv_pwl"}


def dsnet_layout(model: DSNet) -> dict[str, Slot]:
    """The place of each of the authors' tensors.

    Args:
        model: A supernet with all its sub-networks, as `dsnet` makes it.
    """
    layout, own = {}, ours_alone(model)
    for ours in (key for key in unique_tensors(model) if key not in own):
        place, _, leaf = ours.rpartition(".")
        layout[f"{_their_module(model, place)}.{_their_leaf(model.get_submodule(place), leaf)}"] = Slot(ours)
    return layout


def _their_module(model: DSNet, place: str) -> str:
    """The authors' name of one of our layers."""
    inside = re.fullmatch(r"stages\.(\d+)\.(\d+)\.(.+)", place)
    if inside is None:
        return ENDS[place]
    stage, block, part = int(inside[1]), int(inside[2]), inside[3]
    names = INVERTED if isinstance(model.get_submodule(f"stages.{stage}.{block}"), InvertedResidual) else COMMON
    first = "first_block" if block == 0 else f"residual_blocks.{block - 1}"
    return f"blocks.{stage}.{first}.{names.get(part, part.replace('shortcut', 'downsample'))}"


def _their_leaf(module: nn.Module, leaf: str) -> str:
    """The authors' name of a tensor in one of our layers."""
    if not isinstance(module, PlainBatchNorm2d) or module.width_spec is None:
        return leaf
    name, _, store = leaf.rpartition("_") if leaf[-1].isdigit() else (leaf, "", str(module.width_spec.bn_set(-1)))
    return f"aux_bn.{store}.{name}"
