"""The demo's job, small: deterministic, complete, and its report stands alone."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import thriftnet as tn
from thriftnet.cli import main
from thriftnet.cli.demo import held_out, shown
from thriftnet.data.digits import digits_source
from thriftnet.report.page import Page, Picture, write_page


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--epochs", "1", "--output", str(output)]) == 0
    return output


def test_the_demo_saves_every_network_and_its_folded_form(demo: Path):
    names = {path.name for path in (demo / "models").iterdir()}
    trained = {spec.partition("(")[0] for spec in shown()} | {"plain"}
    assert trained <= names
    assert {"plain-folded", "shift-folded", "slimmable-at-0.5-folded", "slimmable-at-1-folded"} <= names
    images = next(iter(held_out(digits_source())))[0][:5]
    trained_net, folded = (tn.load(demo / "models" / name) for name in ("filter-basis", "filter-basis-folded"))
    torch.testing.assert_close(folded(images), trained_net(images), rtol=1e-4, atol=1e-4)


class References(HTMLParser):
    """Collects everything that a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.found += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value and value[0] != "#"]


def test_the_report_stands_alone(demo: Path):
    text = (demo / "report.html").read_text()
    page = References()
    page.feed(text)
    assert [place for place in page.found if not place.startswith("data:image/png;base64,")] == []
    assert "script" not in page.tags
    assert page.tags.count("svg") == 3
    assert "@import" not in text
    for spec in shown():
        assert spec.partition("(")[0] in text
    assert {path.name for path in (demo / "pictures").iterdir()} == {"accuracy.svg", "training.svg", "predictions.svg"}


def test_the_demo_is_the_same_under_a_seed(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    """The plain network and the first two techniques, which are trained before the others."""
    monkeypatch.setattr("thriftnet.cli.demo.shown", lambda: shown()[:2])
    assert main(["demo", "--epochs", "1", "--output", str(tmp_path), "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert len({result["folder"] for result in results}) == 3
    for result in results:
        name = Path(result["folder"]).name
        first, second = (tn.load(place / "models" / name).state_dict() for place in (demo, tmp_path))
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_digits_are_split_by_class():
    source = digits_source()
    train, test = (source.split(name).labels for name in ("train", "test"))
    assert len(train) + len(test) == 1797
    share = torch.bincount(test) / torch.bincount(train)
    assert (share - 1 / 3).abs().max() < 0.02
    images = source.split("train").resident() / 255
    assert images.mean() == pytest.approx(source.mean[0], rel=1e-4)
    assert images.std() == pytest.approx(source.std[0], rel=1e-4)


def test_text_in_a_page_is_escaped(tmp_path: Path):
    page = Page(
        "<b>", ["<script>alert(1)</script>"], ["a"], [["<i>"]], [Picture("name", "<p>", "<svg></svg>", "<q>")], {"k": "<u>"}
    )
    text = write_page(page, tmp_path / "report.html").read_text()
    assert re.findall(r"<(script|i|q|u|b)>", text) == []
    assert text.count("<svg></svg>") == 1
