"""What the README shows runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from thriftnet.techniques import TECHNIQUES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks() -> list[tuple[str, str]]:
    """Each Python block of the README and the docs, with where it stands."""
    found = []
    for page in PAGES:
        for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)):
            found.append((f"{page.relative_to(ROOT)}:{number}", code))
    return found


@pytest.mark.parametrize("code", [code for _, code in blocks()], ids=[place for place, _ in blocks()])
def test_python_blocks_run(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """An error fails the test; figures in the comments of a block are those that it prints."""
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "block", "exec"), {})  # the project's own pages
    stated = {figure for comment in re.findall(r"#(.*)", code) for figure in re.findall(r"\d+(?:,\d{3})+", comment)}
    printed = capsys.readouterr().out
    assert [figure for figure in sorted(stated) if figure not in printed] == []


def test_there_are_blocks_on_the_pages():
    pages = {place.partition(":")[0] for place, _ in blocks()}
    assert {"README.md", "docs/getting-started.md", "docs/index.md"} <= pages
    assert {f"docs/techniques/{name.replace('-', '_')}.md" for name in TECHNIQUES} <= pages


def test_the_first_screen_has_the_two_commands():
    screen = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:60]
    targets = re.findall(r"^(\w+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    shown = [words[1] for line in screen if (words := line.split())[:1] == ["make"] and len(words) > 1]
    assert {"demo", "test"} <= {*shown} <= {*targets}
