"""Where the tensors of the soft-sharing repository are in our networks."""

from __future__ import annotations

from torch import nn

from thriftnet.importing.layout import Slot, renamed

RULES = (
    (r"^conv1\.", "conv_3x3."),
    (r"^bn\.", "lastact.0."),
    (r"^fc\.", "classifier."),
    (r"^layer(\d)\.1\.conv1\.bank\.", r"bank_\1."),
    (r"^layer", "stage_"),
    (r"\.shortcut\.", ".convShortcut."),
)


def swrn_layout(model: nn.Module) -> dict[str, Slot]:
    """The place of each of the authors' tensors in a wide ResNet, with soft sharing or without.

    At depth 10 the authors store banks, ``bank_1.templates`` to ``bank_3.templates``, that no layer uses: they have no
    place in ours.

    Args:
        model: One of `swrn` or `wrn`.
    """
    return renamed(model, RULES)
