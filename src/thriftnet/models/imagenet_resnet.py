"""ResNets of four stages: for 224 x 224 images, and with a small stem for 32 x 32. Names of tensors as in torchvision.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.1; the stride of a bottleneck block
sits on its 3 x 3 convolution, as torchvision has it.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.spec import check_choice
from thriftnet.models.classifier import Classifier, check_depth, config, make_stages, projection

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


class ImageNetResNet(Classifier):
    """Stem, four stages at widths 64 to 512, global average pooling, linear head.

    Shape: (N, in_chans, H, W) -> (N, num_classes).

    Args:
        blocks: Blocks of each stage.
        block: Their class.
        stem: "imagenet" (7 x 7 with stride 2, then pooling) or "cifar" (3 x 3).
        num_classes, in_chans: Outputs, and channels of the image.
    """

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        block: type[BasicBlock] | type[Bottleneck],
        stem: str,
        num_classes: int,
        in_chans: int,
    ) -> None:
        super().__init__()
        large = stem == "imagenet"
        self.num_features, self.num_classes = 512 * block.expansion, num_classes
        side = 224 if large else 32
        self.default_cfg = config((in_chans, side, side), num_classes, "conv1", "fc")
        self.conv1 = nn.Conv2d(in_chans, 64, 7 if large else 3, 2 if large else 1, 3 if large else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, 1) if large else nn.Identity()
        stages = make_stages(block, 64, [block.expansion * width for width in (64, 128, 256, 512)], blocks, (1, 2, 2, 2))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        features: Tensor = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return features


def imagenet_resnet(depth: int = 50, stem: str = "imagenet", num_classes: int = 1000, in_chans: int = 3) -> ImageNetResNet:
    """A ResNet of four stages.

    Args:
        depth: Layers: 18 or 34 of basic blocks; 50, 101 or 152 of bottleneck blocks.
        stem: "imagenet" for 224 x 224 images, "cifar" for 32 x 32.
        num_classes, in_chans: Outputs, and channels of the image.

    Raises:
        ConfigError: An impossible depth, stem or number.
    """
    check_depth(depth, DEPTHS)
    check_choice("stem", stem, ("imagenet", "cifar"))
    blocks, bottleneck = DEPTHS[depth]
    return ImageNetResNet(blocks, Bottleneck if bottleneck else BasicBlock, stem, num_classes, in_chans)
