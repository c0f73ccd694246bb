"""A plain network and what it is converted to, one at a time; and the statistics of norms that belong to each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from thriftnet.core.recalibrate import recalibrate
from thriftnet.core.sites import Replacement, replace, restoring
from thriftnet.core.width import eval_mode, select_width, widths

BATCH = 128


class Statistics(NamedTuple):
    """Of a norm's inputs, (C,) each."""

    mean: Tensor
    var: Tensor


class Both:
    """A plain network and the converted one, of which one exists at a time: they hold the same other layers.

    Args:
        model: The plain one.
        replaced: Old and new layers.

    Attributes:
        norms: The plain network's batch norms.
        inner_norms: Those inside new layers, which the plain network does not have.
    """

    def __init__(self, model: nn.Module, replaced: Sequence[Replacement]) -> None:
        self.model, self.table = model, {id(old): new for old, new in replaced}
        self.put_back = restoring(model)
        self.norms = [module for module in model.modules() if has_statistics(module)]
        self.plain_statistics = {id(norm): Statistics(*(each.clone() for each in _running(norm))) for norm in self.norms}
        inner = [module for old, new in replaced if not has_statistics(old) for module in new.modules()]
        self.inner_norms = list({id(module): module for module in inner if has_statistics(module)}.values())
        self.others = [[buffer, buffer.clone()] for norm in self.norms for buffer in norm.buffers(recurse=False)]
        self.is_plain = True

    def plain(self) -> nn.Module:
        """The plain network; the converted one is gone."""
        self._turn(plain=True)
        return self.model

    def new(self) -> nn.Module:
        """The converted network, whose norms have statistics of their own; the plain one is gone."""
        self._turn(plain=False)
        return replace(self.model, self.table)

    @torch.no_grad()
    def _turn(self, *, plain: bool) -> None:
        self.put_back()
        if plain != self.is_plain:
            for entry in self.others:
                buffer, other = entry
                entry[1] = buffer.clone()
                buffer.copy_(other)
        self.is_plain = plain


@torch.no_grad()
def adjust_norms(both: Both, images: Tensor) -> None:
    """Give the converted network's norms the statistics of its own inputs, at the same function.

    What a norm made of its inputs in the plain network, it then makes of the new ones, as far as mean and variance go: where the plain
    network's statistics are not those of the images, the difference stays. Norms inside new layers get the statistics of what they
    read, and a weight and bias with which they compute what they did. Of several widths, narrower ones are recalibrated.
    """
    with _noting(both.norms) as plain_inputs:
        _run(both.plain(), images)
    converted = both.new()
    outer = [(norm, both.table.get(id(norm), norm)) for norm in both.norms if id(norm) in plain_inputs]
    handles = []
    matched: dict[int, list[Statistics]] = {}
    for norm, new in outer:
        args = both.plain_statistics[id(norm)], _average(plain_inputs[id(norm)]), matched.setdefault(id(new), [])
        handles.append(new.register_forward_pre_hook(partial(_match, *args)))
    try:
        _run(converted, images)
    finally:
        for handle in handles:
            handle.remove()
    for _, new in outer:
        if matched[id(new)]:
            _set_running(new, _average(matched[id(new)]))
    with _noting(both.inner_norms) as inner_inputs:
        _run(converted, images)
    for norm in both.inner_norms:
        if id(norm) in inner_inputs and norm.affine:
            renormalise(norm, _average(inner_inputs[id(norm)]))
    if len(widths(converted)) > 1 and both.norms:
        recalibrate(converted, torch.split(images, BATCH), indices=range(len(widths(converted)) - 1))


def renormalise(norm: _BatchNorm, statistics: Statistics) -> None:
    """Set the running statistics of a norm; weight and bias change so that it computes in eval mode what it did."""
    mean, var = _running(norm)
    scale = norm.weight * (var + norm.eps).rsqrt()
    shift = norm.bias - mean * scale
    norm.weight.copy_(scale * (statistics.var + norm.eps).sqrt())
    norm.bias.copy_(shift + statistics.mean * scale)
    _set_running(norm, statistics)


def has_statistics(module: nn.Module) -> TypeGuard[_BatchNorm]:
    """Whether a module is a batch norm with running statistics."""
    return isinstance(module, _BatchNorm) and module.running_mean is not None


def _match(
    running: Statistics, plain: Statistics, found: list[Statistics], norm: nn.Module, args: tuple[Tensor, ...]
) -> None:
    """Before a norm runs: statistics with which these inputs become what those of the plain network became."""
    here = _statistics(args[0])
    ratio = here.var / plain.var.clamp_min(1e-12)
    ratio = torch.where(plain.var > 1e-12, ratio, 1.0)
    found.append(Statistics(here.mean - (plain.mean - running.mean) * ratio.sqrt(), running.var * ratio))
    _set_running(norm, found[-1])


@contextmanager
def _noting(norms: Sequence[nn.Module]) -> Iterator[dict[int, list[Statistics]]]:
    """The statistics of what norms read, for each of their runs, by id."""
    found: dict[int, list[Statistics]] = {}

    def note(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.setdefault(id(norm), []).append(_statistics(args[0]))

    handles = [norm.register_forward_pre_hook(note) for norm in norms]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _statistics(inputs: Tensor) -> Statistics:
    rows = inputs.detach().transpose(0, 1).flatten(1)
    return Statistics(rows.mean(1), rows.var(1, correction=0))


def _average(runs: Sequence[Statistics]) -> Statistics:
    return Statistics(*(torch.stack(values).mean(0) for values in zip(*runs, strict=True)))


def _running(norm: nn.Module) -> Statistics:
    mean, var = norm.running_mean, norm.running_var
    if not (isinstance(mean, Tensor) and isinstance(var, Tensor)):
        raise TypeError(f"{norm} keeps no statistics")
    return Statistics(mean, var)


def _set_running(norm: nn.Module, statistics: Statistics) -> None:
    for buffer, value in zip(_running(norm), statistics, strict=True):
        buffer.copy_(value)


def _run(model: nn.Module, images: Tensor) -> None:
    """Run a network in eval mode, at its largest width, in equal batches as far as that goes."""
    with eval_mode(model):
        if widths(model):
            select_width(model, len(widths(model)) - 1)
        for batch in images.chunk(max(1, round(len(images) / BATCH))):
            model(batch)
