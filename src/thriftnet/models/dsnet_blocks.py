"""Layers and blocks of DS-Net, shared by its sub-networks.

Source: Li et al., Dynamic Slimmable Network, CVPR 2021, section 3; the authors' code for what the paper leaves open.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.conv import PlainConv2d
from thriftnet.core.norm import PlainBatchNorm2d
from thriftnet.core.width import WidthAware, WidthSpec
from thriftnet.dynamic.gate import Gate, squeeze

GATE_CHOICES = (0, 1, 2, 3)  # the authors' gate chooses among the narrowest sub-networks
EXPANSION = 6  # of inverted residuals
KINDS = ("ds", "ir")


class Widths(tuple[int, ...]):
    """Channels at one slot of the network in each sub-network, "largest" last."""

    slot: str  # its name; "" if all sub-networks have the same number of channels there

    def __new__(cls, channels: Iterable[int], slot: str = "") -> Widths:
        widths = super().__new__(cls, channels)
        widths.slot = slot
        return widths


@dataclass(frozen=True)
class StageSpec:
    """Blocks at one resolution, in the authors' terms."""

    widths: tuple[int, ...]  # output channels to choose from, ascending
    blocks: int
    kernel_size: int  # of the depthwise convolutions, odd
    stride: int  # of the first block
    kind: str  # "ds" for depthwise-separable blocks, "ir" for inverted residuals
    gate: bool  # whether the first block holds the gate


@dataclass(frozen=True)
class BlockOptions:
    """Options of all blocks of a network, see `DSNet`."""

    se_ratio: float
    activation: type[nn.Module]
    skip: bool
    choices: tuple[int, ...]  # indices of the sub-networks that the gate chooses among


def slim_conv(
    ins: Widths, outs: Widths, kernel_size: int = 1, stride: int = 1, *, bias: bool = False, depthwise: bool = False
) -> PlainConv2d:
    """A convolution of these widths, padded by half the kernel."""
    padding = kernel_size // 2
    groups = ins[-1] if depthwise else 1
    conv = PlainConv2d(nn.Conv2d(ins[-1], outs[-1], kernel_size, stride, padding, groups=groups, bias=bias))
    conv.set_width_spec(WidthSpec(names_of(outs), tuple(ins), tuple(outs), slot=outs.slot))
    return conv


def slim_norm(widths: Widths) -> PlainBatchNorm2d:
    """A norm with statistics for each distinct width: sub-networks of the same width share them."""
    distinct = sorted(set(widths))
    norm = PlainBatchNorm2d(nn.BatchNorm2d(widths[-1]))
    norm.set_width_spec(WidthSpec(names_of(widths), tuple(widths), tuple(widths), tuple(map(distinct.index, widths))))
    return norm


def names_of(widths: Widths) -> tuple[str, ...]:
    """Names of the sub-networks: "0", "1", ... as the authors number them, and "largest"."""
    return (*map(str, range(len(widths) - 1)), "largest")


class WidthGate(Gate):
    """Chooses a sub-network for an image from the reduced features of a squeeze-and-excitation.

    Shape: (N, reduced) or (N, reduced, 1, 1) -> (N, choices) logits.

    Source: Li et al., section 3.3.
    """

    def __init__(self, reduced: int, choices: Sequence[int]) -> None:
        super().__init__([str(choice) for choice in choices], reads="reduce")
        self.conv = nn.Conv2d(reduced, len(self.widths), 1, bias=False)
        self.requires_grad_(False)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(squeeze(features).relu(), self.conv.weight.flatten(1))


class SqueezeExcite(nn.Module):
    """Channel attention, whose reduced features are the same at every width. The gate, if any, reads them.

    Shape: (N, C, H, W) -> (N, C, H, W).
    """

    def __init__(self, widths: Widths, se_ratio: float, choices: Sequence[int]) -> None:
        super().__init__()
        reduced = Widths((divisible(widths[-1] * se_ratio, 1),) * len(widths))
        self.reduce = slim_conv(widths, reduced, bias=True)
        self.expand = slim_conv(reduced, widths, bias=True)
        self.gate = WidthGate(reduced[-1], choices) if choices else None

    def forward(self, x: Tensor) -> Tensor:
        reduced = F.relu(self.reduce(x.mean((2, 3), keepdim=True)))
        attention: Tensor = self.expand(reduced).sigmoid()
        return x * attention


class Shortcut(nn.Sequential):
    """Average pooling if the block has a stride, a 1 x 1 convolution if its input and output channels differ."""

    def __init__(self, ins: Widths, outs: Widths, stride: int) -> None:
        pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
        super().__init__(*([pool] if stride > 1 else []), *([slim_conv(ins, outs)] if ins != outs else []))


class SeparableBlock(nn.Module):
    """Depthwise convolution, channel attention, 1 x 1 convolution; before a shortcut the last norm starts at 0."""

    def __init__(self, ins: Widths, outs: Widths, stage: StageSpec, first: bool, options: BlockOptions) -> None:
        super().__init__()
        stride, holds_gate = (stage.stride, stage.gate) if first else (1, False)
        self.depthwise = slim_conv(ins, ins, stage.kernel_size, stride, depthwise=True)
        self.norm1 = slim_norm(ins)
        self.se = SqueezeExcite(ins, options.se_ratio, options.choices if holds_gate else ())
        self.pointwise = slim_conv(ins, outs)
        self.norm2 = slim_norm(outs)
        self.act = options.activation()
        self.shortcut = Shortcut(ins, outs, stride) if options.skip else None
        if options.skip:
            nn.init.zeros_(self.norm2.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.se(self.act(self.norm1(self.depthwise(x))))
        out = self.act(self.norm2(self.pointwise(out)))
        return out if self.shortcut is None else out + self.shortcut(x)


class DSNetInvertedResidual(nn.Module):
    """1 x 1 expansion, depthwise convolution, channel attention, linear 1 x 1 projection; as `SeparableBlock` in all else."""

    def __init__(self, ins: Widths, outs: Widths, stage: StageSpec, first: bool, options: BlockOptions) -> None:
        super().__init__()
        stride, holds_gate = (stage.stride, stage.gate) if first else (1, False)
        middle = Widths((divisible(width * EXPANSION, 8) for width in ins), ins.slot)
        self.expand = slim_conv(ins, middle)
        self.norm1 = slim_norm(middle)
        self.depthwise = slim_conv(middle, middle, stage.kernel_size, stride, depthwise=True)
        self.norm2 = slim_norm(middle)
        self.se = SqueezeExcite(middle, options.se_ratio, options.choices if holds_gate else ())
        self.project = slim_conv(middle, outs)
        self.norm3 = slim_norm(outs)
        self.act = options.activation()
        self.shortcut = Shortcut(ins, outs, stride) if options.skip else None
        if options.skip:
            nn.init.zeros_(self.norm3.weight)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.norm1(self.expand(x)))
        out = self.se(self.act(self.norm2(self.depthwise(out))))
        out = self.norm3(self.project(out))
        return out if self.shortcut is None else out + self.shortcut(x)


def make_stage(stage: StageSpec, ins: Widths, outs: Widths, options: BlockOptions) -> nn.Sequential:
    """The blocks of one stage."""
    block = SeparableBlock if stage.kind == "ds" else DSNetInvertedResidual
    first = block(ins, outs, stage, True, options)
    return nn.Sequential(first, *(block(outs, outs, stage, False, options) for _ in range(stage.blocks - 1)))


class WidestDropout(WidthAware):
    """Dropout in the widest sub-network only: narrower ones have too little capacity to need it."""

    def __init__(self, rate: float, widths: Widths) -> None:
        super().__init__()
        self.rate = rate
        self.set_width_spec(WidthSpec(names_of(widths), tuple(widths), tuple(widths)))

    def forward(self, x: Tensor) -> Tensor:
        widest = self.width_spec is None or self.width_spec.widths[self.width_index] == self.width_spec.widths[-1]
        return F.dropout(x, self.rate, self.training and widest)

    def fold(self) -> nn.Identity:
        """An identity: folding is for eval mode."""
        return nn.Identity()


def divisible(value: float, divisor: int) -> int:
    """The multiple of ``divisor`` nearest to ``value``, but at most a tenth below it.

    Example:
        >>> divisible(10.5, 1), divisible(60, 8), divisible(11, 8)
        (11, 64, 16)
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded
