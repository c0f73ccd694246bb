"""Modules that hold a network and train, average or compile it: not a part of it."""

from __future__ import annotations

import torch
from torch import nn

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)


def inner_name(model: nn.Module) -> str | None:
    """The attribute under which a wrapper has its network; None if this is no wrapper."""
    if isinstance(model, WRAPPERS):
        return "module"
    return "_orig_mod" if isinstance(model._modules.get("_orig_mod"), nn.Module) else None  # torch.compile


def unwrapped(model: nn.Module) -> nn.Module:
    """The network inside what compiles, averages or distributes it."""
    while (name := inner_name(model)) is not None:
        model = model.get_submodule(name)
    return model
