"""Fresh batch-norm statistics from data, for every width of a network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thriftnet.core.norm import STATISTICS, PlainBatchNorm2d
from thriftnet.core.width import set_width, width
from thriftnet.core.width import widths as widths_of
from thriftnet.errors import DataError, IncompatibleModelError


@torch.no_grad()
def recalibrate(
    model: nn.Module, loader: Iterable[Any], widths: Sequence[float | int | str] | float | int | str | None = None
) -> None:
    """Set the running statistics of every batch norm to the exact average over the batches of ``loader``.

    Weights, modes, the selected width and the random state are left as they were; only statistics change. If the
    loader fails, the old statistics are put back.

    Args:
        model: Any network with batch norms.
        loader: Yields ``inputs`` or ``(inputs, ...)``; gone through once.
        widths: Which widths of a slimmable network, or one of them; left out, all.

    Raises:
        IncompatibleModelError: No batch norm keeps statistics.
        DataError: The loader yields no batch, or something else than tensors.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    if not norms:
        raise IncompatibleModelError(f"{type(model).__name__} has no batch norm with running statistics to recalibrate")
    if isinstance(widths, float | int | str):
        widths = (widths,)
    chosen: Sequence[float | int | str | None] = widths if widths is not None else (widths_of(model) or (None,))
    like = next(p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point())
    with _only_norms_train(model, norms), _restored_on_failure(norms):
        for each in chosen:
            _choose(model, each)
            for norm in norms:
                mean, var, count = (value for value in _statistics(norm).values() if value is not None)
                mean.zero_(), var.fill_(1), count.zero_()
        seen = 0
        for batch in loader:
            seen += 1
            images = batch[0] if isinstance(batch, list | tuple) else batch
            if not isinstance(images, Tensor):
                raise DataError(f"recalibrate needs a loader of tensors or (tensor, ...), got {type(images).__name__}")
            for each in chosen:
                _choose(model, each)
                model(images.to(like))
        if not seen:
            raise DataError("recalibrate got a loader without batches: the statistics are unchanged. Give it training data")


def _choose(model: nn.Module, each: float | int | str | None) -> None:
    if each is not None:
        set_width(model, each)


def _statistics(norm: nn.modules.batchnorm._BatchNorm) -> dict[str, Tensor | None]:
    return norm.statistics() if isinstance(norm, PlainBatchNorm2d) else {name: getattr(norm, name) for name in STATISTICS}


@contextmanager
def _only_norms_train(model: nn.Module, norms: Sequence[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Norms in training mode with cumulative averaging, everything else in eval mode; all restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    now = width(model)
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = None  # a plain average over all batches
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in momenta:
            norm.momentum = momentum
        if widths_of(model):
            set_width(model, now)


@contextmanager
def _restored_on_failure(norms: Sequence[nn.Module]) -> Iterator[None]:
    saved = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        yield
    except BaseException:
        for buffer, value in saved:
            buffer.copy_(value)
        raise
