"""Model folders: bit-exact, whole or not at all, and never trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import thriftnet as tn
from thriftnet.errors import CheckpointError
from thriftnet.interop import checkpoints

STEPS = [
    ["weight-sharing(rate=2)"],
    ["weight-sharing(fusion='channel_weighted_mean')"],
    ["soft-sharing(templates=2)"],
    ["filter-basis(shared_rank=4, bases=2)"],
    ["shift(expansion=2.0)"],
    ["slimmable(widths=(0.5, 1.0))"],
    ["soft-sharing(templates=2)", "slimmable(widths=(0.5, 1.0))"],
    ["shift", "weight-sharing"],
]


def made(steps: list[str], dtype: torch.dtype = torch.float32) -> nn.Module:
    model: nn.Module = tn.create_model("resnet20", in_chans=1).to(dtype)
    for step in steps:
        model = tn.convert(model, step)
    return model.eval()


@pytest.mark.parametrize("steps", STEPS, ids=" + ".join)
@pytest.mark.parametrize("folded", [False, True], ids=["converted", "folded"])
def test_a_network_comes_back_bit_by_bit(steps: list[str], folded: bool, tmp_path: Path):
    model = made(steps)
    model = tn.fold(model) if folded else model
    loaded = tn.load(tn.save(model, tmp_path / "model"))
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(loaded(images), model(images))
    assert len(list(loaded.parameters())) == len(list(model.parameters()))
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert len({t.untyped_storage().data_ptr() for t in stored.values()}) == len(stored)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


def test_a_frozen_width_comes_back(tmp_path: Path):
    frozen = tn.freeze(made(["slimmable(widths=(0.5, 1.0))"]), 0.5)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(tn.load(tn.save(frozen, tmp_path / "m"))(images), frozen(images))


def test_float64_stays_float64(tmp_path: Path):
    model = made(["soft-sharing(templates=2)"], torch.float64)
    images = torch.randn(2, 1, 8, 8, dtype=torch.float64)
    assert torch.equal(tn.load(tn.save(model, tmp_path / "m"))(images), model(images))


def test_implicit_recurrence_comes_back(tmp_path: Path):
    model = made(["soft-sharing(templates=2)"])
    tied = tn.fold_recurrence(model, threshold=0.2)
    images = torch.randn(2, 1, 8, 8)
    loaded = tn.load(tn.save(tied, tmp_path / "m"))
    assert torch.equal(loaded(images), tied(images))
    assert len(list(loaded.parameters())) == len(list(tied.parameters())) < len(list(model.parameters()))


def test_a_network_outside_the_zoo_needs_its_plain_form(tmp_path: Path):
    def plain() -> nn.Module:
        return nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)])

    model = tn.convert(plain(), "soft-sharing(templates=2)").eval()
    folder = tn.save(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"Sequential.*load\(folder, model="):
        tn.load(folder)
    images = torch.randn(1, 4, 8, 8)
    assert torch.equal(tn.load(folder, model=plain())(images), model(images))
    with pytest.raises(CheckpointError, match="another network"):
        tn.load(folder, model=nn.Sequential(nn.Linear(3, 3)))


def test_saving_again_replaces_the_folder(tmp_path: Path):
    tn.save(made(["shift"]), tmp_path / "m")
    tn.save(made(["soft-sharing(templates=2)"]), tmp_path / "m", metadata={"top1": 91.5})
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["history"][0]["plan"]["technique"]["technique"] == "soft-sharing"
    assert config["metadata"] == {"top1": 91.5}
    assert "soft-sharing(templates=2)" in (tmp_path / "m" / "README.md").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is no model folder: it is left alone"):
        tn.save(made(["shift"]), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_a_failed_save_leaves_the_old_folder_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    old = made(["shift"])
    tn.save(old, tmp_path / "m")

    def disk_full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "_sync", disk_full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        tn.save(made(["soft-sharing(templates=2)"]), tmp_path / "m")
    monkeypatch.undo()
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(tn.load(tmp_path / "m")(images), old(images))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def damage(folder: Path, what: str) -> None:
    weights, config = folder / "model.safetensors", folder / "config.json"
    facts = json.loads(config.read_text())
    if what == "flip":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif what == "no weights":
        weights.unlink()
    elif what == "no config":
        config.unlink()
    elif what == "not json":
        config.write_text("{")
    elif what == "newer":
        config.write_text(json.dumps({**facts, "thriftnet_format": 99, "thriftnet_version": "9.0"}))
    elif what == "foreign":
        config.write_text(json.dumps({"model_type": "bert"}))
    elif what == "unknown step":
        config.write_text(json.dumps({**facts, "history": [{"verb": "explode"}]}))
    elif what == "code":
        config.write_text(json.dumps({**facts, "model": {"name": "os:getcwd", "kwargs": {}}}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("flip", "missing or damaged"),
        ("no weights", "missing or damaged"),
        ("no config", "no model folder"),
        ("not json", "cannot be read"),
        ("newer", "format 99.*install thriftnet 9.0"),
        ("foreign", "not of thriftnet"),
        ("unknown step", "unknown step 'explode'"),
        ("code", "names code"),
    ],
)
def test_a_damaged_folder_is_refused(what: str, message: str, tmp_path: Path):
    folder = tn.save(made(["shift"]), tmp_path / "m")
    damage(folder, what)
    with pytest.raises(CheckpointError, match=message):
        tn.load(folder)


def test_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no model folder"):
        tn.load(tmp_path / "nothing")
