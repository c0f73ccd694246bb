"""ResNets of four stages: for 224 x 224 images, and with a small stem for 32 x 32. Names of tensors as in torchvision.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.1; the stride of a bottleneck block
sits on its 3 x 3 convolution, as torchvision has it.
"""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.arguments import Classes, Depth, ImageChannels, checked
from thriftnet.models.classifier import check_depth, projection
from thriftnet.models.resnet import ResNet, init_by_outputs

# depth -> (blocks of each stage, whether they are bottlenecks)
DEPTHS = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions, and the input added before the last ReLU."""

    expansion = 1

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.downsample = projection(ins, outs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.downsample(x))


class Bottleneck(nn.Module):
    """1 x 1 convolution to a quarter of the outputs, 3 x 3, 1 x 1, and the input added before the last ReLU."""

    expansion = 4

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        width = outs // self.expansion
        self.conv1 = nn.Conv2d(ins, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outs)
        self.downsample = projection(ins, outs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.downsample(x))


@checked
def imagenet_resnet(
    depth: Depth = 50,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    num_classes: Classes = 1000,
    in_chans: ImageChannels = 3,
) -> ResNet:
    """A ResNet of four stages.

    Args:
        depth: Layers: 18 or 34 of basic blocks; 50, 101 or 152 of bottleneck blocks.
        stem: "imagenet" for 224 x 224 images, "cifar" for 32 x 32.
        num_classes, in_chans: Outputs, and channels of the image.

    Raises:
        ConfigError: An impossible depth, stem or number.
    """
    check_depth(depth, DEPTHS)
    blocks, is_bottleneck = DEPTHS[depth]
    block: type[BasicBlock] | type[Bottleneck] = Bottleneck if is_bottleneck else BasicBlock
    widths = [block.expansion * width for width in (64, 128, 256, 512)]
    return init_by_outputs(ResNet(block, 64, widths, blocks, num_classes, in_chans, large=stem == "imagenet"))
