"""One training in a folder at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from thriftnet import files
from thriftnet.errors import ConfigError

LOCK = ".lock"


@contextmanager
def locked(folder: Path, active: bool) -> Iterator[None]:
    """Hold a run's folder; the system releases it when the process ends, however it ends.

    Args:
        folder: Of the run; made where it is missing.
        active: Whether this process is the one that writes.

    Raises:
        ConfigError: Another process trains there, or the folder cannot be written.
    """
    with ExitStack() as stack:
        try:
            if active:
                stack.enter_context(files.locked(folder / LOCK))
        except BlockingIOError as error:
            raise ConfigError(
                f"another training runs in {folder} ({error.strerror}): give another --output, or stop it"
            ) from None
        except OSError as error:
            raise ConfigError(f"cannot write to {folder}: {error.strerror}") from None
        yield
