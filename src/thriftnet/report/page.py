"""The self-contained HTML page: no script, no font, no picture from elsewhere."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path

from thriftnet.errors import ThriftnetError


@dataclass(frozen=True)
class Picture:
    """A picture of the page.

    Args:
        title: Heading.
        svg: The picture, an SVG element.
        caption: What it shows.
    """

    title: str
    svg: str
    caption: str


@dataclass(frozen=True)
class Page:
    """What the report says.

    Args:
        title: Heading of the page.
        summary: Paragraphs below it.
        columns: Head of the table; the first column names the row.
        rows: Cells as text.
        pictures: Below the table.
        facts: How it was made: command, versions, ...
    """

    title: str
    summary: Sequence[str]
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    pictures: Sequence[Picture] = ()
    facts: Mapping[str, str] = field(default_factory=dict)


def write_page(page: Page, path: Path) -> Path:
    """Write the page; an earlier one stays whole until the new one is complete.

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
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".html")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(draft, 0o644)
        os.replace(draft, path)
    except OSError as error:
        raise ThriftnetError(f"cannot write {path}: {error.strerror}") from None
    return path
