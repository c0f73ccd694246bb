"""Plain text: tables, and text from outside made safe for terminals, pictures, pages and files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

MESSAGE = 2000  # most characters of an error's message


def printable(text: str, *, lines: bool = False) -> str:
    r"""Text from outside as it may be shown anywhere: what is not printable becomes an escape, as in a ``repr``.

    That is control characters (escape sequences, tabs), marks that turn the direction of writing, and the lone surrogates by which
    Python represents bytes of file names that are not UTF-8.

    Args:
        text: Any text.
        lines: Keep line breaks.

    Example:
        >>> print(printable("\x1b[2Jcat\udcff"))
        \x1b[2Jcat\udcff
    """
    if text.isprintable():
        return text
    kept = "\n" if lines else ""
    return "".join(c if c.isprintable() or c in kept else c.encode("unicode_escape").decode() for c in text)


def one_line(text: str, limit: int = MESSAGE) -> str:
    r"""A message in one printable line; of a longer one the beginning and the end, which says what to do.

    Example:
        >>> one_line("a\n  b"), one_line("no such layer: " + 99 * "x" + ". See --help", 40)
        ('a b', 'no such layer: xxxxxxxxx … x. See --help')
    """
    text = printable(" ".join(text.split()))
    end = limit // 3
    return text if len(text) <= limit else f"{text[: limit - end - 3]} … {text[-end:]}"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Aligned columns: numbers to the right, with thousands separators, text to the left.

    Example:
        >>> print(table(["layer", "params"], [["conv1", 432], ["fc", 65000]]))
        layer  params
        conv1     432
        fc     65,000
    """
    columns = [printable(name) for name in columns]
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(columns, *([c[0] for c in row] for row in cells), strict=True)]
    numeric = [all(row[i][1] for row in cells) and bool(cells) for i in range(len(columns))]
    head = "  ".join(name.rjust(w) if n else name.ljust(w) for name, w, n in zip(columns, widths, numeric, strict=True))
    lines = ["  ".join(c[0].rjust(w) if c[1] else c[0].ljust(w) for c, w in zip(row, widths, strict=True)) for row in cells]
    return "\n".join(line.rstrip() for line in (head, *lines))


def _cell(value: object) -> tuple[str, bool]:
    """Text, and whether it is a number or None."""
    if value is None:
        return "-", True
    if isinstance(value, bool) or not isinstance(value, int | float):
        return printable(str(value)), False
    if isinstance(value, int):
        return f"{value:,}", True
    return (f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.4g}"), True


def short_count(count: float) -> str:
    """A count in three digits or so, as the options that take one are written.

    Example:
        >>> short_count(970), short_count(42_000), short_count(1_600_000), short_count(131_997_952)
        ('970', '42K', '1.6M', '132M')
    """
    power = max(i for i in range(4) if i == 0 or abs(count) >= 999.5 * 1000 ** (i - 1))
    return f"{count / 1000**power:.3g}{('', 'K', 'M', 'G')[power]}"


def shortened(text: str, limit: int) -> str:
    """At most ``limit`` characters of a text."""
    return text if len(text) <= limit else f"{text[: limit - 1].rstrip()}…"
