"""A batch norm after an activation, and the shortcut around both: without gradients, the sum is taken in place.

Such a norm cannot be folded into the convolution before it, since the activation is between them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from thriftnet.kernels.dispatch import KernelChoice, forced


def normalised_sum(norm: nn.Module, active: Tensor, shortcut: Tensor) -> Tensor:
    """``shortcut + norm(active)``.

    Args:
        norm: A norm that returns a new tensor.
        active: Output of the activation, (N, C, H, W).
        shortcut: Of the same shape.
    """
    normalised: Tensor = norm(active)
    if choose(norm, active).implementation == "in place" and normalised.dtype == shortcut.dtype:
        return normalised.add_(shortcut)
    return shortcut + normalised


def choose(norm: nn.Module, active: Tensor) -> KernelChoice:
    """Whether the sum is taken in place. Writing norm and sum as one affine map was slower: torch has a kernel for norms."""
    if norm._forward_hooks or not isinstance(norm, nn.BatchNorm2d):
        return KernelChoice("act-norm", "separate", "something else may read the output of the norm")
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return KernelChoice("act-norm", "separate", "with gradients, or in a graph that is fused anyway")
    return forced("act-norm") or KernelChoice(
        "act-norm", "in place", "without gradients nothing else reads the output of the norm"
    )
