"""A batch norm after an activation, and the shortcut around both, in eval mode: one multiplication and two sums per value.

Such a norm cannot be folded into the convolution before it, since the activation stands between them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thriftnet.core.norm import scale_and_shift
from thriftnet.kernels.dispatch import Choice, forced


def normalised_sum(norm: nn.Module, active: Tensor, shortcut: Tensor) -> Tensor:
    """``shortcut + norm(active)``.

    Args:
        norm: A batch norm, or what stands for one.
        active: (N, C, H, W), what comes out of the activation.
        shortcut: Of the same shape.
    """
    if choose(norm, active).form == "separate" or not isinstance(norm, nn.BatchNorm2d):
        out: Tensor = shortcut + norm(active)
        return out
    scale, shift = (values.to(active.dtype)[:, None, None] for values in scale_and_shift(norm))
    return torch.addcmul(shift, active, scale).add_(shortcut)


def choose(norm: nn.Module, active: Tensor) -> Choice:
    """Whether the norm runs as one affine map."""
    if not isinstance(norm, nn.BatchNorm2d) or norm.training or norm.running_mean is None:
        return Choice("act-norm", "separate", "the norm is no batch norm with fixed statistics")
    if norm._forward_hooks or norm._forward_pre_hooks:
        return Choice("act-norm", "separate", "the norm has hooks")
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return Choice("act-norm", "separate", "with gradients, or in a graph that is fused anyway")
    return forced("act-norm") or Choice("act-norm", "affine", "fixed statistics, no gradients")
