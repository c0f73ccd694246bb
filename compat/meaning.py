"""Where a technique has nothing to do: kept apart from refusals, which are for networks that it should work on.

The rules are strict: they look at the plain network only, and one layer that the technique is for is enough.
"""

from __future__ import annotations

from collections import Counter

from torch import nn

from thriftnet.core.sites import ends


def without_meaning(technique: str, model: nn.Module) -> str | None:
    """Why a technique has nothing to do in a network; None where it should work."""
    stem, classifier = ends(model)
    body = [module for module in model.modules() if module not in (stem, classifier)]
    weighted = [m for m in body if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear)]
    if technique == "slimmable":
        return None if weighted else "it has no layers between the first and the last"
    if technique == "shift":
        spatial = [m for m in weighted if isinstance(m, nn.Conv2d) and max(m.kernel_size) > 1]
        overlapping = [m for m in spatial if m.kernel_size > m.stride]
        if not spatial:
            return "no convolution but the first reads more than one pixel"
        return None if overlapping else "its convolutions only cut the image into patches"
    if not weighted:
        return "it has no convolutions or linear layers between the first and the last"
    if technique in ("weight-sharing", "soft-sharing") and max(Counter(_shape(m) for m in weighted).values()) == 1:
        return "no two of its layers are of one shape"
    return None


def _shape(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear) -> tuple[object, ...]:
    return type(layer).__name__[:4], tuple(layer.weight.shape)
