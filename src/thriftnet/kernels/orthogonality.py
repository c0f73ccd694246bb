"""How far a filter basis is from orthonormal: only the blocks of the Gram matrix that count, with their own gradient.

The gradient of ``|B B^T - I|^2`` is ``4 (B B^T - I) B``, so the matrices of the forward are all that the backward needs.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor


def deviation(rows: Tensor) -> Tensor:
    """``B B^T - I`` of (..., r, n) rows, (..., r, r)."""
    gram = rows @ rows.mT
    if torch.is_grad_enabled():
        return gram - torch.eye(rows.shape[-2], device=rows.device, dtype=rows.dtype)
    gram.diagonal(dim1=-2, dim2=-1).sub_(1)
    return gram


def penalty(shared: Tensor, unique: Tensor | None) -> Tensor:
    """Squared entries of ``B B^T - I``, summed: shared filters against shared and unique ones, and each layer's unique
    filters among themselves.

    Args:
        shared: (S, n).
        unique: (L, U, n), or None.
    """
    total: Tensor = BlockPenalty.apply(shared, unique)
    return total


class BlockPenalty(torch.autograd.Function):
    """`penalty`."""

    @staticmethod
    def forward(ctx: Any, shared: Tensor, unique: Tensor | None) -> Tensor:
        blocks = _blocks(shared, unique)
        ctx.save_for_backward(shared, unique, *blocks)
        return functools.reduce(torch.add, map(_energy, blocks))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        shared, unique, *blocks = ctx.saved_tensors
        if torch.is_grad_enabled():  # of a gradient that is differentiated in turn
            blocks = _blocks(shared, unique)
        gram = blocks[0] * (4 * grads[0])
        if unique is None:
            return gram @ shared, None
        flat, cross = unique.flatten(0, 1), blocks[1] * (2 * grads[0])
        own = blocks[2] * (4 * grads[0])
        for_unique = (cross.T @ shared).view(unique.shape) + own @ unique
        return torch.addmm(gram @ shared, cross, flat), for_unique


def _blocks(shared: Tensor, unique: Tensor | None) -> list[Tensor]:
    """Shared against shared, shared against unique, and each layer's unique against themselves, less the identity."""
    if unique is None:
        return [deviation(shared)]
    return [deviation(shared), shared @ unique.flatten(0, 1).T, deviation(unique)]


def _energy(block: Tensor) -> Tensor:
    """Sum of squares."""
    flat = block.flatten()
    return flat.dot(flat)
