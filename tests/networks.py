"""Tiny networks to hold the laws against: float64, seeded, in eval mode, with norms that are far from their defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomise_norms(model: nn.Module, seed: int = 1) -> nn.Module:
    """Give every norm statistics and factors that are neither 0 nor 1, for all of its widths."""
    generator = torch.Generator().manual_seed(seed)
    for norm in model.modules():
        if not isinstance(norm, nn.modules.batchnorm._BatchNorm | nn.GroupNorm | nn.LayerNorm):
            continue
        for name, tensor in (*norm.named_parameters(recurse=False), *norm.named_buffers(recurse=False)):
            if not tensor.is_floating_point():
                tensor.fill_(7)
            elif name.startswith("running_var") or name == "weight":
                tensor.uniform_(0.6, 1.6, generator=generator)
            else:
                tensor.normal_(0.4 if name == "bias" else 0.0, 0.3, generator=generator)  # keeps most ReLUs alive
    return model


@torch.no_grad()
def perturb(model: nn.Module, seed: int = 2) -> nn.Module:
    """Move every parameter, each stored one once, so that nothing is left at its start. Norms stay healthy."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.empty_like(parameter).normal_(generator=generator)
        parameter.mul_(1 + 0.2 * noise).add_(noise, alpha=0.02)
    return randomise_norms(model, seed)


class Chain(nn.Module):
    """Convolution, norm, ReLU, over and over, then a linear head. All body convolutions are equal and have a bias."""

    def __init__(self, channels: int = 8, depth: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.stem_norm = nn.BatchNorm2d(channels)
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(depth))
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return self.head(x.mean((2, 3)))


class Block(nn.Module):
    """Two 3 x 3 convolutions around a shortcut, with a 1 x 1 convolution in it where the shape changes."""

    def __init__(self, ins: int, outs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.shortcut = nn.Sequential()
        if stride != 1 or ins != outs:
            self.shortcut = nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn1(self.conv1(x)).relu()
        return (self.bn2(self.conv2(out)) + self.shortcut(x)).relu()


class Residual(nn.Module):
    """A residual network of two stages, the second with stride 2."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.stage1 = nn.Sequential(Block(8, 8), Block(8, 8))
        self.stage2 = nn.Sequential(Block(8, 16, 2), Block(16, 16))
        self.fc = nn.Linear(16, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.stage2(self.stage1(x)).mean((2, 3)))


class Depthwise(nn.Module):
    """Depthwise, pointwise, grouped, dilated and plain convolutions, batch norms and a group norm."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(8)
        self.depthwise = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False) for _ in range(2))
        self.pointwise = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(4))
        self.grouped = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=2, padding_mode="reflect") for _ in range(2))
        self.group_norm = nn.GroupNorm(4, 8)
        self.plain = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))
        self.dilated = nn.Conv2d(8, 8, 3, padding="same", dilation=2, padding_mode="circular", bias=False)
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x)).relu()
        norms = iter(self.norms)
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = next(norms)(pointwise(depthwise(x))).relu()
        x = self.group_norm(self.grouped[1](self.grouped[0](x).relu())).relu()
        for plain in self.plain:
            x = next(norms)(plain(x)).relu()
        return self.head(self.dilated(x).mean((2, 3)) + x.amax((2, 3)))


class Looped(nn.Module):
    """A network that uses one convolution under two names, and another under a list and a name: ties from the start."""

    def __init__(self, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = nn.Conv2d(8, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.first_again = self.first
        self.body = nn.ModuleList([self.second, nn.BatchNorm2d(8)])
        self.head = nn.Linear(8, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = self.first(x).relu()
        x = self.second(x).relu()
        x = self.first_again(x).relu()
        x = self.body[1](self.body[0](x)).relu()
        return self.head(x.mean((2, 3)))


def narrow_resnet18(width: int = 4, classes: int = 5) -> nn.Module:
    """torchvision's own ResNet-18 code, with ``width`` channels in its first stage in place of 64."""
    from torchvision.models.resnet import BasicBlock, ResNet

    class NarrowResNet(ResNet):
        """`ResNet` asks for 64, 128, ... channels by number: divide them all."""

        def _make_layer(self, block: type[BasicBlock], planes: int, *args: int, **kwargs: int) -> nn.Sequential:
            if self.inplanes == 64 and planes == 64:
                self.inplanes = width
            return super()._make_layer(block, planes * width // 64, *args, **kwargs)

    model = NarrowResNet(BasicBlock, [2, 2, 2, 2], num_classes=classes)
    model.conv1, model.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
    model.fc = nn.Linear(8 * width, classes)
    model.__class__ = ResNet  # so that it pickles as torchvision's class
    return model


@dataclass(frozen=True)
class Network:
    """A tiny network: how to make it and what it reads.

    Args:
        name: Its name in test ids.
        build: Makes it with default initialisation.
        input_size: Channels, height and width of an image.
        batch: Images in the input that `image` gives.
        equal_layers: A selection whose sets of equal convolutions all have as many members as ``equal_count``.
        equal_count: See there.
        equal_inputs: A selection of 3 x 3 convolutions with groups=1 that all read ``equal_channels`` channels.
        equal_channels: See there.
    """

    name: str
    build: Callable[[], nn.Module]
    input_size: tuple[int, int, int]
    batch: int
    equal_layers: str
    equal_count: int
    equal_inputs: str
    equal_channels: int

    def make(self, seed: int = 0) -> nn.Module:
        """The network in float64 and eval mode, its values drawn with ``seed``; the random state stays as it is."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = self.build().double()
            for module in model.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        return randomise_norms(model, seed + 100).eval()

    def image(self, seed: int = 0) -> Tensor:
        """A batch of inputs."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(self.batch, *self.input_size, generator=generator, dtype=torch.float64)


NETWORKS: dict[str, Network] = {
    network.name: network
    for network in (
        Network("chain", Chain, (3, 8, 8), 3, r"^convs", 4, r"^convs", 8),
        Network("residual", Residual, (3, 8, 8), 3, r"^stage1", 4, r"^stage1", 8),
        Network("depthwise", Depthwise, (3, 8, 8), 3, r"^(depthwise|grouped|plain)", 2, r"^plain", 8),
        Network("resnet18", narrow_resnet18, (3, 32, 32), 2, r"^layer1", 4, r"^layer1", 4),
    )
}
LOOPED = Network("looped", Looped, (3, 8, 8), 3, r"^(first|second)$", 2, r"^(first|second)$", 8)
