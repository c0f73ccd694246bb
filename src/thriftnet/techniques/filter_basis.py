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
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.arguments import Channels, Index, Rank, Weight, check, checked
from thriftnet.core.composed import ComposedConv2d
from thriftnet.core.conv import (
    Convolution,
    GeneratedConv2d,
    PlainConv2d,
    SharedConv2d,
    is_convolution,
    is_pointwise,
    plain_conv2d,
    signature,
)
from thriftnet.core.norm import PlainBatchNorm2d, scale_and_shift
from thriftnet.core.penalty import PenaltyTerm
from thriftnet.core.sites import Replacement, Site, group_by
from thriftnet.core.technique import Example, Technique, steps
from thriftnet.core.tied import Tied, plain_layer, set_to_mean
from thriftnet.core.width import WidthSpec
from thriftnet.errors import ConfigError, IncompatibleModelError
from thriftnet.kernels.orthogonality import penalty

# Share of one layer's multiply-accumulates: between 0.83, where two layers were as fast, and 1.18, where they were not.
WORTH_TWO_LAYERS = 0.9


class SharedBasis(Tied):
    """The filters of one group of layers: those that all share, and those of each layer.

    State dict: ``shared`` (bases, S, I, kh, kw) and ``unique`` (L, U, I, kh, kw), each only if it has filters.

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
        """The basis of one layer, its unique filters first (the authors' order): (U + S, I, kh, kw)."""
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
        shared = self.shared.flatten(3).flatten(0, 1).flatten(1)  # (bases * S, n)
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


class BasisFilters(GeneratedConv2d):
    """The convolution with a layer's basis: I channels in, one out per basis filter."""

    def __init__(self, like: Convolution, bank: SharedBasis, layer: int, base: int) -> None:
        super().__init__(like)
        self.bank, self.layer, self.base = bank, layer, base
        self.out_channels = self.weight.shape[0]

    def _adopt_bias(self, like: Convolution) -> None:
        self.register_parameter("bias", None)  # it belongs to the coefficients

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return self.bank.filters(self.layer, self.base)


@checked
class BasisConv2d(ComposedConv2d):
    """Basis, batch norm and coefficients in place of one convolution; folds into one in eval mode.

    Shape: as the convolution it replaces.

    State dict: ``filters.bank.*`` once per group, ``norm.*`` (U + S,), ``coefficients.weight`` (O, U + S, 1, 1) and
    ``coefficients.bias`` (O,).

    Args:
        like: The convolution to replace.
        bank: The group's filters.
        layer: Which of the bank's unique filters are its own.
        base: Which of the bank's shared bases it uses.
        coefficients: (O, U + S).
    """

    def __init__(self, like: Convolution, bank: SharedBasis, layer: Index, base: Index, coefficients: Tensor) -> None:
        super().__init__(like.in_channels, like.out_channels, like.kernel_size)
        self.filters = BasisFilters(like, bank, layer, base)
        rank = coefficients.shape[1]
        self.norm = PlainBatchNorm2d(nn.BatchNorm2d(rank, device=coefficients.device, dtype=coefficients.dtype))
        self.coefficients = PlainConv2d(pointwise(coefficients, None if like.bias is None else like.bias.detach()))
        self.adopt_widths(like)

    def inner_channels(self, width_spec: WidthSpec) -> tuple[int, ...]:
        return (self.filters.out_channels,) * len(width_spec.widths)  # the basis keeps its rank at every width

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """The plain convolution with bias that computes the same in eval mode: the norm between is affine there."""
        filters, mix, bias, _ = self._parts()
        return plain_conv2d(self.filters, torch.einsum("or,rihw->oihw", mix, filters), bias, 1).train(self.training)

    def fold_for(self, prefer: str) -> nn.Module:
        """One plain convolution, or two where that is better: the basis, and coefficients that the norm is folded into.

        Two run fewer multiply-accumulates and store fewer parameters alike, as long as the rank is well below the number of
        output channels. "speed" asks for a tenth fewer, since two layers cost more than one of the same size.
        """
        entries, outs = self.filters.weight[0].numel(), self.out_channels
        share = self.filters.out_channels * (entries + outs) / (outs * entries)
        limit = {"": 0.0, "speed": WORTH_TWO_LAYERS, "size": 1.0}[prefer]
        return self.fold() if share >= limit else self.decomposed()

    @torch.no_grad()
    def decomposed(self) -> nn.Sequential:
        """The same in eval mode as two plain convolutions: the concatenated basis, and 1 x 1 coefficients with bias."""
        filters, mix, bias, groups = self._parts()
        return nn.Sequential(plain_conv2d(self.filters, filters, None, groups), pointwise(mix, bias)).train(self.training)

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, int]:
        """Filters (r, I, kh, kw), coefficients (O, r) and bias (O,) with the norm folded in, and groups."""
        filters, _, groups = self.filters.active()
        coefficients = self.coefficients.fold()  # another technique may have replaced them
        scale, shift = scale_and_shift(self.norm)
        mix = coefficients.weight.flatten(1)
        return filters, mix * scale, mix @ shift + (0 if coefficients.bias is None else coefficients.bias), groups


def pointwise(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A 1 x 1 convolution with these weights, (O, I)."""
    return plain_layer(nn.Conv2d, (weight.shape[1], weight.shape[0], 1), weight[..., None, None], bias)


@checked
@dataclass(frozen=True, kw_only=True)
class FilterBasis:
    """Decompose convolutions over filter bases that layers of equal input share.

    Layers with the same input channels and kernel form a group; their output channels and strides may differ.

    Args:
        shared_rank: Filters per shared basis, S; 0 shares nothing and only decomposes.
        unique_rank: Filters of each layer's own, U.
        bases: Shared bases per group: with 2, layers alternate between them ("double shared").
        rank_channels: Input channels that both ranks are meant for: groups with more get ranks in proportion, as the
            authors' stages do. Default: all groups have the same ranks.
        lambda_r: Factor of the orthogonality penalty in training.
        unique_penalty: Whether the penalty covers unique filters (as the authors do on CIFAR-10, not elsewhere).
        init: "weights" starts from the nearest decomposition of the weights the layers have; "random" initialises as the
            paper does, with orthogonal shared bases.
        pointwise: Take 1 x 1 convolutions, too.
        whole: Share whole convolutions, as the paper does in bottleneck blocks: layers that agree in everything become one,
            whose filters are the basis. Ranks are not used then.
        family: Penalties are averaged over all bases of one family, and added over families.

    Example:
        >>> FilterBasis(shared_rank=8, bases=2)
        FilterBasis(shared_rank=8, unique_rank=1, bases=2, ...)

    Source: Kang & Kim, section 3.
    """

    takes: ClassVar[str] = "k x k convolutions with groups=1 and a weight of their own (1 x 1 only with pointwise=True)"

    shared_rank: Rank = 16
    unique_rank: Rank = 1
    bases: Literal[1, 2] = 1
    rank_channels: Channels | None = None
    lambda_r: Weight = 10.0
    unique_penalty: bool = True
    init: Literal["weights", "random"] = "weights"
    pointwise: bool = False
    whole: bool = False
    family: str = ""

    def __post_init__(self) -> None:
        if self.shared_rank + self.unique_rank == 0:
            raise ConfigError("shared_rank=0 and unique_rank=0 leave no filters: set at least one of them above 0")
        if self.whole:
            check("bases", self.bases, Literal[1])

    def accepts(self, module: nn.Module) -> bool:
        return is_convolution(module) and module.groups == 1 and (self.pointwise or not is_pointwise(module))

    def group(self, sites: Sequence[Site[nn.Conv2d]]) -> list[list[Site[nn.Conv2d]]]:
        if self.whole:
            return [group for group in group_by(sites, key=lambda site: signature(site.module)) if len(group) > 1]
        groups = group_by(
            sites, key=lambda site: (site.module.in_channels, site.module.kernel_size, site.module.weight.dtype)
        )
        needed = 1 if self.shared_rank == 0 else 2
        groups = [group for group in groups if len(group) >= needed]
        for group in groups:
            shared, unique = self.ranks(group[0].module.in_channels)
            rank = shared + unique
            entries = group[0].module.weight[0].numel()
            if rank > entries:
                raise IncompatibleModelError(
                    f"shared_rank + unique_rank = {rank} is larger than layer {group[0].name!r} allows: its filters have "
                    f"{entries} entries. Lower shared_rank by at least {rank - entries}, or leave the layer out with select"
                )
        return groups

    def choices(self, sites: Sequence[Site[nn.Conv2d]]) -> list[tuple[list[Site[nn.Conv2d]], list[Technique]]]:
        """Layers of equal input, with shared ranks up to the number of entries of a filter."""
        found: list[tuple[list[Site[nn.Conv2d]], list[Technique]]] = []
        for group in replace(self, shared_rank=1, unique_rank=0, rank_channels=None).group(sites):
            most = min(group[0].module.weight[0].numel(), sum(len(site.module.weight) for site in group)) - self.unique_rank
            found.append((group, [replace(self, shared_rank=rank, rank_channels=None) for rank in steps(1, most)]))
        return found

    def ranks(self, in_channels: int) -> tuple[int, int]:
        """Shared and unique rank of a group with this many input channels."""
        if self.rank_channels is None:
            return self.shared_rank, self.unique_rank
        return self.shared_rank * in_channels // self.rank_channels, self.unique_rank * in_channels // self.rank_channels

    def build(self, group: Sequence[Site[nn.Conv2d]]) -> list[Replacement]:
        convs = [site.module for site in group]
        if self.whole:  # one convolution for all: the nearest to the weights they have, or orthogonal
            common = SharedBasisConv2d(convs[0], self.lambda_r, self.family)
            set_to_mean(common, convs)
            if self.init == "random":
                nn.init.orthogonal_(common.weight)
            return [(conv, common) for conv in convs]
        weights = [conv.weight.detach() for conv in convs]  # each (O, I, kh, kw)
        fit = fitted if self.init == "weights" else fresh
        shared, unique, coefficients = fit(weights, *self.ranks(convs[0].in_channels), self.bases)
        shape = weights[0].shape[1:]
        shared, unique = shared.view(*shared.shape[:2], *shape), unique.view(*unique.shape[:2], *shape)
        bank = SharedBasis(shared, unique, self.lambda_r, self.unique_penalty, self.family)
        return [
            (conv, BasisConv2d(conv, bank, layer, layer % self.bases, coefficients[layer]))
            for layer, conv in enumerate(convs)
        ]


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


def leading_directions(rows: Tensor, rank: int) -> Tensor:
    """Orthonormal directions (rank, n) that carry most of the energy of ``rows`` (m, n), by the smaller Gram matrix."""
    matrix = rows.double()
    if matrix.shape[0] < matrix.shape[1]:
        vectors = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)[:, :rank]  # (m, at most m)
        spanned = F.pad(matrix.T @ vectors, (0, rank - vectors.shape[1]))  # zeros: any directions orthogonal to the others
        directions = torch.linalg.qr(spanned).Q
    else:
        directions = torch.linalg.eigh(matrix.T @ matrix).eigenvectors.flip(1)[:, :rank]
    found: Tensor = directions.T.to(rows).contiguous()
    return found


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
        FilterBasis(shared_rank=entries, unique_rank=0, bases=2),
        FilterBasis(shared_rank=entries // 2, unique_rank=entries // 2),
    ]
