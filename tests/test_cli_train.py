"""`thriftnet train` on the command line: what it prints, how it resumes, and what it refuses."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import thriftnet as tn
from images import class_folders
from thriftnet.cli import main
from thriftnet.cli.train import Bar
from thriftnet.train.loop import Progress
from training import in_children, limit_files

KEYS = {
    "run",
    "top1",
    "top5",
    "loss",
    "params",
    "world_size",
    "steps",
    "weights_sha256",
    "seconds",
    "resumed_from",
    "notes",
    "facts",
}
SHORT = ["--data", "digits", "--device", "cpu", "--trackers", "[]", "--batch-size", "64"]


def train(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, object]:
    assert main(["train", *arguments, "--json"]) == 0
    result: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.keys() == KEYS
    return result


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["train", *arguments]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_a_converted_network_trains_resumes_and_is_evaluated(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = str(tmp_path / "run")
    start = ["--model", "resnet20", "--technique", "soft-sharing(templates=2)", "--output", place, "--seed", "1", *SHORT]
    first = train(capsys, *start, "--max-steps", "5")
    assert first["steps"] == 5
    assert first["params"] == 122010
    again = train(capsys, *start, "--max-steps", "5")  # finished: measured again, not trained
    assert again["weights_sha256"] == first["weights_sha256"]
    assert again["resumed_from"] is not None
    longer = train(capsys, *start, "--max-steps", "20")
    assert longer["steps"] == 20
    assert any("max_steps was 5, is 20" in str(note) for note in longer["notes"])  # type: ignore[union-attr]
    assert main(["evaluate", place, "--data", "digits", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert measured["top1"] == pytest.approx(longer["top1"])
    assert measured["images"] == 450
    assert main(["count", f"{place}/model", "--input-size", "1,8,8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params"] == 122010
    assert main(["fold", f"{place}/model", "--output", str(tmp_path / "folded"), "--input-size", "1,8,8"]) == 0
    assert isinstance(tn.load(tmp_path / "folded"), tn.load(f"{place}/model").__class__)


def test_an_own_recipe_and_kwargs_of_the_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "mine.yaml").write_text(
        "model: shiftresnet20\ndata: {batch_size: 64}\noptimizer:\n  lr: 5e-2\nmax_steps: 2\nrun: {trackers: []}\n"
    )
    place = str(tmp_path / "run")
    options = ["--recipe", str(tmp_path / "mine.yaml"), "--data", "digits", "--output", place, "--expansion", "2"]
    result = train(capsys, *options, "--augmentation.crop_padding", "1", "--device", "cpu")
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["recipe"]["optimizer"]["lr"] == 0.05
    assert run["recipe"]["augmentation"]["crop_padding"] == 1
    wanted = tn.create_model("shiftresnet20", expansion=2, in_chans=1)
    assert result["params"] == tn.inspect(wanted, (1, 8, 8)).params


def test_several_processes_started_by_torchrun(tmp_path: Path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "thriftnet"]
    command += ["train", "--model", "resnet20", "--output", str(tmp_path / "run"), "--max-steps", "2", *SHORT, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(printed) == 1
    assert json.loads(printed[0])["world_size"] == 2
    assert sum("left" in line for line in done.stderr.splitlines() if line.startswith("epoch ")) == 1, "the main process's"


EPOCH = r"epoch {}: train loss \d+\.\d{{3}}, top-1 \d+\.\d\d %, lr [\d.e-]+, [\d,]+ images/s, \d:\d\d:\d\d left"


def test_each_epoch_is_a_line_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command = [
        "train",
        "--model",
        "resnet20",
        "--epochs",
        "2",
        "--output",
        str(tmp_path / "run"),
        *SHORT,
        "--batch-size",
        "512",
    ]
    assert main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert len(lines) == 2
    assert all(re.fullmatch(EPOCH.format(f"{number}/2"), line) for number, line in enumerate(lines, 1)), lines
    assert lines[1].endswith(" 0:00:00 left")
    assert len(captured.out.splitlines()) == 1


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


STEPS = (
    Progress(1, 2, 0.5, 64),
    Progress(2, 2, 1.0, 64, {"train_loss": 0.25, "lr": 0.05, "seconds": 1.0, "images_per_second": 128.0}),
)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_on_a_terminal_each_stage_leaves_its_bar(rank: str, monkeypatch: pytest.MonkeyPatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("COLUMNS", "120")
    with Bar() as bar:
        for progress in STEPS * 2:  # two stages of a recipe
            bar.on_progress(progress)
    text = terminal.getvalue()
    if rank == "1":
        assert not text
        return
    *_, first, second = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text).strip().splitlines()
    for line in (first, second):
        assert line.strip().startswith("epoch 1.0 ")
        assert "2/2" in line
        assert "train loss 0.250" in line
    assert "left" not in text


def test_lines_of_a_named_training_and_without_accuracy(capsys: pytest.CaptureFixture[str]):
    with Bar() as bar:
        bar.start("shift")
        for progress in STEPS:
            bar.on_progress(progress)
    assert capsys.readouterr().err == "shift            epoch 1/1: train loss 0.250, lr 0.05, 128 images/s, 0:00:00 left\n"


MISTAKES = {
    "unknown recipe": (["--recipe", "fast-cifra"], r"fast-cifra.*fast-cifar"),
    "unknown field": (["--lrr", "0.1"], r"lrr.*lr"),
    "no number": (["--lr", "fast"], r"lr='fast'"),
    "negative": (["--lr", "-1"], r"lr=-1.*expected a number > 0"),
    "unknown schedule": (["--schedule", "cosin"], r"schedule.name='cosin'.*cosine"),
    "unknown model": (["--model", "resnet21"], r"resnet21.*resnet20"),
    "unknown technique": (["--technique", "soft-shering"], r"soft-shering.*soft-sharing"),
    "unknown optimizer": (["--optimizer", "sgdd"], r"sgdd.*sgd"),
    "unknown stage": (["--stage", "supper"], r"supper"),
    "slimmable stage without widths": (["--stage", "widths"], r"slimmable"),
    "unknown augmentation": (["--augmentation.flop", "true"], r"flop.*flip"),
    "both lengths": (["--epochs", "1", "--max-steps", "1"], r"either --epochs or --max-steps"),
    "steps and minutes": (["--minutes", "1", "--max-steps", "1"], r"either --max-steps or --minutes"),
    "no minutes": (["--minutes", "0"], r"minutes=0.*: expected a number > 0"),
    "patience for nothing": (
        ["--patience", "1", "--select-on", "last"],
        r"patience=1 counts evaluations on held-out images",
    ),
    "mistyped option": (["--epoch", "3"], r"unknown option '--epoch': did you mean '--epochs'"),
    "mistyped option of a foreign network": (
        ["--model", "training:Net", "--epoch", "3"],
        r"got an unexpected keyword argument 'epoch'. Did you mean --epochs",
    ),
    "mistyped group": (["--optimzer.lr", "3"], r"unknown recipe field 'optimzer.lr': did you mean 'optimizer.lr'"),
    "mistyped field": (["--optimizer.lrr", "3"], r"unknown field of optimizer 'lrr': did you mean 'lr'"),
    "one technique too many": (["--technique", "none", "--technique", "shift"], r"unknown technique 'none'"),
    "class count": (["--num-classes", "7"], r"10 classes.*num_classes=10"),
    "unknown device": (["--device", "tpu"], r"tpu.*cpu or cuda"),
    "missing teacher": (["--teacher", "nowhere/at/all"], r"nowhere/at/all"),
    "missing data": (["--data", "folder:/nowhere/at/all"], r"/nowhere/at/all"),
    "unknown data": (["--data", "digit"], r"digit.*digits"),
    "batch size": (["--batch-size", "7", "--accumulate", "2"], r"batch_size=7 .* multiple of 2"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_gives_one_clear_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options, wanted = MISTAKES[name]
    line = refused(capsys, *SHORT, "--model", "resnet20", "--output", str(tmp_path / "run"), *options)
    assert re.search(wanted, line), line
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_converted_folder_recovers(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """From the documents: the recipe's own technique would share a second time, where there is nothing left to share."""
    plain, small = str(tmp_path / "plain"), str(tmp_path / "small")
    tn.save(tn.create_model("resnet20", num_classes=10, in_chans=1), plain)
    assert main(["convert", plain, "--technique", "soft-sharing(templates=1)", "--output", small]) == 0
    capsys.readouterr()
    options = ["--recipe", "convert-and-recover", "--model", small, "--teacher", plain, *SHORT, "--max-steps", "1"]
    options += ["--limit", "200", "--precision", "fp32"]
    assert main(["train", *options, "--output", str(tmp_path / "run"), "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("note: the network is converted already"), "before the first step"
    result = json.loads(captured.out)
    assert result["params"] == tn.inspect(tn.load(small), (1, 8, 8)).params
    assert any("is not applied on top. --technique" in str(note) for note in result["notes"])
    result = train(capsys, *options, "--output", str(tmp_path / "again"), "--technique", "none")
    assert not any("on top" in str(note) for note in result["notes"])  # type: ignore[union-attr]


def test_another_training_in_the_folder_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = ["--output", str(tmp_path / "run"), "--max-steps", "1", *SHORT]
    train(capsys, *place)
    assert "lr was 0.1, is 0.2" in refused(capsys, *place, "--lr", "0.2")
    assert "holds a training already" in refused(capsys, *place, "--resume", "none")
    assert "nowhere" in refused(capsys, *place, "--resume", str(tmp_path / "nowhere"))
    (tmp_path / "run" / "run.json").write_text("[]")
    assert "run.json is damaged" in refused(capsys, *place)


def test_a_corrupt_image_is_named_or_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for split in ("train", "val"):
        class_folders(tmp_path / "data" / split, per_class=12)
    broken = tmp_path / "data" / "train" / "cat" / "3.png"
    broken.write_bytes(b"no image")
    options = ["--data", f"folder:{tmp_path / 'data'}", "--model", "resnet20", "--batch-size", "8", "--max-steps", "4"]
    options += ["--device", "cpu", "--trackers", "[]", "--workers", "0"]
    options += ["--validation", "0.2", "--augmentation.image_size", "16"]
    assert "3.png" in refused(capsys, *options, "--output", str(tmp_path / "run"))
    result = train(capsys, *options, "--output", str(tmp_path / "other"), "--on-corrupt", "skip")
    assert any("3.png" in str(note) for note in result["notes"])  # type: ignore[union-attr]


def test_two_trainings_in_one_folder_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from thriftnet.train.run_folder import RunFolder

    place = tmp_path / "run"
    with RunFolder(place, is_main=True).locked():
        line = refused(capsys, *SHORT, "--output", str(place), "--max-steps", "1")
    assert f"another training runs in {place} (process {os.getpid()})" in line
    assert not (place / "run.json").exists()
    train(capsys, *SHORT, "--output", str(place), "--max-steps", "1")


def test_the_folder_of_a_network_is_no_place_for_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = tn.save(tn.create_model("resnet20", reduction=4), tmp_path / "m")
    before = sorted(path.name for path in place.iterdir())
    assert "is a model folder, no place for a run" in refused(capsys, *SHORT, "--output", str(place))
    assert sorted(path.name for path in place.iterdir()) == before


def test_a_full_disk_gives_one_line_and_loses_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Files of at most 700 KiB: the first checkpoint cannot be written; without the limit the same command goes through."""
    command = ["train", "--output", str(tmp_path / "run"), "--max-steps", "4", "--checkpoint-every", "2", *SHORT]

    def work(_: int) -> None:
        limit_files(700 << 10)
        os._exit(main(command))

    assert in_children(work) == [2]
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("thriftnet train:")]
    assert len(lines) == 1
    assert "cannot write" in lines[0]
    assert "Last good checkpoint: none" in lines[0]
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert main(command) == 0


def test_fewer_steps_than_were_taken_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    train(capsys, *SHORT, "--output", str(tmp_path), "--max-steps", "3")
    assert "trained for 3 steps already, and 2 are asked for" in refused(
        capsys, *SHORT, "--output", str(tmp_path), "--max-steps", "2"
    )


def test_skipped_steps_are_said_and_the_result_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = ["--output", str(tmp_path), "--max-steps", "4", "--lr", "1e9", "--on-nan", "skip"]
    result = train(capsys, *SHORT, *options)
    assert any("steps were skipped" in str(note) for note in result["notes"])  # type: ignore[union-attr]


def test_a_run_is_a_network_for_every_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    place = str(tmp_path / "run")
    train(capsys, *SHORT, "--output", place, "--max-steps", "1", "--technique", "shift")
    for arguments in (
        ["count", place, "--input-size", "1,8,8"],
        ["fold", place, "--output", str(tmp_path / "folded"), "--input-size", "1,8,8"],
        ["plan", place, "--technique", "weight-sharing"],
        ["train", "--model", place, "--teacher", place, *SHORT, "--output", str(tmp_path / "next"), "--max-steps", "1"],
    ):
        assert main(arguments) == 0, arguments


def test_a_network_of_ones_own_is_evaluated_with_its_plain_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "own_networks.py").write_text(
        "from torch import nn\n\n\ndef small():\n"
        "    convs = [nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)]\n"
        "    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    place = str(tmp_path / "run")
    options = ["--model", "own_networks:small", "--technique", "soft-sharing(templates=1)", "--max-steps", "1"]
    trained = train(capsys, *SHORT, "--output", place, *options)
    assert main(["evaluate", place, "--data", "digits", "--plain", "own_networks:small", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] == pytest.approx(trained["top1"])
