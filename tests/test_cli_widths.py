"""Verbs on networks of several widths: evaluate's modes, recalibrate and search."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import thriftnet as tn
from images import png
from thriftnet.cli import main
from thriftnet.core.width import width
from thriftnet.data.augmentation import Augmentation
from thriftnet.data.sources import open_data
from thriftnet.dynamic.gate import gate_of

WIDTHS = ("0.25", "0.5", "0.75", "1")


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A slimmable network with a gate, not trained, whose gate tells images apart."""
    torch.manual_seed(0)
    plain = tn.create_model("wrn", depth=10, width=1, in_chans=1)
    model = tn.convert(plain, "slimmable(widths=(0.25, 0.5, 0.75, 1.0), gate=True)")
    gate = gate_of(model)[1]
    with torch.no_grad():
        gate.choose_weight.mul_(300)
    place = tmp_path_factory.mktemp("gated") / "model"
    tn.save(model.eval(), place, metadata={"input_size": [1, 8, 8]})
    return str(place)


def result(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main([*arguments, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_every_width_and_one(gated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "all.svg"
    every = result(capsys, "evaluate", gated, "--data", "digits", "--mode", "all", "--plot", str(picture))
    rows: list[dict[str, float]] = every["widths"]  # type: ignore[assignment]
    assert [row["name"] for row in rows] == list(WIDTHS)
    assert [row["macs"] for row in rows] == sorted(row["macs"] for row in rows)
    assert picture.read_text().startswith("<svg")
    one = result(capsys, "evaluate", gated, "--data", "digits", "--mode", "width=0.5")
    plain = result(capsys, "evaluate", gated, "--data", "digits", "--width", "0.5")
    assert one["top1"] == rows[1]["top1"] == plain["top1"]
    by_index = result(capsys, "evaluate", gated, "--data", "digits", "--mode", "width", "--width-index", "1")
    assert (by_index["name"], by_index["top1"]) == ("0.5", plain["top1"])
    widest = result(capsys, "evaluate", gated, "--data", "digits", "--mode", "width", "--width", "1")
    assert (widest["name"], widest["top1"]) == ("1", rows[3]["top1"])  # not the second width
    assert one["top5"] == rows[1]["top5"] == plain["top5"] >= one["top1"]
    assert one["macs"] == rows[1]["macs"] == tn.inspect(tn.freeze(tn.load(gated), 0.5), (1, 8, 8)).macs


def test_the_gate_within_a_budget(gated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "decisions.svg"
    found = result(
        capsys, "evaluate", gated, "--data", "digits", "--mode", "dynamic", "--budget", "520K", "--plot", str(picture)
    )
    assert found["macs"] == pytest.approx(520e3, rel=0.05)
    decisions: dict[str, dict[str, int]] = found["decisions"]  # type: ignore[assignment]
    assert set(decisions) == set("0123456789")
    assert sum(sum(row.values()) for row in decisions.values()) == 450
    assert picture.read_text().startswith("<svg")


def test_a_sweep_of_budgets_lies_beside_the_fixed_widths(gated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    picture = tmp_path / "sweep.svg"
    found = result(capsys, "evaluate", gated, "--data", "digits", "--sweep-budget", str(picture))
    spent = [row["macs"] for row in found["budgets"]]  # type: ignore[attr-defined]
    fixed = [row["macs"] for row in found["widths"]]  # type: ignore[attr-defined]
    assert spent == sorted(spent)
    assert len({round(macs) for macs in spent}) > 3
    assert fixed[0] <= spent[0] <= spent[-1] <= fixed[-1] + 1000  # the gate itself costs a little
    assert picture.read_text().startswith("<svg")
    assert width(tn.load(gated)) == 1.0


def test_every_top_k_asked_for_is_a_column(gated: str, capsys: pytest.CaptureFixture[str]):
    options = ["evaluate", gated, "--data", "digits", "--limit", "50", "--mode", "all"]
    every = result(capsys, *options, "--topk", "3,10")
    assert all(row["top1"] <= row["top3"] <= row["top10"] == 100 for row in every["widths"])  # type: ignore[attr-defined]
    assert not any("top5" in row for row in every["widths"])  # type: ignore[attr-defined]
    assert main([*options, "--topk", "3,10"]) == 0
    assert "top-1, %  top-3, %  top-10, %" in capsys.readouterr().out
    assert main(options) == 0
    assert "top-1, %  top-5, %  ms" in capsys.readouterr().out


def test_tables_of_many_widths_and_long_names_are_readable(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """All sub-networks of a DS-Net, and 30 classes with names as long as ImageNet's."""
    stages = (((8, 16), 1, 3, 2, "ds", False), (tuple(range(8, 64, 4)), 1, 3, 2, "ds", True))
    torch.manual_seed(0)
    model = tn.create_model("dsnet", num_classes=30, stem=(8, 16), stages=stages, gate_choices=list(range(14)))
    tn.save(model.eval(), tmp_path / "ds", metadata={"input_size": [3, 16, 16]})
    for number in range(30):
        place = tmp_path / "data" / "test" / (f"class {number}, " + "also known by another name, " * 5)
        place.mkdir(parents=True)
        (place / "image.png").write_bytes(png(number))
    shutil.copytree(tmp_path / "data" / "test", tmp_path / "data" / "train")
    command = ["evaluate", str(tmp_path / "ds"), "--data", f"folder:{tmp_path / 'data'}"]
    for mode, rows in (("all", 15), ("dynamic", 20)):
        assert main([*command, "--mode", mode]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 120
        assert len(lines) == (rows + 1 if mode == "all" else rows + 5)
    assert lines[3] == "images of the 20 classes that cost most by the width chosen:"
    assert all("…  " in line for line in lines[5:])
    decisions = result(capsys, *command, "--mode", "dynamic")["decisions"]
    assert len(decisions) == 30  # type: ignore[arg-type]


def test_budgets_below_a_million_are_read(gated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = ["evaluate", gated, "--data", "digits", "--limit", "30", "--sweep-budget", str(tmp_path / "sweep.svg")]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert re.match(r"budget \d{3}K +\d{3},\d{3} ", lines[1])


@pytest.mark.parametrize("option", [("--width", "4"), ("--width-index", "1")])
@pytest.mark.parametrize("network", ["wrn16_4", "wrn", "timm:resnet18"])
def test_a_width_is_never_an_argument_of_the_network(
    network: str, option: tuple[str, str], capsys: pytest.CaptureFixture[str]
):
    """WideResNets are built with a width, but have one only."""
    shape = [] if network == "wrn16_4" else ["--in-chans", "1"]
    assert main(["evaluate", network, *shape, "--data", "digits", *option]) == 2
    assert "has one width only" in capsys.readouterr().err


def test_recalibrate_changes_statistics_only(gated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = str(tmp_path / "fresh")
    found = result(
        capsys, "recalibrate", gated, "--data", "digits", "--output", place, "--widths", "0.5,1.0", "--batches", "3"
    )
    assert found["widths"] == ["0.5", "1"]
    assert found["batches"] == 3
    before, after = (tn.load(folder).state_dict() for folder in (gated, place))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("running_" in name or "num_batches" in name for name in changed)
    assert not any(name.endswith(("mean_0", "mean_2")) for name in changed), "0.25 and 0.75 keep theirs"


def test_recalibrate_uses_as_many_images_as_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Their order does not matter: the first norm sees the mean of all of them."""
    place = tn.save(tn.create_model("resnet20", in_chans=1, reduction=4), tmp_path / "plain")
    means = []
    for batch, seed, batches in (("256", "0", 4), ("1000", "1", 1)):
        options = ["--limit", "1000", "--batch-size", batch, "--seed", seed, "--output", str(tmp_path / batch)]
        found = result(capsys, "recalibrate", str(place), "--data", "digits", *options)
        assert (found["images"], found["batches"]) == (1000, batches)
        means.append(tn.load(tmp_path / batch).state_dict()["bn1.running_mean"])
    torch.testing.assert_close(*means, rtol=1e-4, atol=1e-5)


def test_search_finds_a_plain_network_within_the_budget(gated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = str(tmp_path / "found")
    options = ["--macs", "400K", "--output", place, "--population", "3", "--generations", "1", "--recalibration", "1"]
    found = result(capsys, "search", gated, "--data", "digits", "--limit", "60", *options)
    loaded = tn.load(place)
    assert tn.inspect(loaded, (1, 8, 8)).macs == found["macs"] <= 400e3  # type: ignore[operator]
    source = open_data("digits")
    assert loaded(torch.zeros(1, 1, 8, 8)).shape == (1, len(source.classes))
    assert Augmentation().for_source(source).mean == source.mean


MISTAKES = {
    "mode": (["evaluate", "--mode", "some"], "expected all, dynamic"),
    "width": (["evaluate", "--mode", "width=0.3"], "no width 0.3"),
    "budget out of reach": (["evaluate", "--mode", "dynamic", "--budget", "9G"], "out of reach: expected"),
    "budget of a fixed width": (["evaluate", "--mode", "all", "--budget", "1M"], "--budget goes with --mode dynamic"),
    "width of all": (["evaluate", "--mode", "all", "--width", "0.5"], "go with --mode width"),
    "two widths": (["evaluate", "--mode", "width=0.5", "--width-index", "0"], "go with --mode width"),
    "no number": (["evaluate", "--mode", "dynamic", "--budget", "much"], "--budget much: expected a number > 0"),
    "picture": (["evaluate", "--mode", "all", "--plot", "x.png"], "ends in .svg"),
    "search budget": (["search", "--macs", "1K", "--output", "OUT"], "out of reach: expected"),
    "search limit": (
        ["search", "--macs", "1M", "--limit", "0", "--output", "OUT"],
        "--limit 0: expected an integer from 1 to",
    ),
    "width and index": (["evaluate", "--width", "0.5", "--width-index", "1"], "give one of them"),
    "index": (["evaluate", "--width-index", "9"], "no width at index=9: expected 0.25, 0.5"),
    "recalibrate indices": (["recalibrate", "--width-indices", "0,x", "--output", "OUT"], "--width-indices 0,x"),
    "recalibrate widths": (["recalibrate", "--widths", "0.3", "--output", "OUT"], "no width 0.3"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_clear_line(name: str, gated: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (verb, *options), wanted = MISTAKES[name]
    options = [str(tmp_path / "out") if option == "OUT" else option for option in options]
    assert main([verb, gated, "--data", "digits", *options]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert wanted in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["evaluate", "search"])
def test_a_network_of_one_width(verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--mode", "all"] if verb == "evaluate" else ["--macs", "1M", "--output", str(tmp_path / "out")]
    assert main([verb, "resnet20", "--in-chans", "1", "--data", "digits", *options]) == 2
    assert "one width only" in capsys.readouterr().err


def test_a_slimmable_network_without_a_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = tn.convert(tn.create_model("resnet20", in_chans=1), "slimmable(widths=(0.5, 1.0))")
    tn.save(model.eval(), tmp_path / "slim")
    assert main(["evaluate", str(tmp_path / "slim"), "--data", "digits", "--mode", "dynamic"]) == 2
    assert "no gate" in capsys.readouterr().err
