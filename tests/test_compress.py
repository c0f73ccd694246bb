"""Compression in one call: what each step leaves, stops at every step, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thriftnet as tn
from thriftnet.cli import main
from thriftnet.core import fit
from thriftnet.data.sources import open_data
from thriftnet.train import load_recipe
from thriftnet.train.compress import Compressed
from thriftnet.train.prepare import weights_hash


class Net(nn.Module):
    """A small network for digits."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.body = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(3))
        )
        self.head = nn.Linear(8 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(nn.functional.avg_pool2d(self.body(self.stem(x)), 2).flatten(1))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "ITERATIONS", 20)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    from thriftnet.train import train

    torch.manual_seed(0)
    network = Net()
    recipe = load_recipe("digits", epochs=4, lr=0.1, trackers=())
    train(recipe, "digits", tmp_path_factory.mktemp("plain") / "run", model=network, device="cpu")
    return network.eval()


def compressed(network: nn.Module, folder: Path, data: Any = "digits", **options: Any) -> Compressed:
    recipe = load_recipe("convert-and-recover", flip=False, crop_padding=0, batch_size=64, trackers=())
    given = {"params": 0.7, "technique": "low-rank", "epochs": 2, "rates": (0.001, 0.05), "device": "cpu", **options}
    return tn.compress(network, data, folder, recipe=recipe, **given)


def test_compress_goes_from_a_trained_network_to_a_small_one(trained: nn.Module, tmp_path: Path) -> None:
    before = weights_hash(trained)
    result = compressed(trained, tmp_path / "small")
    assert weights_hash(trained) == before
    plain, fitted, last, folded = (result[name] for name in ("plain", "fitted", "trained", "folded"))
    assert plain.params == sum(p.numel() for p in trained.parameters())
    assert last.params <= 0.7 * plain.params
    assert last.macs < plain.macs
    assert plain.top1 > 70  # it has learned something that could be lost
    assert fitted.top1 > plain.top1 - 15
    assert last.top1 >= max(fitted.top1, plain.top1 - 3) - 1
    assert folded.top1 == pytest.approx(last.top1, abs=0.5)
    assert set(last.times) == set(folded.times) == {"1", "64"}
    assert result.rate in result.rates
    assert result.rates[result.rate] == max(result.rates.values())
    network = tn.load(tmp_path / "small" / "model", model=Net()).eval()
    assert sum(p.numel() for p in network.parameters()) == last.params
    plainer = tn.load(tmp_path / "small" / "folded", model=Net())
    x = torch.rand(4, 1, 8, 8)
    assert torch.allclose(plainer(x), network(x), atol=1e-4)
    page = (tmp_path / "small" / "report.html").read_text(encoding="utf-8")
    assert f"{last.params:,}" in page
    assert page.count("<svg") >= 3
    assert json.loads(json.dumps(result.to_dict()))["plan"]["name"] == "low-rank"


class StoppedError(Exception):
    """As a kill would."""


def test_compress_goes_on_after_a_stop_before_any_step(trained: nn.Module, tmp_path: Path) -> None:
    steps: list[str] = []
    whole = compressed(trained, tmp_path / "whole", on_step=steps.append)
    assert steps == ["plain", "plan", "fitted", "rate 0.001", "rate 0.05", "trained", "folded"]
    for number, stop in enumerate(steps):
        done: list[str] = []

        def on_step(name: str, stop: str = stop, done: list[str] = done) -> None:
            if name == stop:
                raise StoppedError
            done.append(name)

        with pytest.raises(StoppedError):
            compressed(trained, tmp_path / "stopped", on_step=on_step)
        assert done == (steps[number - 1 : number] if number else [])  # only what was not done before
    result = compressed(trained, tmp_path / "stopped")
    assert [row.top1 for row in result.rows] == [row.top1 for row in whole.rows]
    assert weights_hash(tn.load(tmp_path / "stopped" / "model", model=Net())) == weights_hash(
        tn.load(tmp_path / "whole" / "model", model=Net())
    )
    with pytest.raises(tn.ConfigError, match="holds another compression: budget differ"):
        compressed(trained, tmp_path / "whole", params=0.6)
    torch.nn.init.normal_(other := Net().head.weight)
    changed = Net()
    changed.head.weight = nn.Parameter(other)
    with pytest.raises(tn.ConfigError, match="holds another compression: model"):
        compressed(changed, tmp_path / "whole")


def test_without_a_technique_the_best_of_all_is_taken(trained: nn.Module, tmp_path: Path) -> None:
    steps: list[str] = []
    result = compressed(trained, tmp_path / "small", technique=None, epochs=1, rates=(0.01,), on_step=steps.append)
    assert {"plan: low-rank", "plan: soft-sharing"} <= set(steps)
    assert result.rates == {}
    assert result.rate == 0.01
    assert result["trained"].params <= 0.7 * result["plain"].params


def test_images_without_labels_are_enough(trained: Net, tmp_path: Path) -> None:
    stem: nn.Conv2d = trained.stem[0]  # type: ignore[assignment]
    source = open_data("digits")
    for name in ("train", "test"):
        folder = tmp_path / "images" / name
        folder.mkdir(parents=True)
        images = source.split(name)
        for number in range(200 if name == "train" else 60):
            images.image(number).save(folder / f"{number}.png")
    coloured = copy.deepcopy(trained)  # folders are read in colour
    coloured.stem[0] = nn.Conv2d(3, 8, 3, padding=1)  # type: ignore[operator]
    coloured.stem[0].load_state_dict({"weight": stem.weight.repeat(1, 3, 1, 1) / 3, "bias": stem.bias})
    result = compressed(coloured, tmp_path / "small", f"folder:{tmp_path / 'images'}", epochs=1, rates=(0.01,))
    assert not result.labelled
    assert result["plain"].top1 == 100
    assert result["trained"].top1 > 70


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": None, "technique": None}, "say how small"),
        ({"params": 0.001}, "out of reach"),
        ({"params": 0.5, "macs": 0.5}, "one budget at a time"),
        ({"minutes": 1.0}, "either epochs or minutes"),
        ({"rates": (0.0,)}, "rates"),
        ({"technique": "slimmable"}, "no settings that a budget could choose"),
    ],
)
def test_what_makes_no_sense_is_refused(trained: nn.Module, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(tn.ThriftnetError, match=message):
        compressed(trained, tmp_path / "small", **options)


def test_a_network_of_other_classes_or_images_is_refused(tmp_path: Path) -> None:
    network = Net()
    network.head = nn.Linear(128, 3)
    with pytest.raises(tn.ConfigError, match=r"gives \(3,\) outputs"):
        compressed(network, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tn.save(tn.create_model("resnet20", num_classes=10, in_chans=1), tmp_path / "plain")
    given = [
        "--epochs",
        "1",
        "--rates",
        "0.01",
        "--limit",
        "300",
        "--technique",
        "soft-sharing(templates=2)",
        "--device",
        "cpu",
    ]
    command = [
        "compress",
        str(tmp_path / "plain"),
        "--data",
        "digits",
        "--select",
        "layer3",
        "--output",
        str(tmp_path / "out"),
    ]
    assert main([*command, *given, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in result["rows"]] == ["plain", "fitted", "trained", "folded"]
    assert main([*command, *given]) == 0  # all is done
    assert f"{result['rows'][2]['params']:,}" in capsys.readouterr().out
