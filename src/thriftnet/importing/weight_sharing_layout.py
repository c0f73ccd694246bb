"""Where the tensors of SPIN's repository are in our ConvMixers.

The authors keep all pointwise weights in lists beside the blocks: ``pwise_w.i`` and ``pwise_b.i`` are those of the i-th shared
weight or, in a network that fuses in every forward, of the i-th layer; then ``reduction_w.i`` is that layer's factor.
"""

from __future__ import annotations

from thriftnet.importing.layout import Slot, renamed
from thriftnet.models.convmixer import ConvMixer
from thriftnet.techniques.weight_sharing import FusedConv2d

RULES = (
    (r"^stem\.", "patch_embed.conv."),
    (r"^norm\.", "patch_embed.bn."),
    (r"\.depthwise\.", ".dwise_blk.0."),
    (r"\.norm1\.", ".dwise_blk.2."),
    (r"\.norm2\.", ".bn2."),
    (r"^fc\.", "head.fc."),
)
LISTS = {"weight": "pwise_w", "bias": "pwise_b", "members": "pwise_w", "biases": "pwise_b", "scales": "reduction_w"}


def convmixer_layout(model: ConvMixer) -> dict[str, Slot]:
    """The place of each of the authors' tensors.

    Shared weights are numbered by their first use, as the authors' sequential and strided mappings number them. A file made
    while fusing under their strided mapping has been trained with neighbours fused, whatever its mapping says.

    Args:
        model: One of `convmixer`, `ws_convmixer` and `wfws_convmixer`.
    """
    beside = {theirs: slot for theirs, slot in renamed(model, RULES).items() if ".pointwise." not in slot.key}
    return beside | _pointwise_slots(model)


def _pointwise_slots(model: ConvMixer) -> dict[str, Slot]:
    """The tensors in the authors' lists."""
    users: dict[int, list[int]] = {}
    for layer, block in enumerate(model.blocks):
        users.setdefault(id(block.pointwise), []).append(layer)
    slots: dict[str, Slot] = {}
    for number, layers in enumerate(users.values()):
        prefix = f"blocks.{layers[0]}.pointwise"
        pointwise = model.get_submodule(prefix)
        for name, _ in pointwise.named_parameters():
            if isinstance(pointwise, FusedConv2d):
                slots |= {f"{LISTS[name]}.{layer}": Slot(f"{prefix}.{name}", (j,)) for j, layer in enumerate(layers)}
            else:
                slots[f"{LISTS[name]}.{number}"] = Slot(f"{prefix}.{name}")
    return slots
