"""One training in a folder at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thriftnet.errors import ConfigError

LOCK = ".lock"


@contextmanager
def locked(folder: Path, active: bool) -> Iterator[None]:
    """Hold a run's folder; the system lets go of it when the process ends, however it ends.

    Args:
        folder: Of the run; made where it is missing.
        active: Whether this process is the one that writes.

    Raises:
        ConfigError: Another process trains there, or the folder cannot be written.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        yield
        return
    if not active:
        yield
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            owner = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
            raise ConfigError(
                f"another training runs in {folder} (process {owner}): give another --output, or stop it"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)
