"""ResNeXts for small images: bottleneck blocks whose 3 x 3 convolution has groups. Plain, and with shared filter bases.

Source: Xie et al., Aggregated Residual Transformations for Deep Neural Networks, CVPR 2017, section 3; Kang & Kim, Learning
Deeply Shared Filter Bases, NeurIPS 2021, section 4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.arguments import Classes, Depth, ImageChannels, Rank, Weight, checked
from thriftnet.errors import ConfigError
from thriftnet.models.classifier import check_depth, projection
from thriftnet.models.resnet import ResNet
from thriftnet.techniques.filter_basis import SharedBasisConv2d

# depth -> (blocks of each stage, channels per group in the first stage)
DEPTHS = {50: ((3, 4, 6, 3), 4), 101: ((3, 4, 23, 3), 8)}
GROUPS = 32


class PartlySharedConv2d(nn.Module):
    """Filters of one block, then filters that the blocks of a stage share; each part has its own groups.

    Shape: (N, I, H, W) -> (N, U + S, H, W).

    Source: Kang & Kim, section 3.
    """

    def __init__(self, unique: nn.Conv2d, shared: SharedBasisConv2d) -> None:
        super().__init__()
        self.unique, self.shared = unique, shared
        self.in_channels, self.out_channels = unique.in_channels, unique.out_channels + shared.out_channels

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.unique(x), self.shared(x)), 1)


class ResNeXtBottleneck(nn.Module):
    """1 x 1 convolution, a middle one, 1 x 1 convolution, and the input added before the last ReLU."""

    def __init__(self, ins: int, outs: int, middle: nn.Conv2d | PartlySharedConv2d, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, middle.in_channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(middle.in_channels)
        self.conv2 = middle
        self.bn2 = nn.BatchNorm2d(middle.out_channels)
        self.conv3 = nn.Conv2d(middle.out_channels, outs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outs)
        self.shortcut = projection(ins, outs, stride)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        return F.relu(self.bn3(self.conv3(out)) + self.shortcut(x))


@checked
class ResNeXt(ResNet):
    """A ResNeXt for 32 x 32 images: a ResNet whose blocks have groups.

    Shape: (N, in_chans, H, W) -> (N, num_classes).

    Args:
        depth: Layers: 50 (32 groups of 4 channels in the first stage) or 101 (32 groups of 8).
        num_classes, in_chans: Outputs, and channels of the image.

    Raises:
        ConfigError: An impossible depth.
    """

    def __init__(self, depth: Depth = 50, num_classes: Classes = 100, in_chans: ImageChannels = 3) -> None:
        check_depth(depth, DEPTHS)
        blocks, per_group = DEPTHS[depth]

        def block(ins: int, outs: int, stride: int) -> ResNeXtBottleneck:
            width = GROUPS * per_group * outs // 256
            return ResNeXtBottleneck(ins, outs, nn.Conv2d(width, width, 3, stride, 1, groups=GROUPS, bias=False), stride)

        super().__init__(block, 64, (256, 512, 1024, 2048), blocks, num_classes, in_chans)


@checked
def resnext_shared(
    depth: Depth = 50,
    shared_rank: Rank = 64,
    unique_rank: Rank = 4,
    lambda_r: Weight = 10.0,
    num_classes: Classes = 100,
    in_chans: ImageChannels = 3,
) -> ResNeXt:
    """A ResNeXt in which the 3 x 3 convolutions of each stage, except for its first block, share filters.

    Ranks are those of the first stage and double from stage to stage. A ReLU follows the norm of the basis, so that basis
    and 1 x 1 convolution remain two layers.

    Args:
        depth: Layers: 50 or 101.
        shared_rank: Filters that the blocks of the first stage share.
        unique_rank: Filters of each block's own in the first stage.
        lambda_r: Factor of the orthogonality penalty in training.
        num_classes, in_chans: Outputs, and channels of the image.

    Raises:
        ConfigError: An impossible depth, or a rank that is no multiple of the group size; the message names the nearest.

    Source: Kang & Kim, section 4.
    """
    model = ResNeXt(depth, num_classes, in_chans)
    per_group = DEPTHS[depth][1]
    _check_rank("shared_rank", shared_rank, per_group)
    _check_rank("unique_rank", unique_rank, per_group)
    for stage, name in enumerate(model.stages):
        layer: Any = model.get_submodule(name)
        outs, width = 256 * 2**stage, GROUPS * per_group * 2**stage
        shared, unique = shared_rank * 2**stage, unique_rank * 2**stage
        like = nn.Conv2d(width, shared, 3, padding=1, groups=shared_rank // per_group, bias=False)
        nn.init.orthogonal_(like.weight)
        bank = SharedBasisConv2d(like, lambda_r)
        for place in range(1, len(layer)):
            own = nn.Conv2d(width, unique, 3, padding=1, groups=unique // per_group, bias=False)
            layer[place] = ResNeXtBottleneck(outs, outs, PartlySharedConv2d(own, bank))
    return model


def _check_rank(name: str, rank: int, per_group: int) -> None:
    """Raise unless the filters form groups of ``per_group`` that divide the width of the first stage."""
    width = GROUPS * per_group
    expected = [per_group * groups for groups in range(1, width + 1) if width % groups == 0]
    if rank not in expected:
        below, above = [value for value in expected if value < rank][-1:], [value for value in expected if value > rank][:1]
        raise ConfigError(
            f"{name}={rank}: filters come in groups of {per_group}, and the number of groups divides {width}; "
            f"expected one of {', '.join(map(str, expected))}; nearest: {' and '.join(map(str, below + above))}"
        )
