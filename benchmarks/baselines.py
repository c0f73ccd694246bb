"""What one writes without this library, and what the original systems do: the variants that speed is measured against.

None is slower than it has to be, and each is tested to compute what the library does.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.sites import replace, sites
from thriftnet.kernels.shift import offsets, one_hot
from thriftnet.techniques.filter_basis import BasisConv2d, SharedBasis
from thriftnet.techniques.shift import Shift2d
from thriftnet.techniques.soft_sharing import SConv2d


def shift_per_channel(x: Tensor, kernel_size: int = 3) -> Tensor:
    """One slice assignment per channel, differentiated by autograd."""
    height, width = x.shape[-2:]
    out = torch.zeros_like(x)
    for channel, (dh, dw) in enumerate(offsets(x.shape[1], kernel_size)):
        top, bottom = max(0, -dh), min(height, height - dh)
        left, right = max(0, -dw), min(width, width - dw)
        out[:, channel, top:bottom, left:right] = x[:, channel, top + dh : bottom + dh, left + dw : right + dw]
    return out


def shift_one_hot(channels: int, kernel_size: int = 3) -> Callable[[Tensor], Tensor]:
    """A depthwise convolution with a one-hot kernel, differentiated by autograd."""
    kernel = one_hot(channels, kernel_size)
    return lambda x: F.conv2d(x, kernel.to(x.dtype), padding=kernel_size // 2, groups=channels)


class NaiveShift2d(nn.Module):
    """A shift layer by one slice assignment per channel."""

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size

    def forward(self, x: Tensor) -> Tensor:
        return shift_per_channel(x, self.kernel_size)


def with_naive_shifts(model: nn.Module) -> nn.Module:
    """The network, changed in place, with a slice assignment per channel in place of every shift."""
    found = sites(model, lambda _, module: isinstance(module, Shift2d))
    return replace(model, {id(site.module): NaiveShift2d(site.module.kernel_size) for site in found})  # type: ignore[arg-type]


class OriginalSConv2d(nn.Module):
    """A soft-shared layer as the authors write it: templates times coefficients, summed."""

    def __init__(self, layer: SConv2d) -> None:
        super().__init__()
        self.bank, self.stride, self.padding = layer.bank, layer.stride, layer.padding
        self.coefficients = nn.Parameter(layer.coefficients.detach().view(-1, 1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.bank.templates * self.coefficients).sum(0)
        return F.conv2d(x, weight, None, self.stride, self.padding)


def with_original_mixing(model: nn.Module) -> nn.Module:
    """The network, changed in place, with the authors' layers in place of ours; they share our banks."""
    found = sites(model, lambda _, module: isinstance(module, SConv2d))
    return replace(model, {id(site.module): OriginalSConv2d(site.module) for site in found})  # type: ignore[arg-type]


class OriginalBasisConv2d(nn.Module):
    """A decomposed layer as the authors write it: two convolutions, concatenated, norm, coefficients."""

    def __init__(self, layer: BasisConv2d) -> None:
        super().__init__()
        self.bank, self.layer, self.base = layer.filters.bank, layer.filters.layer, layer.filters.base
        self.stride, self.padding = layer.filters.stride, layer.filters.padding
        self.norm, self.coefficients = layer.norm, layer.coefficients

    def forward(self, x: Tensor) -> Tensor:
        parts = [] if self.bank.unique is None else [self.bank.unique[self.layer]]
        parts += [] if self.bank.shared is None else [self.bank.shared[self.base]]
        found = torch.cat([F.conv2d(x, part, None, self.stride, self.padding) for part in parts], 1)
        mixed: Tensor = self.coefficients(self.norm(found))
        return mixed


def with_original_bases(model: nn.Module) -> nn.Module:
    """The network, changed in place, with the authors' layers in place of ours; they share our filters."""
    found = sites(model, lambda _, module: isinstance(module, BasisConv2d))
    return replace(model, {id(site.module): OriginalBasisConv2d(site.module) for site in found})  # type: ignore[arg-type]


def penalty_of_full_gram(bank: SharedBasis, wanted: Tensor) -> Tensor:
    """The orthogonality penalty of a bank by the Gram matrix of all its filters, of which it then picks the blocks.

    Args:
        bank: The filters.
        wanted: What `wanted_entries` gives for them.

    Returns:
        The sum that `SharedBasis.penalty_term` calls its total.
    """
    if bank.shared is None:
        return torch.zeros(())
    shared = bank.shared.flatten(3).flatten(0, 1).flatten(1)
    rows = [shared] if bank.unique is None else [shared, bank.unique.flatten(2).flatten(0, 1)]
    matrix = torch.cat(rows)
    gram = (matrix @ matrix.T - torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)).square()
    return (gram * wanted).sum()


def wanted_entries(bank: SharedBasis) -> Tensor:
    """1 where the penalty counts an entry of the full Gram matrix, else 0."""
    shared = 0 if bank.shared is None else bank.shared.shape[0] * bank.shared.shape[1]
    own = 0 if bank.unique is None else bank.unique.shape[0] * bank.unique.shape[1]
    mask = torch.zeros(shared + own, shared + own)
    mask[:shared, :shared] = 1
    if bank.unique is not None and bank.unique_penalty:
        layers, rank = bank.unique.shape[:2]
        mask[:shared, shared:] = 1
        for layer in range(layers):
            place = slice(shared + layer * rank, shared + (layer + 1) * rank)
            mask[place, place] = 1
    return mask
