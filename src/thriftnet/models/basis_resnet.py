"""ResNets whose blocks share filter bases. The first block of each stage stays plain: it changes the shape.

Source: Kang & Kim, Learning Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks, NeurIPS
2021, sections 3 and 4.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from thriftnet.arguments import Classes, Depth, ImageChannels, Rank, Weight, checked
from thriftnet.core.convert import convert
from thriftnet.errors import ConfigError
from thriftnet.models.classifier import blocks_of_depth, check_depth, check_ranks
from thriftnet.models.imagenet_resnet import DEPTHS, imagenet_resnet
from thriftnet.models.resnet import resnet
from thriftnet.techniques.filter_basis import FilterBasis

LATER_BLOCKS = r"^layer\d\.[1-9]\d*"


@checked
def cifar10_resnet(
    depth: Depth = 32,
    bases: Literal[1, 2] = 2,
    shared_rank: Rank = 16,
    unique_rank: Rank = 1,
    lambda_r: Weight = 10.0,
    num_classes: Classes = 10,
    in_chans: ImageChannels = 3,
) -> nn.Module:
    """A ResNet of depth 6n + 2 for 32 x 32 images, in which the 3 x 3 convolutions of a stage share filter bases.

    Args:
        depth: Layers: 14, 20, 32, 44, 56, 110, ...
        bases: Shared bases per stage; with 2, a block's first convolution uses one and its second the other.
        shared_rank: Filters per shared basis in the first stage; later ones have twice and four times as many. 0 shares
            nothing.
        unique_rank: Filters of each convolution's own in the first stage; later ones have twice and four times as many.
        lambda_r: Factor of the orthogonality penalty in training; it covers shared and unique filters.
        num_classes, in_chans: Outputs, and channels of the image.

    Raises:
        ConfigError: An impossible depth or rank.
    """
    if blocks_of_depth(depth)[0] < 2:
        raise ConfigError(f"depth={depth}: its stages have one block, which stays plain; nearest is 14")
    technique = _basis(16, bases, shared_rank, unique_rank, lambda_r, unique_penalty=True)
    plain = resnet(depth, num_classes=num_classes, in_chans=in_chans)
    return convert(plain, technique, select=rf"{LATER_BLOCKS}\.conv[12]$", inplace=True, check=False)


@checked
def basic_resnet(
    depth: Depth = 34,
    stem: Literal["imagenet", "cifar"] = "imagenet",
    bases: Literal[1, 2] = 1,
    shared_rank: Rank = 16,
    unique_rank: Rank = 1,
    lambda_r: Weight = 10.0,
    num_classes: Classes = 1000,
    in_chans: ImageChannels = 3,
) -> nn.Module:
    """A ResNet-18 or -34, in which the 3 x 3 convolutions of a stage share filter bases.

    Args:
        depth: Layers: 18 or 34.
        stem: "imagenet" for 224 x 224 images, "cifar" for 32 x 32.
        bases: Shared bases per stage; with 2, a block's first convolution uses one and its second the other.
        shared_rank: Filters per shared basis in the first stage; each later one has twice as many. 0 shares nothing.
        unique_rank: Filters of each convolution's own in the first stage; each later one has twice as many.
        lambda_r: Factor of the orthogonality penalty in training; it covers shared filters only.
        num_classes, in_chans: Outputs, and channels of the image.

    Raises:
        ConfigError: An impossible depth, stem or rank.
    """
    check_depth(depth, [known for known, (_, bottleneck) in DEPTHS.items() if not bottleneck])
    technique = _basis(64, bases, shared_rank, unique_rank, lambda_r, unique_penalty=False)
    plain = imagenet_resnet(depth, stem, num_classes, in_chans)
    return convert(plain, technique, select=rf"{LATER_BLOCKS}\.conv[12]$", inplace=True, check=False)


@checked
def bottleneck_resnet(
    depth: Depth = 50,
    shared: Literal[1, 2] = 2,
    lambda_r: Weight = 10.0,
    num_classes: Classes = 1000,
    in_chans: ImageChannels = 3,
) -> nn.Module:
    """A ResNet of bottleneck blocks, which are decomposed as they are: those of a stage share whole convolutions.

    Args:
        depth: Layers: 50, 101 or 152.
        shared: How many convolutions of a block are shared: 1, the 3 x 3 one; or 2, the last 1 x 1 one, too. The penalty
            averages each kind for itself.
        lambda_r: Factor of the orthogonality penalty in training.
        num_classes, in_chans: Outputs, and channels of the image.

    Raises:
        ConfigError: An impossible depth or number.
    """
    check_depth(depth, [known for known, (_, bottleneck) in DEPTHS.items() if bottleneck])
    model: nn.Module = imagenet_resnet(depth, num_classes=num_classes, in_chans=in_chans)
    for conv in ("conv2", "conv3")[:shared]:
        technique = FilterBasis(whole=True, pointwise=True, lambda_r=lambda_r, family=conv, init="random")
        model = convert(model, technique, select=rf"{LATER_BLOCKS}\.{conv}$", inplace=True, check=False)
    return model


def _basis(
    channels: int, bases: Literal[1, 2], shared_rank: int, unique_rank: int, lambda_r: float, *, unique_penalty: bool
) -> FilterBasis:
    """The config for ranks that belong to the first stage's number of channels."""
    technique = FilterBasis(
        shared_rank=shared_rank,
        unique_rank=unique_rank,
        bases=bases,
        rank_channels=channels,
        lambda_r=lambda_r,
        unique_penalty=unique_penalty,
        init="random",
        alone=False,
    )
    check_ranks(shared_rank, unique_rank, 9 * channels, " in the first stage")
    return technique
