"""ResNets for small images: three stages of n basic blocks, depth 6n + 2.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.spec import check_choice, check_number, check_whole_number
from thriftnet.errors import ConfigError
from thriftnet.models.classifier import Classifier, config, make_stages


class PadShortcut(nn.Module):
    """Option A: every second pixel, new channels are zeros, half of them on either side; in proportion when narrowed."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.ins, self.outs = ins, outs

    def forward(self, x: Tensor) -> Tensor:
        extra = x.shape[1] * (self.outs - self.ins) // self.ins
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra // 2, extra - extra // 2))


class CifarBasicBlock(nn.Module):
    """Two 3 x 3 convolutions, and the input added before the last ReLU."""

    def __init__(self, ins: int, inner: int, outs: int, stride: int, shortcut: str) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, inner, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, outs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or ins != outs or (shortcut == "projection-reduced" and ins != inner):
            projection = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))
            self.shortcut = PadShortcut(ins, outs) if shortcut == "pad" else projection

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(Classifier):
    """Stem, three stages at widths 16, 32 and 64, global average pooling, linear head.

    Shape: (N, in_chans, H, W) -> (N, num_classes), for H and W of at least 4.
    """

    def __init__(
        self,
        blocks: int,
        widths: tuple[int, int, int],
        num_classes: int,
        in_chans: int,
        make_block: Callable[[int, int, int], nn.Module],
    ) -> None:
        super().__init__()
        self.num_features, self.num_classes = widths[-1], num_classes
        self.default_cfg = config((in_chans, 32, 32), num_classes, "conv1", "fc")
        self.conv1 = nn.Conv2d(in_chans, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1, self.layer2, self.layer3 = make_stages(make_block, widths[0], widths, (blocks,) * 3, (1, 2, 2))
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        features: Tensor = self.layer3(self.layer2(self.layer1(x)))
        return features


def blocks_of_depth(depth: int) -> int:
    """Blocks per stage of a network of depth 6n + 2: its n.

    Raises:
        ConfigError: An impossible depth, with the nearest possible ones.
    """
    check_whole_number("depth", depth, 8)
    if (depth - 2) % 6:
        below = depth - (depth - 2) % 6
        raise ConfigError(f"depth={depth}: a ResNet of this kind has 6n + 2 layers; nearest are {below} and {below + 6}")
    return (depth - 2) // 6


def resnet(
    depth: int = 20,
    num_classes: int = 10,
    in_chans: int = 3,
    shortcut: str = "pad",
    reduction: float = 1.0,
    reduction_mode: str = "net",
) -> ResNet:
    """A ResNet of depth 6n + 2 for 32 x 32 images.

    Args:
        depth: Layers: 20, 32, 44, 56, 110, ...
        num_classes, in_chans: Outputs, and channels of the image.
        shortcut: "pad" (option A, no parameters) or "projection" (1 x 1 convolution and norm), where the shape changes;
            "projection-reduced" also around every block that is narrower inside, as the ShiftResNet authors had it from 10 to 13
            November 2017.
        reduction: How many times fewer parameters, roughly.
        reduction_mode: "net" narrows every layer by the square root of the reduction; "block" only the inside of blocks.

    Raises:
        ConfigError: An impossible depth, shortcut or reduction.
    """
    blocks = blocks_of_depth(depth)
    check_choice("shortcut", shortcut, ("pad", "projection", "projection-reduced"))
    check_choice("reduction_mode", reduction_mode, ("net", "block"))
    check_number("reduction", reduction, 0)
    net_factor, inner_factor = (reduction**0.5, 1.0) if reduction_mode == "net" else (1.0, reduction)
    widths = (int(16 / net_factor), int(32 / net_factor), int(64 / net_factor))
    inners = {outs: int(outs / inner_factor) for outs in widths}
    if min(*widths, *inners.values()) < 1:
        raise ConfigError(f"reduction={reduction} with reduction_mode={reduction_mode!r} leaves no channel: use less")

    def make_block(ins: int, outs: int, stride: int) -> CifarBasicBlock:
        return CifarBasicBlock(ins, inners[outs], outs, stride, shortcut)

    model = ResNet(blocks, widths, num_classes, in_chans, make_block)
    if shortcut == "pad":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model
