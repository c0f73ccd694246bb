"""Fused weights: the mean of the members of a group, computed once per step for all layers that use it.

Nothing is kept that could grow stale: a fused weight is used again as long as somebody holds it (as the graph of a
training step does), the parameters are unchanged and no gradient has flown back.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor

from thriftnet.kernels.dispatch import KernelChoice, forced
from thriftnet.kernels.versions import Version, check_unchanged, is_plain, version


class Fuser:
    """Fuses the members of one group. It belongs to one layer, and no copy or file has it."""

    def __init__(self) -> None:
        self._latest: weakref.ref[Tensor] | None = None
        self._seen: list[Version] = []

    def weight(self, members: Tensor, scales: Tensor | None) -> Tensor:
        """The fused weight."""
        if choose(members, scales).implementation == "each":
            return fuse(members, scales)
        sources = [members] if scales is None else [members, scales]
        weight = None if self._latest is None else self._latest()
        if weight is not None and all(seen.holds(source) for seen, source in zip(self._seen, sources, strict=True)):
            return weight
        made: Tensor = FuseFunction.apply(self, members, scales)
        self._latest, self._seen = weakref.ref(made), [version(source) for source in sources]
        return made

    def forget(self) -> None:
        """Compute it again next time."""
        self._latest = None


def choose(members: Tensor, scales: Tensor | None) -> KernelChoice:
    """Whether the weight is computed once for all its users, or for each use."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return KernelChoice("fusion", "each", "a compiled or exported graph finds equal parts by itself")
    if not is_plain(members) or not (scales is None or is_plain(scales)):
        return KernelChoice("fusion", "each", "the members are not plain parameters")
    choice = forced("fusion")
    if choice is not None:
        return choice
    if not torch.is_grad_enabled():
        return KernelChoice("fusion", "each", "without gradients; eval_fold or fold spares all of it")
    return KernelChoice("fusion", "once", f"the graph holds one weight for all uses of {len(members)} members")


def fuse(members: Tensor, scales: Tensor | None) -> Tensor:
    """``mean_j(scale_j * member_j)`` of members (R, O, ...) and scales (R, 1) or (R, O)."""
    if scales is None:
        return members.mean(0)
    return (scales[..., None] * members.flatten(2)).mean(0).view(members.shape[1:])


class FuseFunction(torch.autograd.Function):
    """`fuse`, keeping the parameters themselves and no copies, so that gradients can flow through it more than once."""

    @staticmethod
    def forward(ctx: Any, owner: Fuser, members: Tensor, scales: Tensor | None) -> Tensor:
        ctx.owner, ctx.members, ctx.scales = weakref.ref(owner), members, scales
        ctx.versions = [version(source) for source in (members, scales) if source is not None]
        return fuse(members, scales)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor | None, Tensor | None]:
        owner = ctx.owner()
        if owner is not None:
            owner.forget()
        check_unchanged(ctx.versions)
        members, scales, share = ctx.members, ctx.scales, grads[0] / len(ctx.members)
        if scales is None:
            return None, share.expand_as(members), None
        wide = scales.view(*scales.shape, *(1,) * (members.ndim - 2))
        for_scales = (share * members).sum_to_size(wide.shape).view(scales.shape) if ctx.needs_input_grad[2] else None
        return None, share * wide if ctx.needs_input_grad[1] else None, for_scales
