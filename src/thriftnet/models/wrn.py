"""Wide residual networks for small images: pre-activation blocks, depth 6n + 4.

Source: Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016; the backbone of Savarese & Maire, ICLR 2019.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.arguments import Classes, Depth, Factor, ImageChannels, checked
from thriftnet.models.classifier import Classifier, blocks_of_depth, make_stages


class WideBlock(nn.Module):
    """Norm, ReLU, 3 x 3 convolution, twice; the 1 x 1 shortcut reads the output of the first ReLU."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(ins)
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(ins, outs, 1, stride, bias=False) if ins != outs else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        out: Tensor = self.conv2(F.relu(self.bn2(self.conv1(active))))
        return out + (x if self.shortcut is None else self.shortcut(active))


@checked
class WideResNet(Classifier):
    """A wide ResNet of depth 6n + 4: stem, three stages at widths 16w, 32w and 64w, norm, ReLU, global average pooling, linear head.

    Shape: (N, in_chans, H, W) -> (N, num_classes), for H and W of at least 4.

    Args:
        depth: Layers: 10, 16, 22, 28, 40, ...
        width: Factor of the channels 16, 32, 64.
        num_classes, in_chans: Outputs, and channels of the image.

    Raises:
        ConfigError: An impossible depth or width.
    """

    def __init__(
        self, depth: Depth = 28, width: Factor = 10, num_classes: Classes = 10, in_chans: ImageChannels = 3
    ) -> None:
        blocks = blocks_of_depth(depth, 4, "a wide ResNet")
        super().__init__((in_chans, 32, 32), num_classes)
        self.conv1 = nn.Conv2d(in_chans, 16, 3, 1, 1, bias=False)
        widths = (16 * width, 32 * width, 64 * width)
        self.layer1, self.layer2, self.layer3 = make_stages(WideBlock, 16, widths, blocks, (1, 2, 2))
        self.bn = nn.BatchNorm2d(widths[-1])
        self.num_features = widths[-1]
        self.fc = nn.Linear(widths[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return F.relu(self.bn(x))
