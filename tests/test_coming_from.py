"""docs/coming-from: every command runs, on a few images, and prints the figures beside it; every option's hint is given."""

from __future__ import annotations

import hashlib
import pickle
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import thriftnet as tn
from images import png
from test_importer import stirred, theirs
from thriftnet.cli import VERBS, main
from thriftnet.cli.coming_from import hint, options_of_projects
from thriftnet.importing import dsnet, filter_basis, shiftresnet, soft_sharing, weight_sharing

PAGES = Path(__file__).parent.parent / "docs" / "coming-from"
PROJECTS = ("spin", "soft-sharing", "ds-net", "net-rl2", "shiftresnet")
CLASSES = ("cat", "dog", "owl")  # of the stand-in for ImageNet
# one step on a few images, with small networks where the commands leave the choice
TINY = {
    "train": {"--max-steps": "1", "--batch-size": "4", "--workers": "0", "--precision": "fp32"},
    "evaluate": {"--limit": "4"},
    "recalibrate": {"--limit": "8", "--batch-size": "4"},
}
SMALL = {
    "convmixer-imagenet": {"--dim": "8", "--depth": "4"},
    "ws-convmixer-imagenet": {"--dim": "8", "--depth": "4"},
    "ds-net-imagenet": {"--cooldown-epochs": "0"},
}
# files of the authors: network, arguments, layout, keys around the tensors
FILES: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "ConvMixer.pyth": ("convmixer", {"dim": 8, "depth": 4, "num_classes": 3}, weight_sharing.layout, "model_state"),
    "WS-ConvMixer.pyth": ("ws_convmixer", {"dim": 8, "depth": 4, "num_classes": 3}, weight_sharing.layout, "model_state"),
    "WS-strided-ConvMixer.pyth": (
        "ws_convmixer",
        {"dim": 8, "depth": 4, "num_classes": 3, "mapping": "strided"},
        weight_sharing.layout,
        "model_state",
    ),
    "snapshots/swrn28-10-6/model_best.pth.tar": (
        "swrn",
        {"depth": 16, "width": 1, "templates": 2},
        soft_sharing.layout,
        "state_dict",
    ),
    "supernet.pth.tar": ("slimmable_mobilenetv1", {"num_classes": 3}, dsnet.layout, "state_dict"),
    "CIFAR10-ResNet56_DoubleShared.pth": ("resnet56_double_shared", {}, filter_basis.layout, "net_state_dict"),
    "CIFAR100-ResNet34_SingleShared.pth": ("cifar_resnet34_single_shared", {}, filter_basis.layout, "net_state_dict"),
    "ILSVRC-ResNet34_DoubleShared.pth": (
        "resnet34_double_shared",
        {"num_classes": 3},
        filter_basis.layout,
        "net_state_dict",
    ),
    "ILSVRC-MobileNetV2_Shared.pth": ("mobilenetv2_shared", {"num_classes": 3}, filter_basis.layout, "net_state_dict"),
    "checkpoint/resnet20_cifar100.t7": (
        "resnet20_projection",
        {"num_classes": 100},
        shiftresnet.layout,
        "net",
    ),
    "checkpoint/shiftresnet20_3.0_cifar100.t7": ("shiftresnet20_e3", {"num_classes": 100}, shiftresnet.layout, "net"),
    "checkpoint/resnet20_2.8_block_cifar100.t7": ("resnet20_block28", {"num_classes": 100}, shiftresnet.layout, "net"),
}


def commands(page: str) -> list[tuple[str, list[str]]]:
    """Our command and its figures, for each row of a page."""
    text = (PAGES / f"{page}.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| `((?:torchrun|thriftnet) [^|]*)` \|([^|]*)\|$", text, re.MULTILINE)
    return [(command, [figure.strip() for figure in figures.split(";") if figure.strip()]) for command, figures in rows]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands name: CIFAR, ImageNet and files of the authors, all with a few images."""
    monkeypatch.chdir(tmp_path)
    for kind in ("CIFAR10", "CIFAR100"):
        stub_of_cifar(tmp_path / "data", monkeypatch, kind)
    for split in ("train", "val"):
        for label, name in enumerate(CLASSES):
            folder = tmp_path / "imagenet" / split / name
            folder.mkdir(parents=True)
            for i in range(4):
                (folder / f"{i}.png").write_bytes(png(10 * label + i, 48, 40))
    return tmp_path


def stub_of_cifar(root: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A few images in the layout of CIFAR, with md5 sums to match."""
    from torchvision import datasets

    made = getattr(datasets, kind)
    count = 10 if kind == "CIFAR10" else 100
    folder = root / made.base_folder
    folder.mkdir(parents=True)
    for number, (name, _) in enumerate(made.train_list + made.test_list):
        data = np.random.default_rng(number).integers(0, 256, (2 * count, 3072), dtype=np.uint8)
        labels = [i % count for i in range(2 * count)]
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels" if count == 10 else "fine_labels": labels}))
    (folder / made.meta["filename"]).write_bytes(pickle.dumps({str(made.meta["key"]): [f"class{i}" for i in range(count)]}))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(made, "train_list", [[name, sums[name]] for name, _ in made.train_list])
    monkeypatch.setattr(made, "test_list", [[name, sums[name]] for name, _ in made.test_list])
    monkeypatch.setattr(made, "meta", {**made.meta, "md5": sums[made.meta["filename"]]})


@pytest.mark.parametrize("page", PROJECTS)
def test_every_command_runs_and_prints_its_figures(page: str, place: Path, capsys: pytest.CaptureFixture[str]):
    rows = commands(page)
    assert rows
    for path, (name, kwargs, layout, around) in FILES.items():
        if any(path in command for command, _ in rows):
            torch.manual_seed(0)
            state = theirs(stirred(tn.create_model(name, **kwargs)), layout)
            (place / path).parent.mkdir(parents=True, exist_ok=True)
            torch.save({around: {f"module.{key}": tensor for key, tensor in state.items()}}, place / path)
    for command, figures in rows:
        _, verb, *arguments = shlex.split(command.partition("-m ")[2] or command)
        recipe = arguments[arguments.index("--recipe") + 1] if "--recipe" in arguments else ""
        tiny = {**TINY.get(verb, {}), **SMALL.get(recipe, {})}
        given = {word.partition("=")[0] for word in arguments}
        code = main([verb, *arguments, *(word for pair in tiny.items() if pair[0] not in given for word in pair)])
        shown = capsys.readouterr()
        assert code == 0, f"{command}\n{shown.err}"
        assert [figure for figure in figures if figure not in shown.out] == [], f"{command}\n{shown.out}"


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize(
    "option", ["--bank-size", "--lambdaR", "--dataset", "--learning_rate", "--visible_device", "--evaluate"]
)
def test_every_verb_knows_the_authors_options(verb: str, option: str, capsys: pytest.CaptureFixture[str]):
    """In place of a close match by spelling."""
    first = {"train": ["--recipe", "digits"], "demo": []}.get(verb, ["resnet20"])
    assert main([verb, *first, option, "8"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert hint(option)
    assert hint(option) in error


def test_options_named_in_hints_exist():
    """Each option that a hint recommends is one of a verb, a recipe's field, or an argument of a network."""
    from thriftnet.cli.train import FIELDS
    from thriftnet.models import MODELS, model_kwargs
    from thriftnet.train.recipe import field_names, last_names

    known = {f"--{name.replace('_', '-')}" for name in {*last_names(), *field_names()}}
    known |= {f"--{name.replace('_', '-')}" for model in MODELS for name in model_kwargs(model)}
    known |= {
        *FIELDS,
        "--recipe",
        "--data",
        "--output",
        "--device",
        "--nproc-per-node",
        "--mode",
        "--optimizer",
        "--schedule",
    }
    known |= {"--stage", "--stage.options.teacher", "--stage.options.ensemble"}
    named = {
        word
        for options in options_of_projects().values()
        for text in options.values()
        for word in re.findall(r"--[\w.-]+", text)
    }
    assert sorted(named - known) == []
