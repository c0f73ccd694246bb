"""Folded for as long as a block lasts: what computes weights in every forward computes them once for all of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from thriftnet.core.verbs import HISTORY, fold, history


@contextmanager
def eval_fold(model: nn.Module, *, prefer: str = "") -> Iterator[nn.Module]:
    """The network in eval mode with folded layers within the block; afterwards as it was, training mode and all.

    The block gets the network to run. Where no layer is converted it is just in eval mode. What is changed in the
    parameters within the block does not reach the folded layers, and hooks of converted layers do not run.

    Args:
        model: Any network. Its own layers are swapped, so that it must not be trained by another thread meanwhile.
        prefer: As in `fold`.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).train()
        >>> with eval_fold(model) as folded:
        ...     folded.training
        False
        >>> model.training
        True
    """
    layers = [(module, dict(module._modules), module.training) for module in model.modules()]
    past = history(model)
    try:
        model.eval()
        yield fold(model, inplace=True, prefer=prefer)
    finally:
        for module, children, training in layers:
            module._modules.update(children)
            module.training = training
        if past:
            setattr(model, HISTORY, past)
        elif hasattr(model, HISTORY):
            delattr(model, HISTORY)
