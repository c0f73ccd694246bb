"""Every error that thriftnet raises on purpose. A message says what was got, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from thriftnet.text import one_line


class ThriftnetError(Exception):
    """Base of all errors that thriftnet raises on purpose. The message is one printable line, whatever names are in it."""

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(ThriftnetError, ValueError):
    """A name, field or value that cannot be used."""


class IncompatibleModelError(ThriftnetError, ValueError):
    """A network, or one of its layers, that a verb or technique cannot work on."""


class CheckpointError(ThriftnetError):
    """A file or folder that is not the checkpoint it should be."""


class DataError(ThriftnetError):
    """Data that is missing, broken or of the wrong kind."""


class ExportError(ThriftnetError):
    """A network that could not be exported, or an export that disagrees with it."""


def unknown_name(kind: str, got: str, known: Iterable[str], *, first: Iterable[str] = ()) -> ConfigError:
    """The one error for every unknown name, with close matches first.

    Args:
        kind: What it should be a name of.
        got: The name.
        known: Possible names.
        first: Further possible names, which are listed before the others.

    Example:
        >>> str(unknown_name("technique", "soft-sharin", ["shift", "soft-sharing"]))
        "unknown technique 'soft-sharin': did you mean 'soft-sharing'? Possible: shift, soft-sharing"
    """
    names = list(dict.fromkeys((*sorted(first), *sorted(known))))
    close = get_close_matches(got, names, n=3, cutoff=0.5)
    hint = f": did you mean {' or '.join(map(repr, close))}?" if close else "."
    shown = ", ".join(names[:20]) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
    return ConfigError(f"unknown {kind} {got!r}{hint} Possible: {shown or 'none'}")


def first_line(error: Exception) -> str:
    """The first line of an error's message; its class if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
