"""The verbs `models` and `count` on the zoo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import thriftnet as tn
from thriftnet.cli import main
from thriftnet.measure.as_published import published_flops
from thriftnet.models import MODELS


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 0
    return capsys.readouterr().out


def read(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """The last line, which is JSON."""
    return json.loads(run(capsys, *arguments, "--json").splitlines()[-1])


def listed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    return [entry["name"] for entry in read(capsys, "models", *arguments)["models"]]


def test_listing_the_zoo_is_fast_and_loads_no_torch():
    code = """
import sys
from thriftnet.cli import main
assert main(["models"]) == main(["models", "shift*", "--json"]) == 0
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert all(f"\n{name} " in f"\n{done.stdout}" for name in MODELS)


def test_all_that_is_known_of_a_network(capsys: pytest.CaptureFixture[str]):
    (entry,) = read(capsys, "models", "shiftresnet20_e3")["models"]
    assert (entry["params"], entry["macs"], entry["technique"]) == (95642, 16433792, "shift")
    assert entry["paper"].startswith("Wu et al., Shift")
    assert entry["published"]["flops"] == "16,581,248"
    assert entry["published"]["top1"] == {"CIFAR-10": 89.56, "CIFAR-100": 65.83}
    assert "MACs + 147,456" in entry["published"]["note"]
    page = run(capsys, "models", "shiftresnet20_e3")
    row = page.splitlines()[1]
    assert all(part in row for part in ("95,642", "16,433,792", "16,581,248", "CIFAR-100 65.83", "Wu et al. 2018", "1, 2"))
    assert "\n  1  published FLOPs = MACs + 147,456" in page
    assert "CVPR 2018" in page


def test_top_5_accuracies_stand_beside_top_1(capsys: pytest.CaptureFixture[str]):
    (entry,) = read(capsys, "models", "mobilenetv2_shared")["models"]
    assert entry["published"]["top5"] == {"ImageNet": 90.66}
    assert "ImageNet 72.8 (91.07)" in run(capsys, "models", "resnet34_double_shared")
    assert "top-5 91.46 %" in MODELS["resnet34_double_shared"].published.note
    published = MODELS["dsnet"].published
    assert published == MODELS["slimmable_mobilenetv1"].published
    assert published.top1.keys() == published.top5.keys()
    assert list(published.top5.values())[::13] == [89.4, 92.0]
    assert "sub-network 0 70.1 (89.4), 1 70.4 (89.6)," in run(capsys, "models", "dsnet")


def test_every_difference_is_explained_below_the_table(capsys: pytest.CaptureFixture[str]):
    lines = run(capsys, "models").splitlines()
    notes = {line.split(maxsplit=1)[0]: line.split(maxsplit=1)[1] for line in lines[lines.index("notes") + 1 :]}
    for name, entry in MODELS.items():
        (row,) = [line for line in lines if line.split()[:1] == [name]]
        for note in filter(None, (entry.published.note, entry.note)):
            (number,) = [key for key, text in notes.items() if text == note]
            assert number in row.replace(",", " ").split()


def test_filters(capsys: pytest.CaptureFixture[str]):
    assert listed(capsys, "swrn*", "--technique", "SoftSharing") == listed(capsys, "swrn*")
    assert listed(capsys, "--technique", "shift", "--paper", "wu et al.") == listed(capsys, "shift*")
    assert "resnet20" in listed(capsys, "--technique", "plain")
    assert {MODELS[name].technique for name in listed(capsys, "--technique", "plain")} == {""}
    assert {MODELS[name].paper for name in listed(capsys, "--paper", "ICLR 2019")} >= {MODELS["swrn"].paper}


def test_numbers_in_names_are_sorted_as_numbers(capsys: pytest.CaptureFixture[str]):
    names = [name for name in listed(capsys, "shiftresnet*") if "_" not in name]
    assert names == ["shiftresnet20", "shiftresnet56", "shiftresnet110"]


def test_authors_spellings_are_found(capsys: pytest.CaptureFixture[str]):
    assert listed(capsys, "ShiftResNet56*")[0] == "shiftresnet56"
    assert listed(capsys, "shiftresnet20_3.0") == ["shiftresnet20_e3"]


def test_count_compares_with_the_plain_network(capsys: pytest.CaptureFixture[str]):
    *_, plain, published = run(capsys, "count", "shiftresnet20", "--expansion", "3").splitlines()
    assert plain == (
        "the plain network that the paper starts from, resnet20_projection: 272,474 parameters: 2.85x fewer; "
        "40,813,184 MACs: 2.48x fewer"
    )
    assert published.startswith("as the paper counts: 16,581,248 FLOPs (MACs, with the stem counted as 3 x 3 filters")
    assert published.endswith("the plain network 40,960,640")
    result = read(capsys, "count", "shiftresnet20", "--expansion", "3")
    assert (result["params"], result["macs"]) == (95642, 16433792)
    against = result["against"]
    assert (against["model"], against["params"], against["macs"]) == ("resnet20_projection", 272474, 40813184)
    assert round(against["params_reduction"], 2) == 2.85


def test_count_against_another_network(capsys: pytest.CaptureFixture[str]):
    *_, against, last = run(capsys, "count", "shiftresnet20", "--expansion", "9", "--against", "resnet20").splitlines()
    assert last.startswith("as the paper counts: 48,038,528 FLOPs")
    assert against == "against resnet20: 269,722 parameters: 1.03x more; 40,551,040 MACs: 1.18x more"
    both = read(capsys, "count", "shiftresnet20", "--num-classes", "100", "--against", "shiftresnet20")["against"]
    assert both["params_reduction"] == both["macs_reduction"] == 1


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        (["shiftresnet20", "--num-classes", "100"], ("resnet20_projection", {"num_classes": 100})),
        (["depthwiseresnet20", "--reduction", "0.38"], ("resnet20_projection", {"reduction": 1.0})),
        (["resnet20_block28"], ("resnet20_projection", {})),
        (["swrn", "--depth", "16", "--width", "1", "--templates", "2"], ("wrn", {"depth": 16, "width": 1})),
        (["swrn16_1_2", "--in-chans", "1", "--input-size", "1,16,16"], ("wrn", {"depth": 16, "width": 1, "in_chans": 1})),
    ],
)
def test_the_plain_network_is_for_the_same_task(
    capsys: pytest.CaptureFixture[str], arguments: list[str], plain: tuple[str, dict[str, Any]]
):
    against = read(capsys, "count", *arguments)["against"]
    assert (against["model"], against["kwargs"]) == plain
    assert against["params"] == sum(p.numel() for p in tn.create_model(plain[0], **plain[1]).parameters())


def test_plain_networks_are_compared_with_nothing(capsys: pytest.CaptureFixture[str]):
    assert "against" not in read(capsys, "count", "resnet20")
    assert "against" not in read(
        capsys, "count", "torch.nn:Conv2d", "--in_channels=3", "--out_channels=8", "--kernel_size=3", "--input-size=3,8,8"
    )


def test_a_saved_network_is_compared_too(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    folder = tn.save(tn.create_model("shiftresnet20", expansion=3), tmp_path / "m")
    assert "from, resnet20_projection: 272,474 parameters: 2.85x fewer" in run(capsys, "count", str(folder))


def in_units(published: str) -> tuple[float, float]:
    """A published count and its last digit's half, doubled where a count in G was rounded before it was doubled."""
    if not published.endswith("G"):
        return float(published.replace(",", "")), 0.5
    return 1e9 * float(published[:-1]), 2 * 0.005e9


@pytest.mark.parametrize(
    "name", [name for name, entry in MODELS.items() if entry.published.flops and "to" not in entry.published.flops]
)
def test_flops_are_counted_as_the_paper_does(name: str):
    entry = MODELS[name]
    found = published_flops(tn.inspect(tn.create_model(name), entry.input_size), entry.paper)
    stated, half = in_units(entry.published.flops)
    assert found is not None
    assert abs(found[0] - stated) <= half + 1


@pytest.mark.parametrize(
    ("arguments", "stated"),
    [
        (["cifar_resnet34_single_shared", "--shared-rank", "8"], "0.79G"),
        (["cifar_resnet34_single_shared", "--shared-rank", "32"], "1.55G"),
        (["resnet32_single_shared", "--shared-rank", "8"], "0.10G"),
        (["shiftresnet20", "--expansion", "3", "--num-classes", "0"], "16580608"),
    ],
)
def test_published_flops_of_other_arguments(capsys: pytest.CaptureFixture[str], arguments: list[str], stated: str):
    wanted, half = in_units(stated)
    found = read(capsys, "count", *arguments)["published_flops"]
    assert abs(found["flops"] - wanted) <= half + 1


def test_a_paper_that_states_no_flops_has_no_such_line(capsys: pytest.CaptureFixture[str]):
    assert published_flops(tn.inspect(tn.create_model("resnet20")), MODELS["dsnet"].paper) is None
    assert "as the paper counts" not in run(capsys, "count", "swrn16_1_2")


@pytest.mark.parametrize("name", [name for name, entry in MODELS.items() if entry.baseline])
def test_every_baseline_is_a_plain_network(name: str):
    entry = MODELS[name]
    assert not MODELS[entry.baseline].technique
    assert set(entry.baseline_kwargs) <= set(tn.models.model_kwargs(entry.baseline))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["models", "--technique", "soft-sharin"], "did you mean 'soft-sharing'"),
        (["models", "--technique", ""], "--technique is empty"),
        (["models", "--paper", "Nobody et al."], "unknown paper 'Nobody et al.'"),
        (["models", "swrn*", "--technique", "shift"], "with --technique shift"),
        (["models", "swrm*"], "no model matches"),
        (["models", "--tecnique", "shift"], "did you mean '--technique'"),
        (["count", "shiftresnet20", "--against", "resnet21"], "did you mean 'resnet"),
        (["count", "shiftresnet20", "--expansion", "0"], "expected a number > 0"),
    ],
)
def test_wrong_use_is_one_line(capsys: pytest.CaptureFixture[str], arguments: list[str], expected: str):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1
    assert expected in captured.err
