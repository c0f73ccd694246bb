"""Threads and memory of a command. Only the command line sets them: importing the library changes nothing in the process."""

from __future__ import annotations

import ctypes
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from thriftnet.cli.output import has_terminal
from thriftnet.errors import ConfigError

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
NEVER = 2**31 - 1


def use_machine(options: Namespace, batch_size: int) -> str:
    """Set threads and allocator for the rest of this process; returns a description of the allocator."""
    memory = use_allocator(fast_malloc=options.fast_malloc)
    use_threads(batch_size, options.threads)
    return memory


def use_allocator(*, fast_malloc: bool) -> str:
    """Set the allocator for the rest of this process; returns a description for notes beside measurements.

    By default glibc returns each large block to the system when it is freed, and maps it again page by page in the next step.
    With ``fast_malloc`` it keeps them, and the memory of the process stays at its peak.

    Raises:
        ConfigError: ``fast_malloc`` on another system, or with another C library.
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if not fast_malloc:
        return "glibc default" if hasattr(library, "gnu_get_libc_version") else f"{sys.platform} default"
    if library is None:
        raise ConfigError(f"--fast-malloc is for glibc on Linux, this is {sys.platform}: leave it out")
    if not hasattr(library, "mallopt"):
        raise ConfigError("--fast-malloc needs glibc, and this C library has no mallopt: leave it out")
    if not (library.mallopt(MMAP_MAX, 0) and library.mallopt(TRIM_THRESHOLD, NEVER)):
        raise ConfigError("--fast-malloc: the C library refused to keep memory. Leave it out")
    return "glibc, mallopt (no mmap, no trim)"


def use_threads(batch_size: int, threads: int | None = None) -> int:
    """Set torch's threads within an operation, by default 1 for single images (too little work to share); returns the number."""
    import torch

    if threads is not None or batch_size == 1:
        torch.set_num_threads(threads or 1)
    return torch.get_num_threads()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread within an operation: fastest for single or tiny images, and exact under a seed."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, and nothing elsewhere: a function of what is done, and of all."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, disable=not has_terminal()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def status() -> Iterator[Callable[[str], None]]:
    """A line on a terminal that says what runs, and nothing elsewhere."""
    from rich.console import Console

    with Console(stderr=True, quiet=not has_terminal()).status("") as line:
        yield line.update
