"""Memory that a request needs is estimated, and refused before it is allocated."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from thriftnet.errors import ConfigError

CONTAINER = Path("/sys/fs/cgroup")  # where Linux states the limit of a container
LIMITS = (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"))


def needs(size: int, what: str) -> None:
    """Raise unless this many bytes are available.

    Raises:
        ConfigError: With what is needed and what there is.
    """
    if size > 1 << 20 and size > (there := available()):
        raise ConfigError(f"{what} needs at least {_gigabytes(size)} of memory, and {_gigabytes(there)} are available")


def available() -> int:
    """Bytes that this process may still allocate: of the machine, or of the container where that is less."""
    import psutil

    free = [int(psutil.virtual_memory().available)]
    for limit, used in LIMITS:
        with suppress(OSError, ValueError):  # another system, or no limit ("max")
            free.append(int((CONTAINER / limit).read_text()) - int((CONTAINER / used).read_text()))
    return max(0, min(free))


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.1f} GB" if size < 10**24 else "far too much"
