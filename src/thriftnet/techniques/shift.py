"""Shift: move the channels, then mix them. A spatial convolution without its multiplications.

A k x k convolution becomes a 1 x 1 convolution, a shift of every channel by one of k x k offsets (no parameters, no
operations), and another 1 x 1 convolution.

Source: Wu et al., Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions, CVPR 2018, sections 3 and 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from thriftnet.arguments import Channels, Expansion, KernelSide, Range, Step, Steps, checked
from thriftnet.core.composed import ComposedConv2d
from thriftnet.core.conv import Convolution, PlainConv2d, is_convolution
from thriftnet.core.norm import PlainBatchNorm2d
from thriftnet.core.sites import Replacement, Site
from thriftnet.core.technique import Example, Technique, steps
from thriftnet.core.tied import Tied, plain_layer
from thriftnet.core.width import WidthAware
from thriftnet.errors import ConfigError
from thriftnet.kernels.dispatch import KernelChoice, forced
from thriftnet.kernels.shift import choose, moved_channels, offsets, one_hot, shift
from thriftnet.kernels.triton_pointwise import shift_pointwise


@checked
class Shift2d(Tied, WidthAware):
    """Shift every channel by one of k x k offsets; those left over after the last full set of k^2 stay.

    At a narrower width the first channels remain, each with its offset.

    Shape: (N, C, H, W) -> the same.

    Args:
        channels: C.
        kernel_size: k; offsets run from -(k // 2).
        dilation: Pixels per step.

    Source: section 3; channel order as in the authors' kernel.
    """

    kernel: Tensor

    def __init__(self, channels: Channels, kernel_size: KernelSide = 3, dilation: Step = 1) -> None:
        super().__init__()
        self.channels, self.kernel_size, self.dilation = channels, kernel_size, dilation
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
        if x.ndim != 4 or x.shape[1] != channels:
            raise ConfigError(f"Shift2d moves {channels} channels of (N, {channels}, H, W), got {tuple(x.shape)}")
        return shift(x, self.kernel[:channels], self.kernel_size, self.dilation, self.moved)

    def kernel_choice(self, x: Tensor) -> KernelChoice:
        """Which implementation runs on this input."""
        return choose(x)

    def moved_bytes(self, output: Tensor) -> int:
        """Bytes read and written for this output."""
        return 2 * output.numel() * output.element_size()

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The same as a depthwise convolution with a fixed one-hot kernel."""
        channels = self.active_outs(self.channels)
        options = {"padding": self.dilation * (self.kernel_size // 2), "dilation": self.dilation, "groups": channels}
        sizes = (channels, channels, self.kernel.shape[2:])
        conv = plain_layer(nn.Conv2d, sizes, self.kernel[:channels], None, **options)
        return conv.requires_grad_(False).train(self.training)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, dilation={self.dilation}"


@checked
class ShiftConv2d(ComposedConv2d):
    """1 x 1 convolution, batch norm, ReLU, shift, 1 x 1 convolution in place of one k x k convolution.

    Shape: (N, I, H, W) -> (N, O, ceil(H / stride), ceil(W / stride)).

    Args:
        in_channels: I.
        out_channels: O.
        kernel_size: k of the shift.
        stride: Step of the last convolution.
        dilation: Pixels per step of the shift.
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
        expansion: Expansion = 1.0,
        bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, (kernel_size, kernel_size))
        middle = int(out_channels * expansion)
        if middle < 1:
            raise ConfigError(
                f"expansion={expansion} of {out_channels} channels leaves none: use at least {1 / out_channels:g}"
            )
        self.expand = PlainConv2d(nn.Conv2d(in_channels, middle, 1, bias=False))
        self.norm = PlainBatchNorm2d(nn.BatchNorm2d(middle))
        self.act = nn.ReLU()
        self.shift = Shift2d(middle, kernel_size, dilation)
        self.project = PlainConv2d(nn.Conv2d(middle, out_channels, 1, stride, bias=bias))

    def forward(self, x: Tensor) -> Tensor:
        choice = forced("shift")
        if choice is not None and choice.implementation == "fused":
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


@checked
@dataclass(frozen=True, kw_only=True)
class Shift:
    """Replace k x k convolutions by 1 x 1 convolutions around a shift.

    Args:
        kernel_size: k of the convolutions to replace, and of the shift.
        dilation: Dilation of the convolutions to replace, and of the shift.
        expansion: Channels between the two 1 x 1 convolutions, as a multiple of the output's.
        init: "weights" starts both 1 x 1 convolutions from the old kernel (the nearest product for each offset, norm and
            ReLU left aside); "random" initialises both at random.

    Example:
        >>> Shift(expansion=3.0)
        Shift(kernel_size=3, dilation=1, expansion=3.0, init='weights')

    Source: Wu et al., section 4.
    """

    partners: ClassVar[tuple[str, ...]] = ("weight-sharing", "soft-sharing(pointwise=True)")
    takes: ClassVar[str] = (
        "convolutions with groups=1, zero padding that keeps the size, and the kernel_size and dilation of the config"
    )

    kernel_size: Annotated[int, Range(2, 1024)] = 3
    dilation: Step = 1
    expansion: Expansion = 1.0
    init: Literal["weights", "random"] = "weights"

    def accepts(self, module: nn.Module) -> bool:
        return (
            is_convolution(module)
            and module.groups == 1
            and module.padding_mode == "zeros"
            and module.kernel_size == (self.kernel_size,) * 2
            and module.dilation == (self.dilation,) * 2
            and module.padding in ("same", (self.dilation * (self.kernel_size // 2),) * 2)
            and self.kernel_size % 2 == 1
        )

    def group(self, sites: Sequence[Site[nn.Conv2d]]) -> list[list[Site[nn.Conv2d]]]:
        return [[site] for site in sites]

    def choices(self, sites: Sequence[Site[nn.Conv2d]]) -> list[tuple[list[Site[nn.Conv2d]], list[Technique]]]:
        """Each layer, with expansions in quarters."""
        quarters = steps(1, 4 * self.kernel_size**2)
        return [([site], [replace(self, expansion=quarter / 4) for quarter in quarters]) for site in sites]

    def build(self, group: Sequence[Site[nn.Conv2d]]) -> list[Replacement]:
        conv = group[0].module
        block = ShiftConv2d(
            conv.in_channels,
            conv.out_channels,
            self.kernel_size,
            (conv.stride[0], conv.stride[1]),
            dilation=self.dilation,
            expansion=self.expansion,
            bias=conv.bias is not None,
        ).to(conv.weight)
        with torch.no_grad():
            if self.init == "weights":
                start_from(block, conv)
            if conv.bias is not None and block.project.bias is not None:
                block.project.bias.copy_(conv.bias)
        block.adopt_widths(conv)
        return [(conv, block)]


@torch.no_grad()
def start_from(block: ShiftConv2d, conv: Convolution) -> None:
    """Start a block from a k x k kernel: for each offset, the channels that move by it take the leading terms of the
    singular value decomposition of the kernel's (O, I) slice there. Exact except for norm and ReLU when there are enough."""
    if conv.weight.is_meta:  # being loaded: only shapes matter
        return
    k, reach = block.shift.kernel_size, block.shift.kernel_size // 2
    channels: dict[tuple[int, int], list[int]] = {}
    for channel, offset in enumerate(offsets(block.shift.channels, k)):
        channels.setdefault(offset, []).append(channel)
    for (dh, dw), members in channels.items():
        left, values, right = torch.linalg.svd(conv.weight[:, :, reach + dh, reach + dw].double(), full_matrices=False)
        terms = min(len(members), len(values))
        root = values[:terms].sqrt()
        used = torch.tensor(members[:terms], device=conv.weight.device)
        block.expand.weight[used] = (root[:, None] * right[:terms])[..., None, None].to(conv.weight)
        block.project.weight[:, used] = (left[:, :terms] * root)[..., None, None].to(conv.weight)


EXAMPLES = (  # 16 channels between the two convolutions, with a norm
    Example(config=Shift(expansion=2.0), params=4 * (8 * 16 + 2 * 16 + 16 * 8 + 8), macs=4 * 64 * (8 * 16 + 16 * 8)),
)
