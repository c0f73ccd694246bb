"""ShiftResNets: each residual block is one 1 x 1 convolution, a shift and another 1 x 1 convolution.

Source: Wu et al., Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions, CVPR 2018, section 4.1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.arguments import Classes, Depth, Expansion, ImageChannels, checked
from thriftnet.models.classifier import blocks_of_depth, projection
from thriftnet.models.resnet import ResNet
from thriftnet.techniques.shift import ShiftConv2d


class ShiftBlock(nn.Module):
    """Conv-shift-conv, norm and ReLU, and the shortcut added after that last ReLU.

    Shape: (N, ins, H, W) -> (N, outs, ceil(H / stride), ceil(W / stride)).
    """

    def __init__(self, ins: int, outs: int, stride: int, expansion: float) -> None:
        super().__init__()
        self.conv = ShiftConv2d(ins, outs, stride=stride, expansion=expansion)
        self.bn = nn.BatchNorm2d(outs)
        self.shortcut = projection(ins, outs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = F.relu(self.bn(self.conv(x))) + self.shortcut(x)
        return out


@checked
def shiftresnet(
    depth: Depth = 20, expansion: Expansion = 1.0, num_classes: Classes = 10, in_chans: ImageChannels = 3
) -> ResNet:
    """A ShiftResNet of depth 6n + 2 for 32 x 32 images.

    Args:
        depth: Layers of the ResNet whose blocks it replaces: 20, 56, 110, ...
        expansion: Channels that shift, as a multiple of the block's outputs; rounded down to an integer.
        num_classes, in_chans: Outputs, and channels of the image.

    Shape: (N, in_chans, H, W) -> (N, num_classes).

    Raises:
        ConfigError: An impossible depth, or an expansion that leaves no channel.

    Source: Wu et al., sections 4.1 and 5.1. Weights start as torch's layers do.
    """

    def block(ins: int, outs: int, stride: int) -> ShiftBlock:
        return ShiftBlock(ins, outs, stride, expansion)

    return ResNet(block, 16, (16, 32, 64), blocks_of_depth(depth), num_classes, in_chans)
