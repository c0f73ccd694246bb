"""The soft-sharing project's files: wide ResNets, with a bank of templates per stage or without.

The authors register a bank in every block and convolution that use it, and repeat it in the file under all these names. At
depth 10 they store banks that no layer uses.
"""

from __future__ import annotations

from torch import nn

from thriftnet.errors import CheckpointError
from thriftnet.importing.evidence import UNKNOWN, Evidence, Recognised, normalisation
from thriftnet.importing.layout import Layout, renamed

HINTS: dict[str, str] = {}
RULES = (
    (r"^conv1\.", "conv_3x3."),
    (r"^bn\.", "lastact.0."),
    (r"^fc\.", "classifier."),
    (r"^layer(\d)\.1\.conv1\.bank\.", r"bank_\1."),
    (r"^layer", "stage_"),
    (r"\.shortcut\.", ".convShortcut."),
)
REPEATED = ((r"^stage_(\d)\.\d+\.(?:conv\d\.)?bank\.templates$", r"bank_\1.templates"),)
# by the number of classes: CIFAR-10 and CIFAR-100
COLORS = {
    10: normalisation((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    100: normalisation((129.3 / 255, 124.1 / 255, 112.4 / 255), (68.2 / 255, 65.4 / 255, 70.4 / 255)),
}


def layout(model: nn.Module) -> Layout:
    """The place of each of the authors' tensors in a network of `swrn` or `wrn`."""
    return renamed(model, RULES)


def recognise(evidence: Evidence) -> Recognised | None:
    """A wide ResNet of the soft-sharing repository, or None."""
    if not evidence.has("conv_3x3.weight", "stage_1.0.conv1.weight", "classifier.weight"):
        return None
    evidence.deduplicate(REPEATED)
    blocks = evidence.blocks_per_stage(r"^stage_{}\.(\d+)\.")
    channels = evidence.shape("stage_1.0.conv1.weight", 4)[0]
    if channels % 16:
        raise CheckpointError(f"its first stage has {channels} channels: expected a multiple of 16")
    ends = evidence.classes_and_channels("classifier.weight", "conv_3x3.weight")
    name, kwargs = "wrn", {"depth": 6 * blocks + 4, "width": channels // 16, **ends}
    banks = [bank for bank in ("bank_1.templates", "bank_2.templates", "bank_3.templates") if evidence.has(bank)]
    if banks:
        name, kwargs["templates"] = "swrn", evidence.shape("bank_1.templates", 5)[0]
    if banks and blocks == 1:
        unused = sum(evidence.tensors.pop(bank).numel() for bank in banks)
        evidence.notes.append(f"{unused:,} parameters of {len(banks)} banks were left out: at depth 10 no layer uses them.")
    return evidence.network(name, kwargs, layout, COLORS.get(ends["num_classes"], UNKNOWN))
