"""ResNets around any blocks, and those for small images: three stages of n basic blocks, depth 6n + 2.

Source: He et al., Deep Residual Learning for Image Recognition, CVPR 2016, section 4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.arguments import Classes, Depth, ImageChannels, Reduction, checked
from thriftnet.errors import ConfigError
from thriftnet.models.classifier import Classifier, blocks_of_depth, make_stages


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
    """Stem, stages that halve the maps from the second on, global average pooling, linear head.

    Shape: (N, in_chans, H, W) -> (N, num_classes).

    Args:
        block: Makes a block from its input channels, output channels and stride.
        stem: Output channels of the first convolution.
        widths, blocks: Of each stage: its output channels and its number of blocks.
        num_classes, in_chans: Outputs, and channels of the image.
        large: The first convolution is 7 x 7 with stride 2, and pooling follows (for 224 x 224); else 3 x 3 (for 32 x 32).
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        stem: int,
        widths: Sequence[int],
        blocks: Sequence[int],
        num_classes: int,
        in_chans: int,
        large: bool = False,
    ) -> None:
        side = 224 if large else 32
        super().__init__((in_chans, side, side), num_classes)
        kernel_size, stride = (7, 2) if large else (3, 1)
        self.conv1 = nn.Conv2d(in_chans, stem, kernel_size, stride, kernel_size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if large else None
        strides = (1, *(2 for _ in widths[1:]))
        self.stages = [f"layer{number}" for number, _ in enumerate(widths, 1)]
        for name, stage in zip(self.stages, make_stages(block, stem, widths, blocks, strides), strict=True):
            self.add_module(name, stage)
        self.num_features = widths[-1]
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        if self.maxpool is not None:
            x = self.maxpool(x)
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return x


def init_by_outputs(model: ResNet) -> ResNet:
    """Start all convolutions as He et al. do, by their outputs."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


@checked
def resnet(
    depth: Depth = 20,
    num_classes: Classes = 10,
    in_chans: ImageChannels = 3,
    shortcut: Literal["pad", "projection", "projection-reduced"] = "pad",
    reduction: Reduction = 1.0,
    reduction_mode: Literal["net", "block"] = "net",
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
    net_factor, inner_factor = (reduction**0.5, 1.0) if reduction_mode == "net" else (1.0, reduction)
    widths = (int(16 / net_factor), int(32 / net_factor), int(64 / net_factor))
    inners = {outs: int(outs / inner_factor) for outs in widths}
    if min(*widths, *inners.values()) < 1:
        raise ConfigError(f"reduction={reduction} with reduction_mode={reduction_mode!r} leaves no channel: use less")

    def make_block(ins: int, outs: int, stride: int) -> CifarBasicBlock:
        return CifarBasicBlock(ins, inners[outs], outs, stride, shortcut)

    model = ResNet(make_block, widths[0], widths, blocks, num_classes, in_chans)
    return init_by_outputs(model) if shortcut == "pad" else model
