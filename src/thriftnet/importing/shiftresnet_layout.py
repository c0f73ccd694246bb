"""Where the tensors of the ShiftResNet repository are in our networks."""

from __future__ import annotations

from torch import nn

from thriftnet.importing.layout import Slot, renamed

RULES = (
    (r"^fc\.", "linear."),
    (r"\.conv\.expand\.", ".conv1."),
    (r"\.conv\.norm\.", ".bn1."),
    (r"\.conv\.project\.", ".conv2."),
    (r"\.bn\.", ".bn2."),
    (r"\.depthwise\.", ".depth."),
)


def shiftresnet_layout(model: nn.Module) -> dict[str, Slot]:
    """The place of each of the authors' tensors in a ResNet, ShiftResNet or DepthwiseResNet.

    Args:
        model: One of `resnet` with projection shortcuts, `shiftresnet` or `depthwise_resnet`.
    """
    return renamed(model, RULES)
