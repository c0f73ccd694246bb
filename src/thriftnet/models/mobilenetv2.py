"""MobileNetV2: inverted residuals, whose ends are narrow and whose middle is wide. Plain, and with shared 1 x 1 convolutions.

Source: Sandler et al., MobileNetV2, CVPR 2018, section 3; Kang & Kim, Learning Deeply Shared Filter Bases, NeurIPS 2021,
section 4; Wang et al., ECA-Net, CVPR 2020, section 3 (channel attention).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.arguments import Classes, ImageChannels, ProperShare, Weight, checked
from thriftnet.core.convert import convert
from thriftnet.models.classifier import Classifier, make_stages, projection
from thriftnet.techniques.filter_basis import FilterBasis, SharedBasisConv2d

WIDTHS = (16, 24, 32, 64, 96, 160, 320)  # of the seven stages
BLOCKS = (1, 2, 3, 4, 3, 3, 1)
SHARING = r"^stage[3456]\.[1-9]\d*"  # blocks that share convolutions with their stage: all of these stages but the first


class InvertedResidual(nn.Module):
    """1 x 1 convolution to a wide middle, depthwise 3 x 3, 1 x 1 back; the input is added where the shape allows it.

    If it projects, the input is also added where only the width changes, through a 1 x 1 convolution and norm.
    """

    def __init__(self, ins: int, outs: int, expansion: int, stride: int, projects: bool) -> None:
        super().__init__()
        inner = expansion * ins
        self.conv1: nn.Conv2d | SharedBasisConv2d = nn.Conv2d(ins, inner, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3: nn.Conv2d | SharedBasisConv2d = nn.Conv2d(inner, outs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outs)
        self.attention: nn.Module = nn.Identity()
        adds_input = stride == 1 and (projects or ins == outs)
        self.shortcut = projection(ins, outs, stride) if adds_input else None

    def forward(self, x: Tensor) -> Tensor:
        wide = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        out: Tensor = self.attention(self.bn3(self.conv3(wide)))
        return out if self.shortcut is None else out + self.shortcut(x)


class ChannelAttention(nn.Module):
    """ECA: a factor per channel, from the means of the channel and its neighbours.

    Shape: (N, C, H, W) -> the same.

    Source: Wang et al., section 3.2.
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 1, kernel_size, padding=kernel_size // 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3))  # (N, C)
        factors: Tensor = self.conv(means[:, None]).sigmoid()  # (N, 1, C)
        return x * factors.mT[..., None]


@checked
class MobileNetV2(Classifier):
    """Stem, seven stages of inverted residuals, 1 x 1 convolution, global average pooling, dropout, linear head.

    Shape: (N, in_chans, H, W) -> (N, num_classes).

    Args:
        num_classes, in_chans: Outputs, and channels of the image.
        drop_rate: Dropout before the head.
        large: For 224 x 224 images; else for 32 x 32, with a 1 x 1 stem that pads its maps to 34 x 34.

    Raises:
        ConfigError: A number that is out of range.
    """

    def __init__(
        self, num_classes: Classes = 1000, in_chans: ImageChannels = 3, drop_rate: ProperShare = 0.2, large: bool = True
    ) -> None:
        side = 224 if large else 32
        super().__init__((in_chans, side, side), num_classes)
        self.conv1 = nn.Conv2d(in_chans, 32, 3, 2, 1) if large else nn.Conv2d(in_chans, 32, 1, padding=1)
        self.bn1 = nn.BatchNorm2d(32)

        def block(ins: int, outs: int, stride: int) -> InvertedResidual:
            return InvertedResidual(ins, outs, 1 if outs == WIDTHS[0] else 6, stride, projects=not large)

        strides = (1, 2, 2, 2, 1, 2 if large else 1, 1)
        for number, stage in enumerate(make_stages(block, 32, WIDTHS, BLOCKS, strides), 1):
            self.add_module(f"stage{number}", stage)
        self.conv2 = nn.Conv2d(WIDTHS[-1], 1280, 1)
        self.bn2 = nn.BatchNorm2d(1280)
        self.dropout = nn.Dropout(drop_rate)
        self.num_features = 1280
        self.fc = nn.Linear(1280, num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        x = F.relu6(self.bn1(self.conv1(x)))
        for stage in range(1, len(WIDTHS) + 1):
            x = self.get_submodule(f"stage{stage}")(x)
        return F.relu6(self.bn2(self.conv2(x)))


@checked
def mobilenetv2_shared(
    num_classes: Classes = 1000,
    in_chans: ImageChannels = 3,
    drop_rate: ProperShare = 0.2,
    lambda_r: Weight = 10.0,
    double: bool = False,
    eca: bool = False,
    large: bool = True,
) -> MobileNetV2:
    """A MobileNetV2 whose blocks share 1 x 1 convolutions with their stage, in four stages except for the first block.

    Args:
        num_classes, in_chans, drop_rate, large: As in `MobileNetV2`.
        lambda_r: Factor of the orthogonality penalty in training; each shared kind of convolution has its own penalty.
        double: Share both 1 x 1 convolutions of a block instead of the first.
        eca: Channel attention at the end of each sharing block: over three neighbours from 96 channels on, else over one.

    Raises:
        ConfigError: A number that is out of range.

    Source: Kang & Kim, section 4; Wang et al., section 3.2.
    """
    model = MobileNetV2(num_classes, in_chans, drop_rate, large)
    for conv in ("conv1", "conv3") if double else ("conv1",):
        technique = FilterBasis(whole=True, pointwise=True, lambda_r=lambda_r, init="random", family=conv)
        convert(model, technique, select=rf"{SHARING}\.{conv}$", inplace=True, check=False)
    for module in model.modules():
        if isinstance(module, SharedBasisConv2d):
            nn.init.kaiming_uniform_(module.weight, a=5**0.5)  # the authors leave it as torch starts a convolution
    for module in model.modules() if eca else ():
        if isinstance(module, InvertedResidual) and isinstance(module.conv1, SharedBasisConv2d):
            module.attention = ChannelAttention(1 if module.conv1.in_channels < 96 else 3)
    return model
