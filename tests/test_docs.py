"""What the docs list is what there is."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest

import thriftnet as tn
from thriftnet.cli import VERBS, main
from thriftnet.techniques import TECHNIQUES

DOCS = Path(__file__).parent.parent / "docs"

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", TECHNIQUES)
def test_each_technique_has_a_page_with_all_its_fields(name: str):
    page = (ROOT / "docs" / "techniques" / f"{name.replace('-', '_')}.md").read_text(encoding="utf-8")
    table = page.split("\n## Config\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", table, re.MULTILINE))
    fields = {field.name: field.default for field in dataclasses.fields(TECHNIQUES[name])}
    assert set(rows) == set(fields)
    for field, default in fields.items():
        written = rows[field].strip().strip("`").strip('"')
        assert written == str(default), f"{field}: the page says {written}, the default is {default}"


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_is_on_the_page_of_the_command_line(verb: str):
    assert f"thriftnet {verb}" in (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert f"`thriftnet {verb}" in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("verb", VERBS)
def test_each_option_of_a_verb_is_in_its_section(verb: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match=r"^0$"):
        main([verb, "--help"])
    options = set(re.findall(r"^  (?:-\w \w+, )?(--[\w-]+)", capsys.readouterr().out, re.MULTILINE))
    page = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {verb}\n")[1].split("\n## ")[0]
    if "[image options]" in section:
        section += page.split("\n### Image options\n")[1].split("\n## ")[0]
    section += page.split("\n## Threads and memory\n")[1].split("\n## ")[0]
    assert "--json" in options
    assert not options - set(re.findall(r"--[\w-]+", section))


def test_errors_are_printed_as_their_page_shows():
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").replace("```\n", "\n")
    shown = re.findall(r"^>>> (.*)\n((?:.+\n)+)", text, re.MULTILINE)
    assert len(shown) > 10
    for call, expected in shown:
        with pytest.raises(tn.ThriftnetError) as raised:
            exec(call, {"tn": tn, "model": tn.create_model("resnet20")})  # the project's own page
        assert f"{type(raised.value).__name__}: {raised.value}".split() == expected.split()


def test_links_between_pages_lead_somewhere():
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize(
    "page", ["zoo.md", "recipes.md", *(f"coming-from/{path.name}" for path in (DOCS / "coming-from").glob("[!i]*.md"))]
)
def test_pages_that_follow_from_tables_are_up_to_date(page: str):
    spec = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    pages = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pages)
    assert pages.PAGES[page]() + "\n" == (DOCS / page).read_text(encoding="utf-8"), "run: python docs/pages.py"
