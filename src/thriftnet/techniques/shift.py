"""Shift: move the channels, then mix them. A spatial convolution without its multiplications.

A k x k convolution becomes a 1 x 1 convolution, a shift of every channel by one of k x k offsets (no parameters, no
operations), and another 1 x 1 convolution. A depthwise convolution becomes a shift alone: the convolutions that mix the channels are
there already.

Source: Wu et al., Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions, CVPR 2018, sections 3 and 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from thriftnet.arguments import Channels, Expansion, KernelSide, Padding, Range, Step, Steps, checked
from thriftnet.core.composed import ComposedConv2d
from thriftnet.core.conv import Convolution, PlainConv2d, is_convolution, is_depthwise
from thriftnet.core.kinds import executed, kind_of
from thriftnet.core.norm import PlainBatchNorm2d
from thriftnet.core.sites import Replacement, Site
from thriftnet.core.technique import Example, Technique, steps
from thriftnet.core.tied import Tied, plain_layer
from thriftnet.core.width import WidthAware
from thriftnet.errors import ConfigError, IncompatibleModelError
from thriftnet.kernels.dispatch import KernelChoice, forced
from thriftnet.kernels.shift import choose, moved_channels, offsets, one_hot, shift
from thriftnet.kernels.triton_pointwise import shift_pointwise

LIFT = 1.0  # standard deviations by which what enters the ReLU is lifted where data is known


@checked
class Shift2d(Tied, WidthAware):
    """Shift every channel by one of k x k offsets; those left over after the last full set of k^2 stay.

    At a narrower width the first channels remain, each with its offset.

    Shape: (N, C, H, W) -> as a depthwise convolution with these settings.

    Args:
        channels: C.
        kernel_size: k; offsets run from -(k // 2).
        dilation: Pixels per step.
        padding: That of the convolution whose output size it has. Default: the size stays.
        stride: Every how many pixels are kept.

    Source: section 3; channel order as in the authors' kernel.
    """

    kernel: Tensor

    def __init__(
        self,
        channels: Channels,
        kernel_size: KernelSide = 3,
        dilation: Step = 1,
        *,
        padding: tuple[Padding, Padding] | None = None,
        stride: tuple[Step, Step] = (1, 1),
    ) -> None:
        super().__init__()
        self.channels, self.kernel_size, self.dilation = channels, kernel_size, dilation
        self.stride = stride
        self.cropped = ((0, 0), (0, 0)) if padding is None else crops(kernel_size, dilation, padding)
        self.moved = moved_channels(channels, kernel_size)
        self.register_buffer("kernel", one_hot(channels, kernel_size), persistent=False)  # (C, 1, m, m)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Shift2d:
        super()._apply(fn, recurse)
        if not self.kernel.is_meta:
            self.kernel = one_hot(self.channels, self.kernel_size).to(self.kernel)  # `to_empty` leaves nothing in it
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.kernel.is_meta:  # not stored, so that loading with assign=True does not bring it
            self.kernel = one_hot(self.channels, self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        channels = self.active_outs(self.channels)
        if isinstance(x, Tensor) and (x.ndim != 4 or x.shape[1] != channels):
            raise ConfigError(f"Shift2d moves {channels} channels of (N, {channels}, H, W), got {tuple(x.shape)}")
        out = shift(x, self.kernel[:channels], self.kernel_size, self.dilation, self.moved)
        if self.keeps_size:
            return out
        (top, bottom), (left, right) = self.cropped
        return out[:, :, top : -bottom or None : self.stride[0], left : -right or None : self.stride[1]]

    @property
    def keeps_size(self) -> bool:
        """Whether the output is as large as the input."""
        return self.stride == (1, 1) and self.cropped == ((0, 0), (0, 0))

    def kernel_choice(self, x: Tensor) -> KernelChoice:
        """Which implementation runs on this input."""
        return choose(x)

    def moved_bytes(self, output: Tensor) -> int:
        """Bytes read and written for this output."""
        return 2 * output.numel() * output.element_size()

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The same as a depthwise convolution with a fixed one-hot kernel."""
        channels, kernel = self.active_outs(self.channels), self.kernel
        if self.cropped[0][0] > self.cropped[0][1]:  # of an even side: the last row and column are empty
            kernel = kernel[:, :, :-1, :-1]
        padding = tuple(self.dilation * (self.kernel_size // 2) - first for first, _ in self.cropped)
        options = {"padding": padding, "dilation": self.dilation, "groups": channels, "stride": self.stride}
        conv = plain_layer(nn.Conv2d, (channels, channels, kernel.shape[2:]), kernel[:channels], None, **options)
        return conv.requires_grad_(False).train(self.training)

    def extra_repr(self) -> str:
        text = f"{self.channels}, kernel_size={self.kernel_size}, dilation={self.dilation}"
        return text if self.keeps_size else f"{text}, stride={self.stride}"


def crops(kernel_size: int, dilation: int, padding: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Pixels that a convolution with this padding drops at the start and end of both axes, against one that keeps the size.

    Raises:
        ConfigError: It adds some: a shift cannot.
    """
    first, last = dilation * (kernel_size // 2), dilation * (kernel_size - 1 - kernel_size // 2)
    rows, columns = ((first - pad, last - pad) for pad in padding)
    if min(*rows, *columns) < 0:
        raise ConfigError(
            f"padding={padding}: a shift by {kernel_size} x {kernel_size} offsets has at most {last} on every side"
        )
    return rows, columns


@checked
class DepthwiseShift2d(Shift2d):
    """A shift in place of a depthwise convolution.

    Shape: as the convolution.

    State dict: ``bias`` (C,), if the convolution has one.

    Args:
        like: The convolution to replace.
    """

    def __init__(self, like: Convolution) -> None:
        padding = (0, 0) if like.padding == "valid" else None if like.padding == "same" else like.padding
        super().__init__(
            like.in_channels,
            like.kernel_size[0],
            like.dilation[0],
            padding=padding,  # type: ignore[arg-type]
            stride=(like.stride[0], like.stride[1]),
        )
        self.in_channels = self.out_channels = self.groups = like.in_channels
        self.bias = None if like.bias is None else nn.Parameter(like.bias.detach().clone())
        self.to(like.weight.device, like.weight.dtype)
        self.adopt_widths(like)

    @property
    def chooses_outs(self) -> bool:
        return False

    @property
    def dense_params(self) -> int:
        """Parameters of the convolution it replaces."""
        return self.channels * (self.kernel_size**2 + (self.bias is not None))

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out if self.bias is None else out + self.bias[: out.shape[1], None, None]

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        conv = super().fold()
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias[: conv.out_channels].clone())
        return conv


@checked
class ShiftConv2d(ComposedConv2d):
    """1 x 1 convolution, batch norm, ReLU, shift, 1 x 1 convolution in place of one k x k convolution.

    Shape: (N, I, H, W) -> (N, O, ceil(H / stride), ceil(W / stride)), or as the convolution with this padding.

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: k of the shift.
        stride: Step of the last convolution.
        dilation: Pixels per step of the shift.
        padding: That of the convolution. Default: one that keeps the size.
        groups: Groups of channels of both convolutions.
        expansion: Channels between the two convolutions, as a multiple of O.
        bias: Whether the last convolution adds a bias.

    State dict: ``expand.weight`` (M, I, 1, 1), ``norm.*`` (M,), ``project.weight`` (O, M, 1, 1), ``project.bias`` (O,).

    Source: section 4.1 (the conv-shift-conv module).
    """

    def __init__(
        self,
        in_channels: Channels,
        out_channels: Channels,
        kernel_size: KernelSide = 3,
        stride: Steps = 1,
        *,
        dilation: Step = 1,
        padding: tuple[Padding, Padding] | None = None,
        groups: Channels = 1,
        expansion: Expansion = 1.0,
        bias: bool = False,
    ) -> None:
        pad = dilation * (kernel_size // 2) if padding is None else padding
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, stride, pad, dilation, groups, bias, device="meta")
        )
        middle = inner_channels(out_channels, expansion, groups)
        if middle < 1:
            raise ConfigError(
                f"expansion={expansion} of {out_channels} channels leaves none: use at least {1 / out_channels:g}"
            )
        self.expand = PlainConv2d(nn.Conv2d(in_channels, middle, 1, groups=groups, bias=False))
        self.norm = PlainBatchNorm2d(nn.BatchNorm2d(middle))
        self.act = nn.ReLU()
        self.shift = Shift2d(middle, kernel_size, dilation, padding=padding)
        self.project = PlainConv2d(nn.Conv2d(middle, out_channels, 1, stride, groups=groups, bias=bias))

    @torch.no_grad()
    def start_on(self, inputs: Tensor) -> None:
        """Give the norm the statistics of data, at the same function but for a lift, so that most of it passes the ReLU."""
        rows = self.expand(inputs).transpose(0, 1).flatten(1)
        mean, var = rows.mean(1), rows.var(1, correction=0)
        std = (var + self.norm.eps).sqrt()
        self.norm.running_mean, self.norm.running_var = mean, var
        self.norm.weight.copy_(std), self.norm.bias.copy_(mean.clamp_min(0) + LIFT * std)

    def forward(self, x: Tensor) -> Tensor:
        choice = forced("shift")
        if choice is not None and choice.implementation == "fused" and self.shift.keeps_size and self.groups == 1:
            return self._fused(self.norm(self.expand(x)))
        return super().forward(x)

    def _fused(self, x: Tensor) -> Tensor:
        """ReLU, shift and last convolution in one kernel."""
        choose(x)  # raises where it cannot run
        weight, bias, _ = self.project.active()
        stride, other = self.project.stride
        if stride != other:
            raise ConfigError(f"shift='fused' takes one stride for both axes, got {self.project.stride}")
        shift = self.shift
        mixed: Tensor = shift_pointwise(x, weight, shift.kernel_size, shift.dilation, shift.moved, stride, relu=True)
        return mixed if bias is None else mixed + bias[:, None, None]


def inner_channels(out_channels: int, expansion: float, groups: int) -> int:
    """Channels between the two convolutions, equally many in each group."""
    return int(out_channels * expansion) // groups * groups


@checked
@dataclass(frozen=True, kw_only=True)
class Shift:
    """Replace k x k convolutions by 1 x 1 convolutions around a shift, and depthwise ones by a shift.

    Args:
        kernel_size: k of the convolutions to replace, and of the shift. Default: all, each its own.
        dilation: Dilation of the convolutions to replace, and of the shift. Default: all, each its own.
        expansion: Channels between the two 1 x 1 convolutions, as a multiple of the output's.
        init: "weights" starts both 1 x 1 convolutions from the old kernel (the nearest product for each offset, norm and
            ReLU left aside); "random" initialises both at random.
        depthwise: Replace depthwise convolutions, too.

    Example:
        >>> Shift(expansion=3.0)
        Shift(kernel_size=None, dilation=None, expansion=3.0, init='weights', depthwise=True)

    Source: Wu et al., section 4.
    """

    partners: ClassVar[tuple[str, ...]] = ("weight-sharing", "soft-sharing(pointwise=True)")
    takes: ClassVar[str] = (
        "convolutions with a square kernel, zero padding of at most half of it, and the kernel_size and dilation of the config; "
        "depthwise ones with at least as many channels as the kernel has entries"
    )

    kernel_size: Annotated[int, Range(2, 1024)] | None = None
    dilation: Step | None = None
    expansion: Expansion = 1.0
    init: Literal["weights", "random"] = "weights"
    depthwise: bool = True

    def accepts(self, module: nn.Module) -> bool:
        conv = executed(module) if is_convolution(module) else None
        if conv is None or kind_of(conv) is not None or conv.padding_mode != "zeros":
            return False
        (side, other), (step, other_step) = conv.kernel_size, conv.dilation
        if side != other or side < 2 or self.kernel_size not in (None, side):
            return False
        if step != other_step or self.dilation not in (None, step):
            return False
        padding = padding_of(conv)
        if max(padding) > step * ((side - 1) // 2) or (conv.padding == "same" and side % 2 == 0):
            return False
        return not is_depthwise(conv) or (self.depthwise and (not is_one_shift(conv) or conv.in_channels >= side**2))

    def group(self, sites: Sequence[Site[nn.Conv2d]]) -> list[list[Site[nn.Conv2d]]]:
        groups = [[site] for site in sites if self._moves(site.module)]
        if sites and not groups:
            conv, offsets = sites[0].module, sites[0].module.kernel_size[0] ** 2
            raise IncompatibleModelError(
                f"expansion={self.expansion:g} gives no layer as many channels to move as its kernel has entries: {sites[0].name!r} "
                f"needs {offsets}. Use an expansion of at least {math.ceil(offsets / conv.out_channels * 1000) / 1000:g}"
            )
        return groups

    def _moves(self, conv: nn.Conv2d) -> bool:
        """Whether there are enough channels for all offsets; with fewer, all would stay."""
        return (
            is_one_shift(conv) or inner_channels(conv.out_channels, self.expansion, conv.groups) >= conv.kernel_size[0] ** 2
        )

    def choices(self, sites: Sequence[Site[nn.Conv2d]]) -> list[tuple[list[Site[nn.Conv2d]], list[Technique]]]:
        """Each layer, with expansions in quarters."""
        return [([site], self._expansions(site.module)) for site in sites]

    def _expansions(self, conv: nn.Conv2d) -> list[Technique]:
        if is_one_shift(conv):
            return [self]
        configs: list[Shift] = [replace(self, expansion=quarter / 4) for quarter in steps(1, 4 * conv.kernel_size[0] ** 2)]
        return [config for config in configs if config._moves(conv)]

    def build(self, group: Sequence[Site[nn.Conv2d]]) -> list[Replacement]:
        old = group[0].module
        conv = executed(old) or old
        if is_one_shift(conv):
            return [(old, DepthwiseShift2d(conv))]
        block = ShiftConv2d(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size[0],
            (conv.stride[0], conv.stride[1]),
            dilation=conv.dilation[0],
            padding=padding_of(conv),
            groups=conv.groups,
            expansion=self.expansion,
            bias=conv.bias is not None,
        ).to(conv.weight)
        with torch.no_grad():
            if self.init == "weights":
                start_from(block, conv)
            if conv.bias is not None and block.project.bias is not None:
                block.project.bias.copy_(conv.bias)
        block.adopt_widths(conv)
        return [(old, block)]


def is_one_shift(conv: Convolution) -> bool:
    """Whether a shift alone replaces it: one filter per channel."""
    return is_depthwise(conv) and conv.out_channels == conv.in_channels


def padding_of(conv: Convolution) -> tuple[int, int]:
    """Rows and columns of zeros at the start."""
    if isinstance(conv.padding, str):
        size = conv.dilation[0] * (conv.kernel_size[0] // 2) if conv.padding == "same" else 0
        return size, size
    return conv.padding[0], conv.padding[1]


@torch.no_grad()
def start_from(block: ShiftConv2d, conv: Convolution) -> None:
    """Start a block from a k x k kernel: for each offset, the channels of a group that move by it take the leading terms of the
    singular value decomposition of the kernel's (O, I) slice there. Exact except for norm and ReLU when there are enough."""
    if conv.weight.is_meta:  # being loaded: only shapes matter
        return
    k, reach, groups = block.shift.kernel_size, block.shift.kernel_size // 2, conv.groups
    inside, outs = block.shift.channels // groups, conv.out_channels // groups
    channels: dict[tuple[int, int, int], list[int]] = {}
    for channel, offset in enumerate(offsets(block.shift.channels, k)):
        channels.setdefault((channel // inside, *offset), []).append(channel)
    for (group, dh, dw), members in channels.items():
        rows = slice(group * outs, (group + 1) * outs)
        part = conv.weight[rows, :, reach + dh, reach + dw].double()
        left, values, right = torch.linalg.svd(part, full_matrices=False)
        terms = min(len(members), len(values))
        root = values[:terms].sqrt()
        used = torch.tensor(members[:terms], device=conv.weight.device)
        block.expand.weight[used] = (root[:, None] * right[:terms])[..., None, None].to(conv.weight)
        block.project.weight[rows, used - group * inside] = (left[:, :terms] * root)[..., None, None].to(conv.weight)


EXAMPLES = (  # 16 channels between the two convolutions, with a norm
    Example(config=Shift(expansion=2.0), params=4 * (8 * 16 + 2 * 16 + 16 * 8 + 8), macs=4 * 64 * (8 * 16 + 16 * 8)),
)
