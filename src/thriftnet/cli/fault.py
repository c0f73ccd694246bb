"""What no code foresaw: one line for the user, and a log with the traceback for a report."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import tempfile
import traceback
from collections.abc import Sequence

from thriftnet import __version__
from thriftnet.errors import first_line

NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "bad_alloc")  # in RuntimeErrors of torch


def describe(arguments: Sequence[str], error: Exception) -> tuple[bool, str]:
    """Whether the system stopped the command rather than a fault of thriftnet, and what to say, with the place of the log."""
    log = _written(arguments, error)
    reason = first_line(error)
    if isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY):
        return (
            True,
            f"there is not enough memory ({reason}): take a smaller network, smaller images or a smaller batch. {log}",
        )
    if isinstance(error, OSError):
        place = f": {error.filename}" if error.filename else ""
        return True, f"{error.strerror or reason}{place}. {log}"
    return False, f"a fault of thriftnet, {type(error).__name__}: {reason}. {log}, which a report should hold"


def _written(arguments: Sequence[str], error: Exception) -> str:
    """The place of a new log, in words."""
    torch = getattr(sys.modules.get("torch"), "__version__", "not loaded")
    head = f"thriftnet {__version__}, Python {platform.python_version()}, torch {torch}, {platform.platform()}"
    text = "\n".join([head, shlex.join(["thriftnet", *arguments]), "", *traceback.format_exception(error)])
    try:
        handle, path = tempfile.mkstemp(prefix="thriftnet-", suffix=".log")
        with os.fdopen(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
    except OSError as reason:
        return f"No log could be written ({reason.strerror})"
    return f"The traceback is in {path}"
