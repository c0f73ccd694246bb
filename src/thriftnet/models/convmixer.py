"""ConvMixers as SPIN trains them: patches, then equal blocks of a depthwise and a pointwise convolution.

All blocks have one geometry, so that any of their pointwise convolutions can share a weight. Unlike in the ConvMixer paper
the pointwise part has a shortcut, too.

Source: Lin et al., SPIN: An Empirical Evaluation on Sharing Parameters of Isotropic Networks, ECCV 2022, section 4; after
Trockman & Kolter, Patches Are All You Need?, TMLR 2023.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from thriftnet.arguments import (
    Channels,
    Classes,
    Depth,
    ImageChannels,
    KernelSide,
    PositiveShare,
    ProperShare,
    Seed,
    checked,
)
from thriftnet.core.convert import convert
from thriftnet.errors import ConfigError
from thriftnet.kernels.dispatch import KernelChoice
from thriftnet.kernels.residual_norm import choose, normalised_sum
from thriftnet.models.classifier import Classifier
from thriftnet.techniques.weight_sharing import Distribution, Fusion, Mapping, WeightSharing

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}


class MixerBlock(nn.Module):
    """Depthwise convolution, then pointwise convolution; each with activation, norm and shortcut.

    Shape: (N, dim, h, w) -> (N, dim, h, w).
    """

    def __init__(self, dim: int, kernel_size: int, activation: type[nn.Module]) -> None:
        super().__init__()
        padding = kernel_size // 2 if kernel_size % 2 else "same"
        self.depthwise = nn.Conv2d(dim, dim, kernel_size, padding=padding, groups=dim)
        self.norm1 = nn.BatchNorm2d(dim)
        self.pointwise = nn.Conv2d(dim, dim, 1)
        self.norm2 = nn.BatchNorm2d(dim)
        self.act = activation()

    def forward(self, x: Tensor) -> Tensor:
        x = normalised_sum(self.norm1, self.act(self.depthwise(x)), x)
        return normalised_sum(self.norm2, self.act(self.pointwise(x)), x)

    def kernel_choice(self, x: Tensor) -> KernelChoice:
        """Which implementation sums norm and shortcut now."""
        return choose(self.norm2, x)


@checked
class ConvMixer(Classifier):
    """A ConvMixer with a weight for every layer.

    Patches, blocks of one geometry, global average pooling, dropout, linear head.

    Args:
        dim: Channels of all blocks.
        depth: Blocks.
        patch_size: Side and stride of the patches that the stem reads.
        kernel_size: Side of the depthwise kernels.
        activation: "relu" or "gelu".
        num_classes, in_chans: Outputs, and channels of the image.
        drop_rate: Dropout before the head.

    Shape: (N, in_chans, H, W) -> (N, num_classes), for H and W of at least ``patch_size``.

    Raises:
        ConfigError: An argument out of its range.

    Source: SPIN, section 4.1.
    """

    def __init__(
        self,
        dim: Channels = 768,
        depth: Depth = 32,
        patch_size: KernelSide = 14,
        kernel_size: KernelSide = 3,
        activation: Literal["relu", "gelu"] = "relu",
        num_classes: Classes = 1000,
        in_chans: ImageChannels = 3,
        drop_rate: ProperShare = 0.5,
    ) -> None:
        super().__init__((in_chans, 224, 224), num_classes, "stem")
        self.num_features = dim
        act = ACTIVATIONS[activation]
        self.stem = nn.Conv2d(in_chans, dim, patch_size, patch_size)
        self.act = act()
        self.norm = nn.BatchNorm2d(dim)
        self.blocks = nn.Sequential(*(MixerBlock(dim, kernel_size, act) for _ in range(depth)))
        self.dropout = nn.Dropout(drop_rate)
        self.fc = nn.Linear(dim, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        features: Tensor = self.blocks(self.norm(self.act(self.stem(x))))
        return features


@checked
def shared_convmixer(
    rate: Depth = 2,
    fusion: Fusion = "mean",
    trained: bool = True,
    mapping: Mapping = "sequential",
    distribution: Distribution = "uniform",
    portion: PositiveShare = 0.5,
    seed: Seed = 0,
    dim: Channels = 768,
    depth: Depth = 32,
    patch_size: KernelSide = 14,
    kernel_size: KernelSide = 3,
    activation: Literal["relu", "gelu"] = "relu",
    num_classes: Classes = 1000,
    in_chans: ImageChannels = 3,
    drop_rate: ProperShare = 0.5,
) -> nn.Module:
    """A ConvMixer whose pointwise convolutions share weights in groups.

    With ``trained`` (WFWS) the weights of all layers are trained, and those of a group are fused in every forward; `fold` bakes the
    fused weights in. Without it (WS) each group has one weight from the start.

    Args:
        rate: Layers per weight; it divides the depth.
        fusion, trained, mapping, distribution, portion, seed: As in `WeightSharing`.
        dim, depth, patch_size, kernel_size, activation, num_classes, in_chans, drop_rate: As in `ConvMixer`.

    Raises:
        ConfigError: The rate does not divide the depth, with the rates that do.

    Source: SPIN, sections 3.2 (weight sharing) and 3.3 (weight fusion).
    """
    technique = WeightSharing(
        rate=rate, mapping=mapping, distribution=distribution, portion=portion, seed=seed, fusion=fusion, trained=trained
    )
    backbone = ConvMixer(dim, depth, patch_size, kernel_size, activation, num_classes, in_chans, drop_rate)
    if depth % rate:
        expected = ", ".join(str(value) for value in range(1, depth + 1) if depth % value == 0)
        raise ConfigError(f"rate={rate} does not divide the depth {depth}: expected one of {expected}")
    return convert(backbone, technique, select=r"^blocks\.\d+\.pointwise$", inplace=True, check=False)
