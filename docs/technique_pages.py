"""For mkdocs: every technique of the registry has a page and its entries in the API."""

from __future__ import annotations

from typing import Any

from mkdocs.structure.files import File, Files

from thriftnet.techniques import TECHNIQUES

PAGES = {f"techniques/{name.replace('-', '_')}.md": name for name in TECHNIQUES}


def on_config(config: Any) -> None:
    """The pages of the section "Techniques"."""
    for section in config.nav:
        if "Techniques" in section:
            section["Techniques"] = list(PAGES)


def on_files(files: Files, *, config: Any) -> None:
    """A technique without a page gets one that shows its docstrings."""
    for path, name in PAGES.items():
        if files.get_file_from_path(path) is None:
            files.append(File.generated(config, path, content=f"# {name}\n\n::: {TECHNIQUES.file(name)}\n"))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The place in the API where the techniques' public names are listed."""
    names = [f"{TECHNIQUES.file(name)}.{public}" for name, all_names in TECHNIQUES.public.items() for public in all_names]
    return markdown.replace(
        "<!-- techniques -->", "\n".join(f"::: {name}\n    options: {{ members: false }}" for name in names)
    )
