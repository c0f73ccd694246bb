"""Regular expressions that users give, searched for in the names of layers."""

from __future__ import annotations

from collections.abc import Callable

from thriftnet.errors import ConfigError

SECONDS = 0.5  # of processor time for one name; a microsecond is usual


def matcher(pattern: str) -> Callable[[str], bool]:
    """Whether an expression is found in a name; one that would take forever is refused, as ``(a+)+$`` can.

    Raises:
        ConfigError: Malformed; or, from the function, too slow.
    """
    import regex  # the standard library's has no limit on time

    try:
        compiled = regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise ConfigError(f"{pattern!r} is not a regular expression: {error}") from None

    def found(name: str) -> bool:
        try:
            return compiled.search(name, timeout=SECONDS) is not None
        except TimeoutError:
            raise ConfigError(
                f"{pattern!r} takes longer than {SECONDS:g} s on the name {name!r}: write it without repetitions in repetitions"
            ) from None

    return found
