"""What a network knows of its data passes through every verb and function that takes and gives one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import thriftnet as tn
from images import class_folders
from thriftnet.cli import VERBS, main
from thriftnet.core.provenance import DataFacts, add_data_facts, data_facts

FACTS = DataFacts(
    input_size=(3, 16, 16),
    normalisation={"mean": (0.1, 0.7, 0.4), "std": (0.9, 0.3, 0.5)},
    class_names=("cat", "dog"),
    resize=20,
    crop_pct=0.8,
    eval_interpolation="nearest",
)
SLIM = "slimmable(widths=(0.5, 1.0))"
SOFT = "soft-sharing(templates=2, init='random')"


def network(*steps: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = tn.create_model("resnet20", num_classes=2)
    add_data_facts(model, FACTS.to_dict())
    for step in steps:
        model = tn.convert(model, step)
    return model.eval()


FUNCTIONS: dict[str, Callable[[Path], nn.Module]] = {
    "convert": lambda _: network(SOFT),
    "fold": lambda _: tn.fold(network(SOFT)),
    "freeze": lambda _: tn.freeze(network(SLIM), 0.5),
    "add_gate": lambda _: tn.add_gate(network(SLIM)),
    "fold_recurrence": lambda _: tn.fold_recurrence(network(SOFT), threshold=0.01),
    "pack": lambda _: tn.pack(network(), input_size=(3, 16, 16)),
    "save and load": lambda place: tn.load(tn.save(network(SOFT), place / "m")),
    "recalibrate": lambda _: recalibrated(network(SLIM)),
    "open_model": lambda place: tn.open_model(str(tn.save(network(), place / "m"))),
}


def recalibrated(model: nn.Module) -> nn.Module:
    tn.recalibrate(model, [torch.randn(4, 3, 16, 16)])
    return model


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functions_keep_it(function: str, tmp_path: Path):
    assert data_facts(FUNCTIONS[function](tmp_path)) == FACTS


def test_other_classes_have_other_names():
    changed = data_facts(tn.replace_head(network(), 5))
    assert changed.class_names is None
    assert changed.normalisation == FACTS.normalisation


# verb -> the network it is given, its arguments, and whether the function stays the same
WRITERS: dict[str, tuple[list[str], list[str], bool]] = {
    "convert": ([], ["--technique", "soft-sharing(templates=6)", "--select", r"^layer1\.[0-2]\.conv"], True),
    "fold": ([SOFT], [], True),
    "compress": (
        [],
        ["--technique", "soft-sharing(templates=2)", "--data", "folder:data", "--epochs", "1", "--rates", "0.01"],
        False,
    ),
    "similarity": ([SOFT], ["--threshold", "0.01"], False),
    "recalibrate": ([SLIM], ["--data", "folder:data", "--batch-size", "4"], False),
    "search": (
        [SLIM],
        ["--macs", "5M", "--data", "folder:data", "--population", "2", "--generations", "1", "--recalibration", "4"],
        False,
    ),
    "train": ([], ["--recipe", "digits", "--data", "folder:data", "--max-steps", "1", "--batch-size", "4"], False),
}
READERS = {
    "demo",
    "models",
    "count",
    "plan",
    "suggest",
    "evaluate",
    "recipes",
    "bench",
}  # verbs that write no network of the user's
IMPORTS = {"import"}  # facts come from the file's system: tests/test_importer.py


def test_every_verb_is_covered():
    assert set(VERBS) == {*WRITERS, *READERS, *IMPORTS}


@pytest.mark.parametrize("verb", WRITERS)
def test_verbs_keep_it(verb: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The evaluation before is the one after, where the verb does not change the function."""
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "data" / "train")
    class_folders(tmp_path / "data" / "val")
    steps, arguments, same = WRITERS[verb]
    tn.save(network(*steps), tmp_path / "before")
    model = ["--model", "before"] if verb == "train" else ["before"]
    if verb == "train":
        arguments = [
            *arguments,
            "--image-size",
            "16",
            "--crop-padding",
            "0",
            "--mean",
            "[0.1, 0.7, 0.4]",
            "--std",
            "[0.9, 0.3, 0.5]",
        ]
        arguments += ["--resize", "20", "--crop-pct", "0.8", "--eval-interpolation", "nearest"]
    assert main([verb, *model, *arguments, "--output", "after"]) == 0, capsys.readouterr().err
    assert data_facts(tn.load("after")) == FACTS
    losses = []
    for folder in ("before", "after"):
        capsys.readouterr()
        assert main(["evaluate", folder, "--data", "folder:data", "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out.splitlines()[-1])["loss"])
    if same:
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
