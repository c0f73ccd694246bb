"""What a figure is, and what all of them need: bits of a network, forked processes, tables."""

from __future__ import annotations

import hashlib
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from thriftnet.core.tied import unique_tensors

SHOWN = 30  # failures that are printed of each figure

T = TypeVar("T")
Bits = dict[str, tuple[str, tuple[int, ...], str]]


class Length(IntEnum):
    """How much of a figure is measured: a sample for the test suite, what a quarter of an hour holds, or all of it."""

    QUICK = 0
    USUAL = 1
    LONG = 2

    def pick(self, quick: T, usual: T, long: T) -> T:
        """The value for this length."""
        return (quick, usual, long)[self]


@dataclass
class Figure:
    """One table of results.

    Args:
        title: What was done.
        head: Column titles.
        rows: Text and numbers.
        failures: What should not have happened, a line each.
        notes: What the reader should know, a sentence each.
        seconds: How long it took.
    """

    title: str
    head: list[str]
    rows: list[list[Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def expect(self, right: bool, otherwise: str) -> None:
        """Note a failure unless something is as it should be."""
        if not right:
            self.failures.append(" ".join(otherwise.split())[:500])


def bits(model: nn.Module) -> Bits:
    """Kind, shape and hash of each tensor: equal if the networks are, bit by bit."""
    found = {}
    for name, tensor in unique_tensors(model).items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy()
        found[name] = (str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(raw.tobytes()).hexdigest())
    return found


def forked(work: Callable[[], None]) -> int:
    """Start a copy of this process that does some work and ends; gives its number.

    It ends with 0, or with 1 after an exception, which is printed.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Wait for a process: its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def ended_already(child: int) -> int | None:
    """As `ended`, without waiting: None while the process runs."""
    number, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if number else None


def killed_after(work: Callable[[int], None], seconds: float) -> int:
    """Fork work(pipe), kill -9 it some time after it wrote a first byte there; gives how it ended."""
    reading, writing = os.pipe()
    child = forked(lambda: work(writing))
    os.close(writing)
    os.read(reading, 1)
    select.select([], [], [], seconds)
    os.kill(child, signal.SIGKILL)
    os.close(reading)
    return ended(child)


def address_space() -> int:
    """Bytes of address space that this process has."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, hidden things included."""
    return sorted(path.name for path in folder.iterdir())
