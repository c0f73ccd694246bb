"""The soft-sharing repository's files: wide ResNets with a bank of templates per stage, or without.

The authors register a bank in every block and convolution that use it, and repeat it in the file under all these names.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thriftnet.errors import CheckpointError
from thriftnet.importing.recognised import Colours, Recognised, Tensors, counts, deduplicate, shape, shared_arguments
from thriftnet.importing.soft_sharing_layout import swrn_layout

HINTS: dict[str, str] = {}
REPEATED = ((r"stage_(\d)\.\d+\.(?:conv\d\.)?bank\.templates", r"bank_\1.templates"),)
# by number of classes: CIFAR-10 and CIFAR-100
COLOURS: dict[int, Colours] = {
    10: ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    100: ((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
}


def recognise(tensors: Tensors, metadata: Mapping[str, Any], hints: Mapping[str, Any]) -> Recognised | None:
    """A wide ResNet of the soft-sharing repository, or None."""
    if not {"conv_3x3.weight", "stage_1.0.conv1.weight", "classifier.weight"} <= set(tensors):
        return None
    stored = deduplicate(tensors, REPEATED)
    blocks = counts(stored, r"^stage_{}\.(\d+)\.", range(1, 4))
    if len(set(blocks)) != 1:
        raise CheckpointError(f"its stages have {blocks} blocks: possible are equally many in all three")
    outs = shape(stored, "stage_1.0.conv1.weight", 4)[0]
    if outs % 16:
        raise CheckpointError(f"its first stage has {outs} channels: possible are multiples of 16")
    classes, stem = shape(stored, "classifier.weight", 2)[0], shape(stored, "conv_3x3.weight", 4)
    kwargs = {"depth": 6 * blocks[0] + 4, "width": outs // 16, **shared_arguments(classes, stem[1])}
    notes: list[str] = []
    banks = [f"bank_{stage}.templates" for stage in (1, 2, 3)]
    name = "wrn"
    if any(bank in stored for bank in banks):
        name = "swrn"
        kwargs["templates"] = shape(stored, banks[0], 5)[0]
        if blocks[0] == 1:
            unused = [stored.pop(bank) for bank in banks if bank in stored]
            notes.append(
                f"{sum(t.numel() for t in unused):,} parameters of {len(unused)} banks were left out: at depth 10 no layer uses them."
            )
    return Recognised(name, kwargs, swrn_layout, stored, tuple(notes), COLOURS.get(classes))
