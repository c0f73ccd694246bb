"""Batch-norm statistics estimated again from data, for every width of a network."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from thriftnet.arguments import Count, Index, PositiveShare, checked
from thriftnet.core.batches import images_of
from thriftnet.core.history import history
from thriftnet.core.norm import STATISTICS, PlainBatchNorm2d
from thriftnet.core.processes import failing_together
from thriftnet.core.width import Width, eval_mode, require_widths, select_width, width_index
from thriftnet.core.width import widths as widths_of
from thriftnet.errors import ConfigError, DataError, IncompatibleModelError


@checked
@torch.no_grad()
def recalibrate(
    model: nn.Module,
    loader: Iterable[Any],
    widths: Sequence[Width] | Width | None = None,
    *,
    indices: Sequence[Index] | Index | None = None,
    momentum: PositiveShare | None = None,
    batches: Count | None = None,
) -> None:
    """Set the running statistics of every batch norm to the exact average over the batches of ``loader``.

    It is the cumulative average of `torch.nn.BatchNorm2d`, except that every image counts equally, also in a smaller last batch.
    Only statistics change; weights, modes, the selected width and the random state do not. If the loader fails, the old statistics
    are restored. Under `torch.distributed` statistics are averaged over all processes, each of which reads its own loader.

    Args:
        model: Any network with batch norms.
        loader: Yields ``inputs`` or ``(inputs, ...)``; read once.
        widths: Widths of a slimmable network as `set_width` takes them, or one of them. Default: all.
        indices: Instead of, or in addition to, widths: indices into its list of sub-networks, or one of them.
        momentum: Take a moving average with this momentum instead. The authors of DS-Net use 0.1.
        batches: Read at most this many. Default: all.

    Raises:
        ConfigError: A ``momentum`` outside (0, 1], less than one batch, an empty list of widths, or widths it does not have.
        IncompatibleModelError: No batch norm has running statistics.
        DataError: The loader yields no images, no tensors, or images that make statistics infinite or NaN.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    if not norms:
        folded = any("freeze" in step.values() for step in history(model))
        hint = ": they were folded into convolutions. Recalibrate the network that it was taken from" if folded else ""
        raise IncompatibleModelError(
            f"{type(model).__name__} has no batch norm with running statistics to recalibrate{hint}"
        )
    chosen = _selected(model, widths, indices)
    like = next(p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point())
    with _only_norms_train(model, norms, momentum), _restored_on_failure(norms):
        for each in chosen:
            select_width(model, each)
            for norm in norms:
                mean, var, count = (value for value in _statistics(norm).values() if value is not None)
                mean.zero_(), var.fill_(1), count.zero_()
        with failing_together():
            if not _pass(model, itertools.islice(loader, batches), chosen, like, () if momentum else norms):
                raise DataError("recalibrate got a loader without images: statistics are unchanged. Give it training data")
        _average_over_processes(model, norms, chosen)
        if not all(bool(buffer.isfinite().all()) for norm in norms for buffer in norm.buffers(recurse=False)):
            raise DataError("recalibrate got images that make statistics infinite or NaN: they are unchanged")


def _selected(model: nn.Module, widths: Sequence[Width] | Width | None, indices: Sequence[int] | int | None) -> list[int]:
    """Indices of the chosen widths among all; one for a network of one width."""
    if widths is None and indices is None:
        return list(range(len(widths_of(model)) or 1))
    named = (widths,) if isinstance(widths, float | int | str) else widths or ()
    numbered = (indices,) if isinstance(indices, int) else indices or ()
    if not (len(named) or len(numbered)):
        raise ConfigError(f"widths={widths!r}, indices={indices!r}: give at least one, or leave both out for all widths")
    available = require_widths(model)
    by_width = [width_index(available, width=each) for each in named]
    return [*by_width, *(width_index(available, index=each) for each in numbered)]


def _pass(
    model: nn.Module,
    loader: Iterable[Any],
    chosen: Sequence[int],
    like: Tensor,
    averaging: Sequence[nn.modules.batchnorm._BatchNorm],
) -> int:
    """Run every batch at every width, where some norms weigh it by its images; returns their number."""
    seen = 0
    for images in images_of(loader, "recalibrate"):
        seen += len(images)
        for norm in averaging:
            norm.momentum = len(images) / seen
        for each in chosen:
            select_width(model, each)
            model(images.to(like))
    return seen


def _average_over_processes(
    model: nn.Module, norms: Sequence[nn.modules.batchnorm._BatchNorm], chosen: Sequence[int]
) -> None:
    """Average the statistics over all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    found: dict[int, Tensor] = {}
    for each in chosen:
        select_width(model, each)
        for norm in norms:
            mean, var, _ = _statistics(norm).values()
            found |= {id(buffer): buffer for buffer in (mean, var) if buffer is not None}
    for buffer in found.values():
        torch.distributed.all_reduce(buffer)
        buffer.div_(torch.distributed.get_world_size())


def _statistics(norm: nn.modules.batchnorm._BatchNorm) -> dict[str, Tensor | None]:
    return norm.statistics() if isinstance(norm, PlainBatchNorm2d) else {name: getattr(norm, name) for name in STATISTICS}


@contextmanager
def _only_norms_train(
    model: nn.Module, norms: Sequence[nn.modules.batchnorm._BatchNorm], momentum: float | None
) -> Iterator[None]:
    """Norms in training mode with this momentum, everything else in eval mode; all restored afterwards."""
    momenta = [(norm, norm.momentum) for norm in norms]
    with eval_mode(model):
        for norm in norms:
            norm.train()
            norm.momentum = momentum
        try:
            yield
        finally:
            for norm, momentum in momenta:
                norm.momentum = momentum


@contextmanager
def _restored_on_failure(norms: Sequence[nn.Module]) -> Iterator[None]:
    saved = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers(recurse=False)]
    try:
        yield
    except BaseException:
        for buffer, value in saved:
            buffer.copy_(value)
        raise
