"""Deeply shared filter bases: layers build their filters from a basis they share and a few filters of their own.

A convolution becomes a basis of r filters (shared and unique ones), a batch norm, and a 1 x 1 convolution with the
coefficients. A penalty keeps the basis orthogonal, so that gradients through the many uses of the shared part neither
vanish nor explode. Where 1 x 1 convolutions follow a convolution anyway, as in bottleneck blocks, its filters
are the basis, and the convolution is shared.

Source: Kang & Kim, Learning Deeply Shared Filter Bases for Parameter-Efficient Convolutional Neural Networks, NeurIPS
2021, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from thriftnet.arguments import Channels, Index, PositiveShare, Rank, Weight, check, checked
from thriftnet.core.composed import ComposedConv2d, ComposedLinear
from thriftnet.core.conv import (
    Convolution,
    GeneratedConv2d,
    PlainConv2d,
    SharedConv2d,
    geometry,
    is_convolution,
    is_depthwise,
    is_pointwise,
    plain_conv2d,
    signature,
)
from thriftnet.core.factorize import leading_directions
from thriftnet.core.kinds import Kind, executed
from thriftnet.core.linear import GeneratedLinear, PlainLinear, is_linear, plain_linear
from thriftnet.core.norm import PlainBatchNorm2d, scale_and_shift
from thriftnet.core.penalty import PenaltyTerm
from thriftnet.core.sites import Replacement, Site, group_by
from thriftnet.core.technique import Example, Technique, steps
from thriftnet.core.tied import Tied, plain_layer, set_to_mean
from thriftnet.core.width import WidthSpec
from thriftnet.errors import ConfigError
from thriftnet.kernels.orthogonality import penalty

Layer: TypeAlias = Convolution | nn.Linear

# Share of one layer's multiply-accumulates: between 0.83, where two layers were as fast, and 1.18, where they were not.
WORTH_TWO_LAYERS = 0.9


class SharedBasis(Tied):
    """The filters of one group of layers: those that all share, and those of each layer.

    State dict: ``shared`` (bases, S, I, kh, kw) and ``unique`` (L, U, I, kh, kw), each only if it has filters; of linear layers
    (bases, S, I) and (L, U, I).

    Args:
        shared: Filters used by several layers; layers alternate between the bases.
        unique: Filters of one layer each.
        lambda_r: Factor of the penalty in training.
        unique_penalty: Whether the penalty covers the unique filters.
        family: Of the penalty: see `FilterBasis`.
    """

    def __init__(self, shared: Tensor, unique: Tensor, lambda_r: float, unique_penalty: bool, family: str = "") -> None:
        super().__init__()
        self.shared = nn.Parameter(shared) if shared.numel() else None
        self.unique = nn.Parameter(unique) if unique.numel() else None
        self.lambda_r = lambda_r
        self.unique_penalty = unique_penalty
        self.family = family

    def filters(self, layer: int, base: int) -> Tensor:
        """The basis of one layer, its unique filters first (the authors' order): (U + S, I, kh, kw) or (U + S, I)."""
        parts = [] if self.unique is None else [self.unique[layer]]
        return torch.cat(parts if self.shared is None else [*parts, self.shared[base]])

    def penalty_term(self) -> PenaltyTerm:
        """How far the basis is from orthonormal: squared entries of ``B B^T - I``.

        Counted are shared filters against shared and unique ones, and each layer's unique filters among themselves;
        pairs of unique filters of different layers never meet in one layer. A group that shares nothing has none.

        Source: section 3.3, and the averages that the authors' training code takes.
        """
        if self.shared is None:
            return PenaltyTerm(torch.zeros(()), 0, self.lambda_r, self.family)
        shared = self.shared.flatten(2).flatten(0, 1)  # (bases * S, n)
        unique = self.unique.flatten(2) if self.unique is not None and self.unique_penalty else None  # (L, U, n)
        total, count = penalty(shared, unique), shared.shape[0] ** 2
        if unique is not None:
            count += shared.shape[0] * unique.shape[0] * unique.shape[1] + unique.shape[0] * unique.shape[1] ** 2
        return PenaltyTerm(total, count, self.lambda_r, self.family)


class SharedBasisConv2d(SharedConv2d):
    """A convolution shared by several layers: its filters are the basis, and the layers after it mix them.

    Args:
        like: The convolution to replace.
        lambda_r: Factor of the penalty in training.
        family: Of the penalty: see `FilterBasis`.
    """

    def __init__(self, like: Convolution, lambda_r: float, family: str = "") -> None:
        super().__init__(like)
        self.lambda_r, self.family = lambda_r, family

    def penalty_term(self) -> PenaltyTerm:
        """How far the filters are from orthonormal: squared entries of ``B B^T - I``."""
        filters = self.weight.flatten(1)
        return PenaltyTerm(penalty(filters, None), len(filters) ** 2, self.lambda_r, self.family)


class OfBasis(Kind):
    """A layer whose weight is a layer's basis."""

    bank: SharedBasis
    layer: int
    base: int

    def _adopt_bias(self, like: nn.Module) -> None:
        self.register_parameter("bias", None)  # it belongs to the coefficients

    def _use(self, bank: SharedBasis, layer: int, base: int) -> None:
        self.bank, self.layer, self.base = bank, layer, base

    @property
    def weight(self) -> Tensor:
        """The basis: the layer's unique filters, and the shared ones."""
        return self.bank.filters(self.layer, self.base)


class BasisFilters(OfBasis, GeneratedConv2d):
    """The convolution with a layer's basis: I channels in, one out per basis filter and group of channels."""

    def __init__(self, like: Convolution, bank: SharedBasis, layer: int, base: int) -> None:
        super().__init__(like)
        self._use(bank, layer, base)
        self.out_channels = self.weight.shape[0]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The basis, once for each group: (G * (U + S), I/G, kh, kw)."""
        basis = self.bank.filters(self.layer, self.base)
        return basis if self.groups == 1 else basis.repeat(self.groups, 1, 1, 1)


class BasisRows(OfBasis, GeneratedLinear):  # type: ignore[override]
    """The linear layer with a layer's basis: I features in, one out per row of the basis."""

    def __init__(self, like: nn.Linear, bank: SharedBasis, layer: int, base: int) -> None:
        super().__init__(like)
        self._use(bank, layer, base)
        self.out_features = self.weight.shape[0]


@checked
class BasisConv2d(ComposedConv2d):
    """Basis, batch norm and coefficients in place of one convolution; folds into one in eval mode.

    Shape: as the convolution it replaces.

    All groups of channels of a grouped convolution have the same basis, and coefficients of their own.

    State dict: ``filters.bank.*`` once per group of layers, ``norm.*`` (G * (U + S),), ``coefficients.weight`` (O, U + S, 1, 1) and
    ``coefficients.bias`` (O,).

    Args:
        like: The convolution to replace.
        bank: The filters of the layers that share.
        layer: Which of the bank's unique filters are its own.
        base: Which of the bank's shared bases it uses.
        coefficients: (O, U + S).
    """

    def __init__(self, like: Convolution, bank: SharedBasis, layer: Index, base: Index, coefficients: Tensor) -> None:
        super().__init__(like)
        self.filters = BasisFilters(like, bank, layer, base)
        inner = like.groups * coefficients.shape[1]
        self.norm = PlainBatchNorm2d(nn.BatchNorm2d(inner, device=coefficients.device, dtype=coefficients.dtype))
        bias = None if like.bias is None else like.bias.detach()
        self.coefficients = PlainConv2d(pointwise(coefficients, bias, like.groups))
        self.adopt_widths(like)

    @staticmethod
    def settle(layers: Sequence[BasisConv2d]) -> None:
        """Make their bases orthonormal."""
        orthonormalise(layers)

    @property
    def rank(self) -> int:
        """Filters of the basis, shared and unique."""
        return self.filters.out_channels // self.groups

    @property
    def weight(self) -> Tensor:
        """The weight of the one convolution that computes the same in eval mode."""
        scale, _ = scale_and_shift(self.norm)
        return product(self.coefficients.weight.flatten(1), scale, self.filters.weight, self.groups)

    @property
    def bias(self) -> Tensor:
        """The bias of that convolution: the norm between has a shift."""
        _, shift = scale_and_shift(self.norm)
        return offsets(self.coefficients.weight.flatten(1), shift, self.coefficients.bias, self.groups)

    def inner_channels(self, width_spec: WidthSpec) -> tuple[int, ...]:
        """The basis keeps its rank at every width."""
        channels = self.in_channels // self.groups
        return tuple(self.rank if self.groups == 1 else self.rank * ins // channels for ins in width_spec.ins)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The plain convolution with bias that computes the same in eval mode: the norm between is affine there."""
        filters, mix, scale, bias, groups = self._parts()
        return plain_conv2d(self.filters, product(mix, scale, filters, groups), bias, groups).train(self.training)

    def fold_for(self, prefer: str) -> nn.Module:
        """One plain convolution, or two where that is better: the basis, and coefficients that the norm is folded into.

        Two run fewer multiply-accumulates and store fewer parameters alike, as long as the rank is well below the number of
        output channels. "speed" asks for a tenth fewer, since two layers cost more than one of the same size.
        """
        entries, outs = self.filters.weight[0].numel(), self.out_channels
        share = (self.filters.out_channels * entries + outs * self.rank) / (outs * entries)
        limit = {"": 0.0, "speed": WORTH_TWO_LAYERS, "size": 1.0}[prefer]
        return self.fold() if share >= limit else self.decomposed()

    @torch.no_grad()
    def decomposed(self) -> nn.Sequential:
        """The same in eval mode as two plain convolutions: the concatenated basis, and 1 x 1 coefficients with bias."""
        filters, mix, scale, bias, groups = self._parts()
        second = pointwise((by_group(mix, groups) * scale.view(groups, 1, -1)).flatten(0, 1), bias, groups)
        return nn.Sequential(plain_conv2d(self.filters, filters, None, groups), second).train(self.training)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Filters (G * r, I/G, kh, kw), coefficients (O, r), the norm's scale (G * r,), the bias (O,), and groups."""
        filters, _, groups = self.filters.active()
        coefficients = self.coefficients.fold()  # another technique may have replaced them
        scale, shift = scale_and_shift(self.norm)
        mix = coefficients.weight.flatten(1)
        return filters, mix, scale, offsets(mix, shift, coefficients.bias, groups), groups


def product(mix: Tensor, scale: Tensor, filters: Tensor, groups: int) -> Tensor:
    """The weight (O, I/G, kh, kw) that coefficients (O, r), a scale (G * r,) and filters (G * r, I/G, kh, kw) make."""
    scaled = by_group(scale[:, None, None, None] * filters, groups)  # (G, r, I/G, kh, kw)
    return torch.einsum("gor,grihw->goihw", by_group(mix, groups), scaled).flatten(0, 1)


def offsets(mix: Tensor, shift: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """The bias (O,) that coefficients (O, r) make of a shift (G * r,) before them."""
    shifts = shift.view(groups, -1)  # (G, r)
    moved = torch.einsum("gor,gr->go", by_group(mix, groups), shifts).flatten()
    return moved if bias is None else moved + bias


def by_group(rows: Tensor, groups: int) -> Tensor:
    """(G * n, ...) as (G, n, ...)."""
    return torch.unflatten(rows, 0, (groups, -1))


@checked
class BasisLinear(ComposedLinear):
    """Basis and coefficients in place of one linear layer, without a norm between them.

    Shape: (..., I) -> (..., O).

    State dict: ``filters.bank.*`` once per group, ``coefficients.weight`` (O, U + S) and ``coefficients.bias`` (O,).

    Args: As of `BasisConv2d`.
    """

    def __init__(self, like: nn.Linear, bank: SharedBasis, layer: Index, base: Index, coefficients: Tensor) -> None:
        super().__init__(like)
        self.filters = BasisRows(like, bank, layer, base)
        bias = None if like.bias is None else like.bias.detach()
        self.coefficients = PlainLinear(plain_layer(nn.Linear, coefficients.shape[::-1], coefficients, bias))
        self.adopt_widths(like)

    @staticmethod
    def settle(layers: Sequence[BasisLinear]) -> None:
        """Make their bases orthonormal."""
        orthonormalise(layers)

    @property
    def rank(self) -> int:
        """Rows of the basis, shared and unique."""
        return self.filters.out_features

    @property
    def weight(self) -> Tensor:
        """The weight of the one layer that computes the same."""
        return self.coefficients.weight @ self.filters.weight

    def inner_channels(self, width_spec: WidthSpec) -> tuple[int, ...]:
        return (self.rank,) * len(width_spec.widths)

    @torch.no_grad()
    def fold(self) -> nn.Linear:
        """The plain layer that computes the same."""
        coefficients = self.coefficients.fold()  # another technique may have replaced them
        rows, _ = self.filters.active()
        return plain_linear(self.filters, coefficients.weight @ rows, coefficients.bias).train(self.training)


@torch.no_grad()
def orthonormalise(layers: Sequence[BasisConv2d | BasisLinear]) -> None:
    """Make the bases of layers that share a bank orthonormal; their coefficients follow, so that the function stays.

    Each shared basis first, then each layer's unique filters, which also become orthogonal to it.
    """
    bank = layers[0].filters.bank
    turned: dict[int, Tensor] = {}  # by base: (S, S), the old shared filters in terms of the new ones
    if bank.shared is not None:
        for base in {layer.filters.base for layer in layers}:
            directions, triangle = torch.linalg.qr(bank.shared[base].flatten(1).double().mT)
            bank.shared[base] = directions.mT.reshape(bank.shared[base].shape)
            turned[base] = triangle.mT
    for layer in layers:
        number, base = layer.filters.layer, layer.filters.base
        weight = layer.coefficients.weight
        scale = weight.new_ones(1, 1, layer.rank)
        if isinstance(layer, BasisConv2d):
            scale = scale_and_shift(layer.norm)[0].detach().view(layer.groups, 1, layer.rank)
        mix = (by_group(weight.flatten(1).double(), len(scale)) * scale).flatten(0, 1)
        count = 0 if bank.unique is None else bank.unique.shape[1]
        own, common = mix[:, :count], mix[:, count:]
        if base in turned:
            common = common @ turned[base]
        if bank.unique is not None:
            rest = bank.unique[number].flatten(1).double()
            if bank.shared is not None:
                shared = bank.shared[base].flatten(1).double()
                common, rest = common + own @ (rest @ shared.mT), rest - rest @ shared.mT @ shared
            directions, triangle = torch.linalg.qr(rest.mT)
            bank.unique[number] = directions.mT.reshape(bank.unique[number].shape)
            own = own @ triangle.mT
        weight.copy_((by_group(torch.cat([own, common], 1), len(scale)) / scale).view(weight.shape))


def pointwise(weight: Tensor, bias: Tensor | None, groups: int) -> nn.Conv2d:
    """A 1 x 1 convolution with these weights, (O, I/G)."""
    sizes = (groups * weight.shape[1], weight.shape[0], 1)
    return plain_layer(nn.Conv2d, sizes, weight[..., None, None], bias, groups=groups)


@checked
@dataclass(frozen=True, kw_only=True)
class FilterBasis:
    """Decompose layers over filter bases that those of equal input share.

    Layers with the same input channels and kernel form a group; their output channels and strides may differ.

    Args:
        shared_rank: Filters per shared basis, S: an integer, or a ratio of the full rank, which is that of the group's widest layer.
            0 shares nothing and only decomposes. With a ratio below 1, groups that would store more than before are left alone.
        unique_rank: Filters of each layer's own, U: likewise.
        bases: Shared bases per group: with 2, layers alternate between them ("double shared").
        rank_channels: Input channels that both ranks, as integers, are meant for: groups with more get ranks in proportion, as the
            authors' stages do. Default: all groups have the same ranks.
        lambda_r: Factor of the orthogonality penalty in training.
        unique_penalty: Whether the penalty covers unique filters (as the authors do on CIFAR-10, not elsewhere).
        init: "weights" starts from the nearest decomposition of the weights the layers have; "random" initialises as the
            paper does, with orthogonal shared bases.
        alone: Decompose layers that no other layer can share with over S + U filters of their own, where that saves parameters.
        pointwise: Take 1 x 1 convolutions, too.
        linear: Take linear layers, too; between their basis and coefficients there is no norm.
        whole: Share whole convolutions, as the paper does in bottleneck blocks: layers that agree in everything become one,
            whose filters are the basis. Ranks are not used then.
        family: Penalties are averaged over all bases of one family, and added over families.

    Example:
        >>> FilterBasis(shared_rank=8, bases=2)
        FilterBasis(shared_rank=8, unique_rank=1, bases=2, ...)

    Source: Kang & Kim, section 3.
    """

    takes: ClassVar[str] = (
        "convolutions with a weight of their own (no depthwise ones; 1 x 1 unless pointwise=False), and Linear unless linear=False"
    )

    shared_rank: Rank | PositiveShare = 0.25
    unique_rank: Rank | PositiveShare = 1
    bases: Literal[1, 2] = 1
    rank_channels: Channels | None = None
    lambda_r: Weight = 10.0
    unique_penalty: bool = True
    init: Literal["weights", "random"] = "weights"
    alone: bool = True
    pointwise: bool = True
    linear: bool = True
    whole: bool = False
    family: str = ""

    def __post_init__(self) -> None:
        if self.shared_rank + self.unique_rank == 0:
            raise ConfigError("shared_rank=0 and unique_rank=0 leave no filters: set at least one of them above 0")
        if self.whole:
            check("bases", self.bases, Literal[1])
        if self.rank_channels is not None and (isinstance(self.shared_rank, float) or isinstance(self.unique_rank, float)):
            raise ConfigError("rank_channels scales integers: give both ranks as integers, or leave it out")

    def accepts(self, module: nn.Module) -> bool:
        if is_linear(module):
            return self.linear and not self.whole and executed(module) is not None
        if not is_convolution(module) or is_depthwise(module) or (is_pointwise(module) and not self.pointwise):
            return False
        return module.groups == 1 if self.whole else executed(module) is not None

    def group(self, sites: Sequence[Site[Layer]]) -> list[list[Site[Layer]]]:
        if self.whole:
            return [group for group in group_by(sites, key=lambda site: signature(site.module)) if len(group) > 1]
        groups = group_by(sites, key=lambda site: (*geometry(site.module)[1:], site.module.weight.shape[1:]))
        return [group for group in groups if self._is_worthwhile([site.module for site in group])]

    def choices(self, sites: Sequence[Site[Layer]]) -> list[tuple[list[Site[Layer]], list[Technique]]]:
        """Layers of equal input, with shared ranks up to what their filters span."""
        found: list[tuple[list[Site[Layer]], list[Technique]]] = []
        for group in replace(self, shared_rank=1, unique_rank=0, rank_channels=None).group(sites):
            most = min(group[0].module.weight[0].numel(), sum(len(site.module.weight) for site in group))
            found.append((group, [replace(self, shared_rank=rank, rank_channels=None) for rank in steps(1, most)]))
        return found

    def _is_worthwhile(self, layers: Sequence[Layer]) -> bool:
        """Whether layers share, or at least become smaller where that is what the config asks for."""
        shares = len(layers) > 1 or self.shared_rank == 0
        if not shares and not self.alone:
            return False
        shared, unique = self.ranks(layers)
        if shared + unique == 0:
            return False
        ratio = self.shared_rank or self.unique_rank
        return isinstance(ratio, int) or ratio == 1 or stored(layers, shared, unique, self.bases) < dense(layers)

    def ranks(self, layers: Sequence[Layer]) -> tuple[int, int]:
        """Shared and unique rank of a group: as asked for, but no more than its filters span; of a layer that shares with no
        other, all are unique, and no more than make it smaller."""
        entries, outs = layers[0].weight[0].numel(), [len(layer.weight) for layer in layers]
        full = min(entries, max(outs))
        shared, unique = (self._rank(rank, full, layers[0]) for rank in (self.shared_rank, self.unique_rank))
        if len(layers) == 1 and shared:
            is_full = isinstance(self.shared_rank, float) and self.shared_rank == 1
            smaller = (
                full
                if is_full
                else (entries * outs[0] - 1) // (entries + outs[0] + 2 * int(getattr(layers[0], "groups", 1)))
            )
            return 0, min(shared + unique, smaller)
        shared = min(shared, entries, max(sum(outs[base :: self.bases]) for base in range(self.bases)))
        return shared, min(unique, entries - shared, max(outs))

    def _rank(self, rank: int | float, full: int, layer: Layer) -> int:
        if isinstance(rank, float):
            return max(1, int(full * rank))
        if self.rank_channels is None or isinstance(layer, nn.Linear):
            return rank
        return rank * layer.in_channels // self.rank_channels

    def build(self, group: Sequence[Site[Layer]]) -> list[Replacement]:
        if self.whole:  # one convolution for all: the nearest to the weights they have, or orthogonal
            convs = [site.module for site in group]
            common = SharedBasisConv2d(convs[0], self.lambda_r, self.family)  # type: ignore[arg-type]
            set_to_mean(common, convs)
            if self.init == "random":
                nn.init.orthogonal_(common.weight)
            return [(conv, common) for conv in convs]
        layers = [executed(site.module) for site in group]
        weights = [layer.weight.detach() for layer in layers if layer is not None]  # each (O, I, kh, kw) or (O, I)
        fit = fitted if self.init == "weights" else fresh
        ranks = self.ranks([site.module for site in group])
        bases = self.bases if ranks[0] else 1
        shared, unique, coefficients = fit(weights, *ranks, bases)
        shape = weights[0].shape[1:]
        shared, unique = shared.view(*shared.shape[:2], *shape), unique.view(*unique.shape[:2], *shape)
        bank = SharedBasis(shared, unique, self.lambda_r, self.unique_penalty, self.family)
        pairs: list[Replacement] = []
        for index, (site, layer) in enumerate(zip(group, layers, strict=True)):
            base, rows = index % bases, coefficients[index]
            if isinstance(layer, nn.Linear):
                gain = (1 + nn.BatchNorm2d(1).eps) ** 0.5  # for a norm that it does not have
                pairs.append((site.module, BasisLinear(layer, bank, index, base, rows / gain)))
            elif layer is not None:
                pairs.append((site.module, BasisConv2d(layer, bank, index, base, rows)))
        return pairs


def stored(layers: Sequence[Layer], shared: int, unique: int, bases: int) -> int:
    """Weights of a group with these ranks: filters, norms and coefficients."""
    entries = layers[0].weight[0].numel()
    filters = (bases * shared + len(layers) * unique) * entries
    norms = [0 if isinstance(layer, nn.Linear) else 2 * layer.groups for layer in layers]
    return filters + (shared + unique) * sum(len(layer.weight) + norm for layer, norm in zip(layers, norms, strict=True))


def dense(layers: Sequence[Layer]) -> int:
    """Weights of the layers as they are."""
    return sum(layer.weight.numel() for layer in layers)


def fitted(weights: Sequence[Tensor], shared: int, unique: int, bases: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The orthonormal bases that come nearest to trained filters, step by step: shared part first, then the rest.

    Of each layer's filters (O, ...) with n entries; layer i belongs to basis ``i % bases``.

    Returns:
        Shared (bases, S, n), unique (L, U, n), and each layer's coefficients (O, U + S). They reproduce eval mode: the
        norm between starts with mean 0 and variance 1, and its small epsilon is taken out of the coefficients.
    """
    weights = [weight.flatten(1) for weight in weights]
    if weights[0].is_meta:  # being loaded: only shapes matter
        empty, size = weights[0].new_empty, weights[0].shape[1]
        rows = [empty(len(weight), unique + shared) for weight in weights]
        return empty(bases, shared, size), empty(len(weights), unique, size), rows
    common = [leading_directions(torch.cat([*weights[base::bases]]), shared) for base in range(bases)]
    own, coefficients = [], []
    norm_gain = (1 + nn.BatchNorm2d(1).eps) ** 0.5
    for layer, weight in enumerate(weights):
        basis = common[layer % bases]
        rest = weight - weight @ basis.T @ basis
        own.append(leading_directions(rest, unique))
        coefficients.append(weight @ torch.linalg.pinv(torch.cat([own[-1], basis]).double()).to(weight) * norm_gain)
    return torch.stack(common), torch.stack(own), coefficients


def fresh(weights: Sequence[Tensor], shared: int, unique: int, bases: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The authors' initialisation, as `fitted`: shared bases orthogonal together, everything else Kaiming by its outputs."""
    like, size = weights[0], weights[0][0].numel()
    common = torch.empty(bases * shared, size)
    own = torch.empty(len(weights), unique, *like.shape[1:])
    if shared:
        nn.init.orthogonal_(common)
    for filters in own if unique else ():
        nn.init.kaiming_normal_(filters, mode="fan_out")
    coefficients = [nn.init.kaiming_normal_(torch.empty(len(w), shared + unique), mode="fan_out").to(like) for w in weights]
    return common.view(bases, shared, size).to(like), own.flatten(2).to(like), coefficients


EXAMPLES = (  # per layer: r unique and shared filters of 8 x 9 entries, a norm, 8 x r coefficients and a bias
    Example(
        config=FilterBasis(shared_rank=16),
        params=(16 + 4) * 72 + 4 * (2 * 17 + 8 * 17 + 8),
        macs=4 * 64 * (72 * 17 + 17 * 8),
    ),
    Example(
        config=FilterBasis(shared_rank=4, bases=2),
        params=(2 * 4 + 4) * 72 + 4 * (2 * 5 + 8 * 5 + 8),
        macs=4 * 64 * (72 * 5 + 5 * 8),
    ),
    Example(config=FilterBasis(whole=True), params=8 * 8 * 9 + 8),
)


def full_capacity(layers: int, entries: int) -> list[FilterBasis]:
    return [
        FilterBasis(shared_rank=entries, unique_rank=0),
        FilterBasis(shared_rank=1.0, unique_rank=1.0),
        FilterBasis(shared_rank=entries, unique_rank=0, bases=2),
        FilterBasis(shared_rank=entries // 2, unique_rank=entries // 2),
    ]
