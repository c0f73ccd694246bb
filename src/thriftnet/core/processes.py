"""Processes that work together: sums over them, and errors that end all of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from thriftnet.errors import ThriftnetError

_cpu_groups: dict[Any, Any] = {}  # of each group on accelerators, one of the same processes that needs none


def joined() -> tuple[int, int]:
    """Rank and world size of the process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def total(value: Tensor) -> Tensor:
    """The sum over all processes, on each of them."""
    value = value.clone()
    if joined()[1] > 1:
        dist.all_reduce(value)
    return value


def largest(value: Tensor) -> Tensor:
    """The elementwise maximum over all processes, on each of them."""
    value = value.clone()
    if joined()[1] > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


@contextmanager
def failing_together() -> Iterator[None]:
    """Raise on every process what one of them raises inside; all must enter, and none may communicate inside.

    Otherwise the others would wait for the one that failed, or report a lost connection instead of the reason. Costs one small message
    in main memory: no accelerator is waited for.

    Raises:
        ThriftnetError: Of this process, or of the first that failed.
        RuntimeError: Another process failed with an error of another kind.
    """
    rank, world_size = joined()
    if world_size == 1:
        yield
        return
    own: Exception | None = None
    try:
        yield
    except Exception as error:
        own = error
    failed, group = torch.tensor(int(own is not None)), _cpu_group()
    dist.all_reduce(failed, op=dist.ReduceOp.MAX, group=group)
    if not failed:
        return
    text = own and f"process {rank} failed: {type(own).__name__}: {own}"
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, own if isinstance(own, ThriftnetError) else text, group=group)
    if own is not None:
        raise own
    first = next(each for each in found if each is not None)
    raise first if isinstance(first, ThriftnetError) else RuntimeError(first)


def _cpu_group() -> Any:
    world = dist.group.WORLD
    if dist.get_backend() == "gloo":
        return world
    if world not in _cpu_groups:
        _cpu_groups.clear()
        _cpu_groups[world] = dist.new_group(backend="gloo")
    return _cpu_groups[world]
