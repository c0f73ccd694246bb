"""What the command line prints and writes: the only place from where text reaches a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from thriftnet.errors import ConfigError
from thriftnet.files import write_atomically
from thriftnet.text import printable


class UnprintedError(Exception):
    """Standard output took no more; the message is empty if its reader went away, as `head` does."""


def is_main_process() -> bool:
    """Whether this process prints and writes, of those that ``torchrun`` started."""
    return os.environ.get("RANK", "0") == "0"


def emit(text: str, result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result for people, or as one line of JSON; from the main process only.

    Raises:
        UnprintedError: It could not be printed.
    """
    if is_main_process():
        print_out((_as_json(result) if as_json else text) + "\n")


def _as_json(result: Mapping[str, Any]) -> str:
    """One line of ASCII; numbers that JSON lacks are null."""
    exact = json.loads(json.dumps(result), parse_constant=lambda _: None)
    return json.dumps(exact).replace("\x7f", "\\u007f")


def print_out(text: str) -> None:
    """Print to standard output, line breaks as they are.

    Raises:
        UnprintedError: It could not be printed.
    """
    if sys.stdout is None:
        raise UnprintedError("standard output is closed")
    try:
        _write(sys.stdout, printable(text, lines=True))
    except OSError as error:
        with suppress(OSError, ValueError):  # else Python tries again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UnprintedError("" if isinstance(error, BrokenPipeError) else str(error.strerror)) from None


def say(text: str) -> None:
    """Print one line on standard error, where there is one."""
    if sys.stderr is not None:
        with suppress(OSError):
            _write(sys.stderr, printable(text) + "\n")


def show(text: str) -> None:
    """Show progress in the last line of a terminal."""
    with suppress(OSError):
        _write(sys.stderr, f"\r{printable(text)} ")


def has_terminal() -> bool:
    """Whether somebody sees progress: this is the main process, and standard error is a terminal."""
    return is_main_process() and sys.stderr is not None and sys.stderr.isatty()


def _write(stream: TextIO, text: str) -> None:
    encoding = stream.encoding or "utf-8"
    stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    stream.flush()


def write_text(path: str | Path, text: str) -> None:
    """Write a file, from the main process only.

    Raises:
        ConfigError: It cannot be written.
    """
    if is_main_process():
        try:
            write_atomically(path, text)
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}") from None
