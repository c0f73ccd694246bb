"""What the layers compute, written from the papers with loops, independent of the library."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from torch import Tensor


def shift(x: Tensor, kernel_size: int = 3, dilation: int = 1) -> Tensor:
    """Shift, CVPR 2018: pixel by pixel. Channel c moves by (c // k mod k, c mod k) steps off the centre."""
    _, channels, height, width = x.shape
    k = kernel_size
    whole_sets = channels // (k * k)
    out = torch.zeros_like(x)
    for c in range(channels):
        dh = dw = 0
        if c < whole_sets * k * k:
            dh, dw = ((c // k) % k - k // 2) * dilation, (c % k - k // 2) * dilation
        for h, w in itertools.product(range(height), range(width)):
            if 0 <= h + dh < height and 0 <= w + dw < width:
                out[:, c, h, w] = x[:, c, h + dh, w + dw]
    return out


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """A convolution by its definition: one sum per output pixel and filter."""
    batch, channels, height, width = x.shape
    outs, per_group, kh, kw = weight.shape
    padded = x.new_zeros(batch, channels, height + 2 * padding, width + 2 * padding)
    padded[:, :, padding : padding + height, padding : padding + width] = x
    rows = (height + 2 * padding - dilation * (kh - 1) - 1) // stride + 1
    columns = (width + 2 * padding - dilation * (kw - 1) - 1) // stride + 1
    out = x.new_zeros(batch, outs, rows, columns)
    for o, h, w in itertools.product(range(outs), range(rows), range(columns)):
        first = o // (outs // groups) * per_group
        top, left = h * stride, w * stride
        window = padded[
            :, first : first + per_group, top : top + dilation * kh : dilation, left : left + dilation * kw : dilation
        ]
        out[:, o, h, w] = (window * weight[o]).sum((1, 2, 3)) + (0 if bias is None else bias[o])
    return out


def batch_norm(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """A batch norm in eval mode, channel by channel."""
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        out[:, c] = (x[:, c] - mean[c]) / (var[c] + eps) ** 0.5 * weight[c] + bias[c]
    return out


def mix_templates(coefficients: Tensor, templates: Tensor) -> Tensor:
    """Soft sharing, equation 1: ``W = sum_j alpha_j T_j``."""
    weight = torch.zeros_like(templates[0])
    for alpha, template in zip(coefficients, templates, strict=True):
        weight = weight + alpha * template
    return weight


def fused_weight(members: Tensor, scales: Tensor) -> Tensor:
    """SPIN, weight fusion: the mean over the members of scale times weight, a scale per member and output channel.

    Args:
        members: (R, O, I, kh, kw).
        scales: (R, O).
    """
    rate, outs = scales.shape
    fused = torch.zeros_like(members[0])
    for o in range(outs):
        for j in range(rate):
            fused[o] += scales[j, o] * members[j, o]
    return fused / rate


def average_similarity(stages: list[tuple[list[Tensor], list[Tensor]]]) -> float:
    """Net_RL2's penalty: squared entries of ``B B^T - I``, entry by entry, averaged over all stages together.

    Args:
        stages: For each stage its shared bases and the unique filters of its layers, each (filters, I, kh, kw).

    Counted are the rows of the shared filters, against shared and unique ones, and the block of each layer's unique
    filters among themselves.
    """
    total, count = 0.0, 0
    for shared, unique in stages:
        rows = [("shared", row.flatten().numpy()) for basis in shared for row in basis]
        for layer, filters in enumerate(unique):
            rows += [(f"layer {layer}", row.flatten().numpy()) for row in filters]
        for (i, (owner, one)), (j, (other_owner, other)) in itertools.product(enumerate(rows), repeat=2):
            if owner == "shared" or owner == other_owner:
                total += (float(np.dot(one, other)) - (i == j)) ** 2
                count += 1
    return total / count


def shared_index(depth: int, rate: int, mapping: str) -> list[int]:
    """SPIN, figure 3: neighbours share, or every (depth / rate)-th layer does."""
    if mapping == "sequential":
        return [layer // rate for layer in range(depth)]
    return [layer % (depth // rate) for layer in range(depth)]


def running_average(batches: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and unbiased variance per channel of each batch (N, C, H, W), averaged over the batches by their images."""
    means, variances = [], []
    for batch in batches:
        per_channel = batch.transpose(1, 0, 2, 3).reshape(batch.shape[1], -1)
        means.append(per_channel.mean(1))
        variances.append(per_channel.var(1, ddof=1))
    images = [len(batch) for batch in batches]
    return np.average(means, 0, images), np.average(variances, 0, images)
