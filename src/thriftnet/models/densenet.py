"""DenseNets for small images: every layer of a dense block reads all maps before it. Plain, and with shared filter bases.

Source: Huang et al., Densely Connected Convolutional Networks, CVPR 2017, section 3 (DenseNet-BC); Kang & Kim, Learning
Deeply Shared Filter Bases, NeurIPS 2021, section 4.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.arguments import Channels, Classes, Depth, ImageChannels, Rank, Weight, check, checked
from thriftnet.core.convert import convert
from thriftnet.models.classifier import Classifier, check_depth, check_ranks
from thriftnet.techniques.filter_basis import BasisConv2d, FilterBasis, SharedBasis

# depth -> (layers of each dense block, channels that one layer adds)
DEPTHS = {121: ((6, 12, 24, 16), 32), 161: ((6, 12, 36, 24), 48), 169: ((6, 12, 32, 32), 32), 201: ((6, 12, 48, 32), 32)}


class DenseLayer(nn.Module):
    """Norm, ReLU, 1 x 1 convolution, norm, ReLU, 3 x 3 convolution; the output is appended to the input."""

    def __init__(self, ins: int, growth: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(ins)
        self.conv1 = nn.Conv2d(ins, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(F.relu(self.bn1(x)))
        return torch.cat((x, self.conv2(F.relu(self.bn2(out)))), 1)


class Transition(nn.Module):
    """Norm, 1 x 1 convolution to half the channels, 2 x 2 average pooling."""

    def __init__(self, ins: int, outs: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(ins)
        self.conv = nn.Conv2d(ins, outs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(self.bn(x)), 2)


@checked
class DenseNet(Classifier):
    """A DenseNet-BC for small images.

    Stem, four dense blocks with transitions between them, norm, ReLU, global average pooling, linear head.

    Shape: (N, in_chans, H, W) -> (N, num_classes), for H and W of at least 8.

    Args:
        depth: Layers: 121, 161, 169 or 201.
        num_classes, in_chans: Outputs, and channels of the image.

    Raises:
        ConfigError: An impossible depth.
    """

    def __init__(self, depth: Depth = 121, num_classes: Classes = 100, in_chans: ImageChannels = 3) -> None:
        check_depth(depth, DEPTHS)
        layers, growth = DEPTHS[depth]
        super().__init__((in_chans, 32, 32), num_classes)
        self.conv1 = nn.Conv2d(in_chans, 2 * growth, 3, 1, 1, bias=False)
        width = 2 * growth
        blocks: list[nn.Sequential] = []
        transitions: list[Transition] = []
        for number in layers:
            if blocks:
                transitions.append(Transition(width, width // 2))
                width //= 2
            blocks.append(nn.Sequential(*(DenseLayer(width + i * growth, growth) for i in range(number))))
            width += number * growth
        self.block1, self.block2, self.block3, self.block4 = blocks
        self.transition1, self.transition2, self.transition3 = transitions
        self.num_features = width
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.transition1(self.block1(self.conv1(x)))
        x = self.transition3(self.block3(self.transition2(self.block2(x))))
        return F.relu(self.bn(self.block4(x)))


@checked
def densenet_shared(
    depth: Depth = 121,
    shared_rank: Rank = 16,
    unique_rank: Rank = 1,
    original_sharing: bool = False,
    lambda_r: Weight = 10.0,
    num_classes: Classes = 100,
    in_chans: ImageChannels = 3,
) -> nn.Module:
    """A DenseNet-BC in which the 3 x 3 convolutions of each dense block share a filter basis.

    Args:
        depth: Layers: 121, 161, 169 or 201.
        shared_rank: Filters that all layers of a dense block share.
        unique_rank: Filters of each layer's own.
        original_sharing: The last two dense blocks share one basis, as in the authors' code, whose own basis for the last
            block is left unused. Needed for their trained weights.
        lambda_r: Factor of the orthogonality penalty in training.
        num_classes, in_chans: Outputs, and channels of the image.

    Raises:
        ConfigError: An impossible depth, or ranks that are no integers, or too large together.

    Source: Kang & Kim, section 4.
    """
    check("shared_rank", shared_rank, Channels)
    model: nn.Module = DenseNet(depth, num_classes, in_chans)
    technique = FilterBasis(
        shared_rank=shared_rank, unique_rank=unique_rank, lambda_r=lambda_r, unique_penalty=False, init="random", alone=False
    )
    check_ranks(shared_rank, unique_rank, entries=36 * DEPTHS[depth][1])
    for blocks in ("1", "2", "[34]") if original_sharing else ("1", "2", "3", "4"):
        model = convert(model, technique, select=rf"^block{blocks}\.\d+\.conv2$", inplace=True, check=False)
    _init_as_convolutions(model)
    return model


@torch.no_grad()
def _init_as_convolutions(model: nn.Module) -> None:
    """Start bases and coefficients as torch starts convolutions: so the authors leave them in DenseNets."""
    for module in model.modules():
        if isinstance(module, SharedBasis):
            banks = [bank for bank in (module.shared, module.unique) if bank is not None]
            for filters in (filters for bank in banks for filters in bank):
                nn.init.kaiming_uniform_(filters, a=5**0.5)
        elif isinstance(module, BasisConv2d):
            nn.init.kaiming_uniform_(module.coefficients.weight, a=5**0.5)
