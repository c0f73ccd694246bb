"""Low rank: one layer becomes two thin ones, whose product comes nearest to its weight.

A k x k convolution becomes a k x 1 convolution to r channels and a 1 x k convolution ("spatial"), or a k x k convolution to r
channels and a 1 x 1 convolution ("channel"). Linear layers and 1 x 1 convolutions become two of their kind. No layer shares with another:
this is the baseline that sharing has to beat, and fewer parameters mean fewer multiply-accumulates in the same proportion.

Source: Jaderberg et al., Speeding up Convolutional Neural Networks with Low Rank Expansions, BMVC 2014, section 2.1, scheme 2; Tai et
al., Convolutional Neural Networks with Low-Rank Regularization, ICLR 2016, section 3 (the closed form of the spatial one); Zhang et al.,
Accelerating Very Deep Convolutional Networks for Classification and Detection, TPAMI 2016, section 3.1 (the one by channels).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, cast

import torch
from torch import Tensor, nn

from thriftnet.arguments import Channels, PositiveShare, Range, checked
from thriftnet.core.composed import Composed, ComposedConv2d, ComposedLinear
from thriftnet.core.conv import Convolution, PlainConv2d, is_convolution, is_pointwise, plain_conv2d
from thriftnet.core.factorize import factorize
from thriftnet.core.kinds import executed, kind_of
from thriftnet.core.linear import PlainLinear, is_linear
from thriftnet.core.sites import Replacement, Site
from thriftnet.core.technique import Example, Technique, steps
from thriftnet.core.tied import plain_layer
from thriftnet.core.width import WidthSpec

Layer: TypeAlias = Convolution | nn.Linear

# Share of one layer's multiply-accumulates from which two layers are no faster than one.
WORTH_TWO_LAYERS = 0.9


class LowRankPair(Composed):
    """Two layers whose product is the weight of one: to a few channels, and from there to the outputs."""

    reduce: PlainConv2d | PlainLinear
    expand: PlainConv2d | PlainLinear

    @property
    def rank(self) -> int:
        """Channels between the two, per group."""
        return self.inner // int(getattr(self.reduce, "groups", 1))

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """The product: the weight of the one layer that computes the same."""

    def inner_channels(self, width_spec: WidthSpec) -> tuple[int, ...]:
        """Every group keeps its rank at every width."""
        groups = int(getattr(self.reduce, "groups", 1))
        full = int(getattr(self.reduce, "in_channels", 1))
        return tuple(self.inner if groups == 1 else self.inner * ins // full for ins in width_spec.ins)

    def fold(self) -> nn.Module:
        """The plain layer that computes the same; both layers where another technique left a bias that one cannot have."""
        return self.fold_for("")

    @torch.no_grad()
    def fold_for(self, prefer: str) -> nn.Module:
        """One plain layer, or two where that is better: "speed" asks for a tenth fewer multiply-accumulates, since two layers
        cost more than one of the same size."""
        reduce, expand = (layer.fold() for layer in (self.reduce, self.expand))
        one = self._merged(reduce, expand)
        if one is None or self._share() < {"": 0.0, "speed": WORTH_TWO_LAYERS, "size": 1.0}[prefer]:
            return nn.Sequential(reduce, expand).train(self.training)
        return one.train(self.training)

    def _share(self) -> float:
        """Weights of both layers, as a share of those of one."""
        return (self.reduce.weight.numel() + self.expand.weight.numel()) / self.weight.numel()

    @abstractmethod
    def _merged(self, reduce: nn.Module, expand: nn.Module) -> nn.Module | None:
        """The one layer that computes what the folded two do; None if there is none."""


@checked
class LowRankConv2d(LowRankPair, ComposedConv2d):
    """A convolution to a few channels, and one from there to the outputs.

    Shape: as the convolution it replaces.

    State dict: ``reduce.weight`` (G * r, I/G, kh, 1) and ``expand.weight`` (O, r, 1, kw), or by channels (G * r, I/G, kh, kw) and
    (O, r, 1, 1); ``expand.bias`` (O,).

    Args:
        like: The convolution to replace.
        rank: Channels between the two, per group.
        spatial: Whether the first has the height of the kernel and the second its width; otherwise the first has both.
    """

    def __init__(self, like: Convolution, rank: Channels, spatial: bool) -> None:
        super().__init__(like)
        left, right = factorize(as_matrix(like.weight.detach(), like.groups, spatial), rank)  # (G, p, r), (G, r, q)
        kh, kw = like.kernel_size
        first, second = ((kh, 1), (1, kw)) if spatial else ((kh, kw), (1, 1))
        ins, outs = like.in_channels // like.groups, like.out_channels // like.groups
        down = right.reshape(like.groups * rank, ins, *first)
        up = left.reshape(like.groups, outs, -1, rank).mT.reshape(like.out_channels, rank, *second)
        sizes = ("stride", "dilation", *([] if isinstance(like.padding, str) else ["padding"]))
        split = {name: getattr(like, name) for name in sizes}
        neutral = {"stride": 1, "padding": 0, "dilation": 1}
        before: dict[str, Any] = {name: (value[0], neutral[name]) if spatial else value for name, value in split.items()}
        after: dict[str, Any] = {
            name: (neutral[name], value[1]) if spatial else neutral[name] for name, value in split.items()
        }
        if not spatial:
            after |= {"padding": 0, "padding_mode": "zeros"}
        bias = None if like.bias is None else like.bias.detach()
        self.reduce = PlainConv2d(plain_conv2d(like, down, None, like.groups, **before))
        plain = like if spatial else nn.Conv2d(1, 1, 1, device="meta")  # padding by its own rule is done by the first
        self.expand = PlainConv2d(plain_conv2d(plain, up, bias, like.groups, **after))
        self.adopt_widths(like)

    @property
    def weight(self) -> Tensor:
        return product(self.reduce.weight, self.expand.weight, self.groups)

    def _merged(self, reduce: nn.Module, expand: nn.Module) -> nn.Conv2d | None:
        if not (isinstance(reduce, nn.Conv2d) and isinstance(expand, nn.Conv2d)):
            return None
        weight, bias = product(reduce.weight, expand.weight, reduce.groups), expand.bias
        if reduce.bias is not None:
            if not is_pointwise(expand):
                return None  # the second layer pads what the bias was added to
            groups, rank = reduce.groups, expand.weight.shape[1]
            up, offset = expand.weight.reshape(groups, -1, rank), reduce.bias.reshape(groups, rank)
            between = torch.einsum("gor,gr->go", up, offset)
            bias = between.flatten() + (0 if bias is None else bias)
        geometry = {name: getattr(self, name) for name in ("stride", "padding", "dilation")}
        return plain_conv2d(reduce, weight, bias, reduce.groups, **geometry)


@checked
class LowRankLinear(LowRankPair, ComposedLinear):
    """Two linear layers in place of one.

    Shape: (..., I) -> (..., O).

    State dict: ``reduce.weight`` (r, I), ``expand.weight`` (O, r), ``expand.bias`` (O,).

    Args:
        like: The layer to replace.
        rank: Features between the two.
    """

    def __init__(self, like: nn.Linear, rank: Channels) -> None:
        super().__init__(like)
        left, right = factorize(like.weight.detach(), rank)
        bias = None if like.bias is None else like.bias.detach()
        self.reduce = PlainLinear(plain_layer(nn.Linear, right.shape[::-1], right, None))
        self.expand = PlainLinear(plain_layer(nn.Linear, left.shape[::-1], left, bias))
        self.adopt_widths(like)

    @property
    def weight(self) -> Tensor:
        return self.expand.weight @ self.reduce.weight

    def _merged(self, reduce: nn.Module, expand: nn.Module) -> nn.Linear | None:
        if not (isinstance(reduce, nn.Linear) and isinstance(expand, nn.Linear)):
            return None
        weight, bias = expand.weight @ reduce.weight, cast("Tensor | None", expand.bias)
        if reduce.bias is not None:
            bias = expand.weight @ reduce.bias + (0 if bias is None else bias)
        return plain_layer(nn.Linear, weight.shape[::-1], weight, bias)


def product(reduce: Tensor, expand: Tensor, groups: int) -> Tensor:
    """The weight of one convolution that computes what two do: (G * r, I/G, kh, y) and (O, r, 1, x), of which x or y is 1."""
    down = reduce.unflatten(0, (groups, -1))  # type: ignore[no-untyped-call]  # (G, r, I/G, kh, y)
    up = expand[:, :, 0].unflatten(0, (groups, -1))  # type: ignore[no-untyped-call]  # (G, O/G, r, x)
    return torch.einsum("gorx,grihy->goihxy", up, down).flatten(4).flatten(0, 1)


def as_matrix(weight: Tensor, groups: int, spatial: bool) -> Tensor:
    """The matrix of each group whose factors are the two layers, from (O, I/G, kh, kw).

    Returns:
        (G, O/G * kw, I/G * kh), or by channels (G, O/G, I/G * kh * kw).
    """
    rows = weight.reshape(groups, -1, *weight.shape[1:])  # (G, O/G, I/G, kh, kw)
    return rows.permute(0, 1, 4, 2, 3).flatten(3).flatten(1, 2) if spatial else rows.flatten(2)


@checked
@dataclass(frozen=True, kw_only=True)
class LowRank:
    """Replace each layer by two thin ones.

    Args:
        rank: Channels between the two: an integer, or a ratio of the full rank. The full rank, 1.0, computes the same and is
            larger; other ranks are lowered where the two layers would store as much as the one. Layers that even rank 1 does not make
            smaller are left alone.
        form: "spatial" splits a kh x kw kernel into kh x 1 and 1 x kw; "channel" keeps it in the first layer, and mixes channels
            in the second. Linear layers, kernels with a side of 1, and convolutions that pad by a rule of their own are
            always split by channels.

    Example:
        >>> LowRank(rank=16)
        LowRank(rank=16, form='spatial')

    Source: Jaderberg et al., section 2.1; Zhang et al., section 3.1.
    """

    takes: ClassVar[str] = "convolutions and Linear layers with a weight of their own, if two thinner ones store less"
    partners: ClassVar[tuple[str, ...]] = ("weight-sharing",)

    rank: Annotated[int, Range(1, 100_000)] | PositiveShare = 0.25
    form: Literal["spatial", "channel"] = "spatial"

    def accepts(self, module: nn.Module) -> bool:
        layer = effective(module)
        return layer is not None and self.rank_of(layer) > 0

    def group(self, sites: Sequence[Site[Layer]]) -> list[list[Site[Layer]]]:
        return [[site] for site in sites]

    def choices(self, sites: Sequence[Site[Layer]]) -> list[tuple[list[Site[Layer]], list[Technique]]]:
        """Each layer, with ranks up to the largest that makes it smaller."""
        found: list[tuple[list[Site[Layer]], list[Technique]]] = []
        for site in sites:
            layer = effective(site.module)
            most = 0 if layer is None else replace(self, rank=100_000).rank_of(layer)
            found.append(([site], [replace(self, rank=rank) for rank in steps(1, most)]))
        return found

    def build(self, group: Sequence[Site[Layer]]) -> list[Replacement]:
        old = group[0].module
        layer = effective(old)
        if layer is None:
            return []
        rank = self.rank_of(layer)
        new = (
            LowRankLinear(layer, rank)
            if isinstance(layer, nn.Linear)
            else LowRankConv2d(layer, rank, self.is_spatial(layer))
        )
        return [(old, new)]

    def is_spatial(self, conv: Convolution) -> bool:
        """Whether the kernel itself is split."""
        return self.form == "spatial" and min(conv.kernel_size) > 1 and kind_of(conv) is None

    def rank_of(self, layer: Layer) -> int:
        """The rank that a layer gets; 0 for one that is left alone."""
        if isinstance(layer, nn.Linear):
            rows, columns = layer.out_features, layer.in_features
        else:
            rows, columns = as_matrix(layer.weight.detach(), layer.groups, self.is_spatial(layer)).shape[1:]
        full = min(rows, columns)
        if self.rank == 1.0 and isinstance(self.rank, float):
            return full
        smaller = (rows * columns - 1) // (rows + columns)  # the largest rank that stores less
        return min(smaller, self.rank if isinstance(self.rank, int) else max(1, int(full * self.rank)))


def effective(module: nn.Module) -> Layer | None:
    """A layer of the same function whose weight is the one that runs, or None for what has no such weight."""
    if is_linear(module):
        return executed(module)
    return executed(module) if is_convolution(module) else None


EXAMPLES = (  # 8 -> 8 channels: 3 x 1 and 1 x 3 by way of 4 channels; 3 x 3 and 1 x 1 by way of 6; with bias
    Example(config=LowRank(rank=4), params=4 * (4 * 8 * 3 + 8 * 4 * 3 + 8), macs=4 * 64 * (4 * 8 * 3 + 8 * 4 * 3)),
    Example(config=LowRank(rank=0.75, form="channel"), params=4 * (6 * 72 + 8 * 6 + 8), macs=4 * 64 * (6 * 72 + 8 * 6)),
)


def full_capacity(layers: int, entries: int) -> list[LowRank]:
    return [LowRank(rank=1.0), LowRank(rank=1.0, form="channel")]
