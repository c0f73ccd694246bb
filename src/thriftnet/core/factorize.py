"""Low-rank factors of matrices, by the smaller of the two Gram matrices."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LARGE, ITERATIONS = 1024, 4


def leading_directions(rows: Tensor, rank: int) -> Tensor:
    """Orthonormal directions (..., rank, n) that carry most of the energy of ``rows`` (..., m, n)."""
    matrix = rows.double()
    if matrix.shape[-2] < matrix.shape[-1]:
        vectors = _leading_eigenvectors(matrix @ matrix.mT, rank)  # (..., m, at most m)
        spanned = F.pad(matrix.mT @ vectors, (0, rank - vectors.shape[-1]))  # zeros: any directions orthogonal to the others
        directions = torch.linalg.qr(spanned).Q
    else:
        directions = _leading_eigenvectors(matrix.mT @ matrix, rank)
    found: Tensor = directions.mT.to(rows).contiguous()
    return found


def factorize(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The nearest product of two factors (..., p, rank) and (..., rank, q) to matrices (..., p, q), of equal energy.

    ``rank`` is at most ``min(p, q)``, where the product is the matrix.
    """
    if matrix.is_meta:  # being loaded: only shapes matter
        return matrix.new_empty(*matrix.shape[:-1], rank), matrix.new_empty(*matrix.shape[:-2], rank, matrix.shape[-1])
    if matrix.shape[-2] < matrix.shape[-1]:
        right, left = factorize(matrix.mT, rank)
        return left.mT, right.mT
    exact = matrix.double()
    right = _leading_eigenvectors(exact.mT @ exact, rank)  # (..., q, rank), orthonormal
    left = exact @ right
    root = left.norm(dim=-2, keepdim=True).sqrt()
    root = torch.where(root > 0, root, 1.0)  # a direction without energy keeps one factor, so that it can still learn
    return (left / root).to(matrix), (right * root).mT.to(matrix)


def _leading_eigenvectors(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, as columns, largest first.

    A few of a large matrix are found by subspace iteration, several times faster: of nearly equal eigenvalues, which trade
    little energy, some may be taken for others.
    """
    size = gram.shape[-1]
    if gram.ndim > 2 or size < LARGE or 4 * rank > size:
        exact: Tensor = torch.linalg.eigh(gram).eigenvectors.flip(-1)[..., :rank]
        return exact
    start = torch.randn(size, rank + rank // 4 + 16, generator=torch.Generator().manual_seed(0), dtype=gram.dtype)
    space = start.to(gram.device)
    for _ in range(ITERATIONS):
        space = torch.linalg.qr(gram @ (gram @ space)).Q
    inside = torch.linalg.eigh(space.mT @ gram @ space).eigenvectors.flip(-1)[:, :rank]
    found: Tensor = torch.linalg.qr(space @ inside).Q
    return found
