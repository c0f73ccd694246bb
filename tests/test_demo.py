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
from thriftnet.data.digits import load_digits
from thriftnet.report.page import Page, Picture, write_page
from thriftnet.train.demo import SHOWN
from thriftnet.train.loop import Settings, fit, random_crop


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("demo")
    assert main(["demo", "--epochs", "1", "--output", str(output)]) == 0
    return output


def test_the_demo_saves_every_network_and_its_folded_form(demo: Path):
    names = {path.name for path in (demo / "models").iterdir()}
    trained = {spec.partition("(")[0] for spec in SHOWN} | {"plain"}
    assert trained <= names
    assert {"plain-folded", "shift-folded", "slimmable-at-0.5-folded", "slimmable-at-1-folded"} <= names
    images = load_digits().test.images[:5]
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
    for spec in SHOWN:
        assert spec.partition("(")[0] in text
    assert {path.name for path in (demo / "pictures").iterdir()} == {"accuracy.svg", "training.svg", "predictions.svg"}


def test_the_demo_is_the_same_under_a_seed(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["demo", "--epochs", "1", "--output", str(tmp_path), "--json"]) == 0
    results = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    for result in results:
        name = Path(result["folder"]).name
        first, second = (tn.load(place / "models" / name).state_dict() for place in (demo, tmp_path))
        assert all(torch.equal(first[key], second[key]) for key in first), name


def test_digits_are_split_by_class_and_reproducible():
    one, same, other = load_digits(0), load_digits(0), load_digits(1)
    assert torch.equal(one.train.images, same.train.images)
    assert not torch.equal(one.test.labels, other.test.labels)
    assert len(one.train) + len(one.test) == 1797
    share = torch.bincount(one.test.labels) / torch.bincount(one.train.labels)
    assert (share - 1 / 3).abs().max() < 0.02
    assert abs(one.train.images.mean()) < 1e-5


def test_random_crop_moves_each_image_by_a_whole_number_of_pixels():
    image = torch.arange(16.0).view(1, 1, 4, 4)
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), mode="replicate")[0, 0]
    possible = {tuple(padded[i : i + 4, j : j + 4].flatten().tolist()) for i in range(3) for j in range(3)}
    crops = random_crop(image.expand(300, -1, -1, -1), 1, torch.Generator().manual_seed(0))
    assert {tuple(crop.flatten().tolist()) for crop in crops} == possible
    assert torch.equal(random_crop(image, 0, torch.Generator()), image)


def test_training_lowers_the_loss_and_adds_the_penalty():
    data = load_digits()
    model = tn.convert(tn.create_model("resnet20", in_chans=1), "filter-basis(shared_rank=8, init='random')")
    curve = fit(model, data.train, data.test, Settings(epochs=2))
    assert curve.loss[1] < curve.loss[0]
    assert len(curve.test_accuracy) == 2
    assert tn.penalty(model, scaled=True).item() == pytest.approx(10 * tn.penalty(model).item())


def test_a_training_set_smaller_than_a_batch_is_refused():
    data = load_digits()
    with pytest.raises(tn.DataError, match="fewer than one batch"):
        fit(tn.create_model("resnet20", in_chans=1), data.train, data.test, Settings(batch_size=10**6))


def test_text_in_a_page_is_escaped(tmp_path: Path):
    page = Page(
        "<b>", ["<script>alert(1)</script>"], ["a"], [["<i>"]], [Picture("name", "<p>", "<svg></svg>", "<q>")], {"k": "<u>"}
    )
    text = write_page(page, tmp_path / "report.html").read_text()
    assert re.findall(r"<(script|i|q|u|b)>", text) == []
    assert text.count("<svg></svg>") == 1
