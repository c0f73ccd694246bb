"""ResNets of depthwise convolutions, which ShiftResNet is compared with: plain, with channel shuffles, and inverted.

Source: Wu et al., Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions, CVPR 2018, and its repository,
whose README names all three; its code has the first.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.arguments import Classes, Depth, ImageChannels, Reduction, checked
from thriftnet.errors import ConfigError
from thriftnet.models.classifier import blocks_of_depth, projection
from thriftnet.models.resnet import ResNet

GROUPS = 4  # of the 1 x 1 convolutions between which channels are shuffled


class DepthwiseBlock(nn.Module):
    """1 x 1, depthwise 3 x 3, 1 x 1 with the stride, each with a norm; a ReLU after the first and after the sum.

    With groups, the 1 x 1 convolutions have them, channels are shuffled after the first, and the depthwise one has the stride.

    Shape: (N, ins, H, W) -> (N, outs, ceil(H / stride), ceil(W / stride)).

    Source of the groups: Zhang et al., ShuffleNet, CVPR 2018, figure 2b; the shortcut is that of the ResNet around it.
    """

    def __init__(self, ins: int, inner: int, outs: int, stride: int, groups: int = 1) -> None:
        super().__init__()
        middle_stride, last_stride = (stride, 1) if groups > 1 else (1, stride)
        self.conv1 = nn.Conv2d(ins, inner, 1, groups=groups, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.shuffle = nn.ChannelShuffle(groups) if groups > 1 else nn.Identity()
        self.depthwise = nn.Conv2d(inner, inner, 3, middle_stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outs, 1, last_stride, groups=groups, bias=False)
        self.bn3 = nn.BatchNorm2d(outs)
        self.shortcut = projection(ins, outs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = self.shuffle(F.relu(self.bn1(self.conv1(x))))
        out = self.bn3(self.conv3(self.bn2(self.depthwise(out))))
        return F.relu(out + self.shortcut(x))


class InvertedBlock(nn.Module):
    """1 x 1, depthwise 3 x 3 with the stride, linear 1 x 1; the input is added where the shape stays.

    Shape: as `DepthwiseBlock`.

    Source: Sandler et al., MobileNetV2, CVPR 2018, section 3.3.
    """

    def __init__(self, ins: int, inner: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = nn.Conv2d(inner, outs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outs)
        self.adds_input = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu6(self.bn1(self.conv1(x)))
        out: Tensor = self.bn3(self.conv3(F.relu6(self.bn2(self.depthwise(wide)))))
        return out + x if self.adds_input else out


BLOCKS: dict[str, Callable[[int, int, int, int], nn.Module]] = {
    "depthwise": DepthwiseBlock,
    "shuffle": partial(DepthwiseBlock, groups=GROUPS),
    "mobile": InvertedBlock,
}


@checked
def depthwise_resnet(
    depth: Depth = 20,
    reduction: Reduction = 1.0,
    num_classes: Classes = 10,
    in_chans: ImageChannels = 3,
    block: Literal["depthwise", "shuffle", "mobile"] = "depthwise",
) -> ResNet:
    """A ResNet of depthwise blocks, depth 6n + 2, for 32 x 32 images.

    Args:
        depth: Layers of the ResNet whose blocks it replaces: 20, 56, 110, ...
        reduction: How many times fewer channels inside a block than it outputs; below 1 there are more: 1/6 widens as MobileNetV2
            does.
        num_classes, in_chans: Outputs, and channels of the image.
        block: "depthwise"; "shuffle", whose inner channels are rounded down to a multiple of 4; or "mobile".

    Shape: (N, in_chans, H, W) -> (N, num_classes).

    Raises:
        ConfigError: An impossible depth, or a reduction that leaves no channel.

    Source: the ShiftResNet repository. Weights start as torch's layers do.
    """
    widths = (16, 32, 64)
    multiple = GROUPS if block == "shuffle" else 1
    inners = {outs: int(outs / reduction) // multiple * multiple for outs in widths}
    if min(inners.values()) < 1:
        raise ConfigError(f"reduction={reduction} leaves no channel: use at most {widths[0] // multiple}")

    def make_block(ins: int, outs: int, stride: int) -> nn.Module:
        return BLOCKS[block](ins, inners[outs], outs, stride)

    return ResNet(make_block, 16, widths, blocks_of_depth(depth), num_classes, in_chans)
