"""The self-contained HTML page: no script, no font, no picture from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from thriftnet.errors import ThriftnetError
from thriftnet.files import write_atomically


@dataclass(frozen=True)
class Picture:
    """A picture of the page."""

    name: str  # of the file it is also written to
    title: str
    svg: str  # an SVG element
    caption: str


@dataclass(frozen=True)
class Page:
    """What the report says, from top to bottom."""

    title: str
    summary: Sequence[str]  # paragraphs
    columns: Sequence[str]  # head of the table; the first column names the row
    rows: Sequence[Sequence[str]]
    pictures: Sequence[Picture]
    facts: Mapping[str, str]  # how it was made: command, versions, ...


def write_page(page: Page, path: Path) -> Path:
    """Write the page, and each picture of it to ``pictures/NAME.svg``; what was there stays whole until replaced.

    Raises:
        ThriftnetError: jinja2 is missing, or the place cannot be written.
    """
    try:
        from jinja2 import Environment
    except ImportError:
        raise ThriftnetError("the report needs jinja2 and matplotlib: pip install 'thriftnet[report]'") from None
    template = (files("thriftnet.report") / "page.html.j2").read_text(encoding="utf-8")
    text = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(template).render(page=page)
    try:
        for picture in page.pictures:
            write_atomically(path.parent / "pictures" / f"{picture.name}.svg", picture.svg)
        write_atomically(path, text)
    except OSError as error:
        raise ThriftnetError(f"cannot write {path}: {error.strerror}") from None
    return path
