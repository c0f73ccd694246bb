"""How a long job uses memory and threads: switched on by the command line, never by importing."""

from __future__ import annotations

import ctypes
import sys

from thriftnet.errors import ConfigError

TRIM_THRESHOLD, MMAP_THRESHOLD_COUNT = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
NEVER = 2**31 - 1


def use_fast_malloc() -> str:
    """Let glibc keep the memory that large tensors leave behind, for the rest of this process; returns what was set.

    By default it gives each large block back to the system and fetches it again page by page, in every training step. The
    price: the process keeps the most memory that it ever used.

    Raises:
        ConfigError: Another system, or another C library.
    """
    if sys.platform != "linux":
        raise ConfigError(f"--fast-malloc is for glibc on Linux, this is {sys.platform}: leave it out")
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        raise ConfigError("--fast-malloc needs glibc, and this C library has no mallopt: leave it out")
    if not (mallopt(MMAP_THRESHOLD_COUNT, 0) and mallopt(TRIM_THRESHOLD, NEVER)):
        raise ConfigError("--fast-malloc: the C library refused to keep memory. Leave it out")
    return "glibc, mallopt (no mmap, no trim)"


def allocator() -> str:
    """The C library's allocator, for notes beside measurements."""
    name = getattr(ctypes.CDLL(None), "gnu_get_libc_version", None) if sys.platform == "linux" else None
    return "glibc default" if name is not None else f"{sys.platform} default"


def use_threads(batch_size: int, threads: int | None = None) -> int:
    """Set torch's threads within an operation: as asked for, else one for single images; returns the number.

    One image gives so little work that threads wait for each other longer than they work.
    """
    import torch

    if threads is not None and threads < 1:
        raise ConfigError(f"--threads {threads}: possible is a whole number of at least 1")
    if threads is not None or batch_size == 1:
        torch.set_num_threads(threads or 1)
    return torch.get_num_threads()
