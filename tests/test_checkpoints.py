"""Model files: bit-exact, whole or not at all, and never trusted."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import thriftnet as tn
from model_files import config_text, sealed, with_config
from thriftnet import files, resolve
from thriftnet.core.provenance import data_facts
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.resolve import open_model
from thriftnet.store.config import FIELDS
from thriftnet.store.model_file import read_config
from thriftnet.store.sealed import CHECKSUM, verified

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

    def disk_full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", disk_full)
    with pytest.raises(CheckpointError, match=r"No space left on device\. What is there is whole"):
        tn.save(made(["soft-sharing(templates=2)"]), tmp_path / "m")
    monkeypatch.undo()
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(tn.load(tmp_path / "m")(images), old(images))
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def rewritten(folder: Path, edit: Callable[[dict[str, Any]], object] = lambda config: None, text: str | None = None) -> Path:
    """Change the config in a model file, and make the checksum fit."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    config = json.loads(config_text(data))
    edit(config)
    path.write_bytes(with_config(data, json.dumps(config, separators=(",", ":")) if text is None else text))
    return folder


def tiny() -> nn.Module:
    model: nn.Module = tn.create_model("convmixer", dim=4, depth=1, patch_size=2, kernel_size=3, num_classes=2)
    return model.eval()


def test_every_flipped_bit_is_noticed(tmp_path: Path):
    path = tn.save(tiny(), tmp_path / "m", metadata={"class_names": ["a", "b"]}) / "model.safetensors"
    data = bytearray(path.read_bytes())
    header = 8 + int.from_bytes(data[:8], "little")
    bits = [*range(8 * header), *random.Random(0).sample(range(8 * header, 8 * len(data)), 500)]
    for bit in bits:
        data[bit // 8] ^= 1 << bit % 8
        with pytest.raises(CheckpointError, match=r"is damaged|is not a model file"):
            verified(data, path)
        data[bit // 8] ^= 1 << bit % 8
    assert json.loads(verified(data, path))["class_names"] == ["a", "b"]
    for byte in (0, 8, 60, CHECKSUM.start, CHECKSUM.stop + 5, header - 1, header, len(data) - 1):
        path.write_bytes(data[:byte] + bytes([data[byte] ^ 1]) + data[byte + 1 :])
        with pytest.raises(CheckpointError, match=r"is damaged|is not a model file"):
            tn.load(path)


def damage(folder: Path, what: str) -> None:
    path = folder / "model.safetensors"
    if what == "no file":
        path.unlink()
    elif what == "cut":
        path.write_bytes(path.read_bytes()[:-10])
    elif what == "not json":
        rewritten(folder, text='{"sha256":"' + "0" * 64)
    elif what == "newer":
        rewritten(folder, lambda config: config.update(thriftnet_format=99, thriftnet_version="9.0"))
    elif what == "foreign":
        save_file({"weight": torch.zeros(3)}, path, {"format": "pt"})
    elif what == "pointer":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    elif what == "unknown step":
        rewritten(folder, lambda config: config.update(history=[{"verb": "explode"}]))
    elif what == "code":
        rewritten(folder, lambda config: config.update(model={"name": "os:getcwd", "kwargs": {}}))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no file", "no model folder"),
        ("cut", "is damaged: its checksum does not fit"),
        ("not json", "cannot be read"),
        ("newer", "format 99.*install thriftnet 9.0"),
        ("foreign", "is not a model file"),
        ("pointer", "is not a model file"),
        ("unknown step", "unknown step 'explode'"),
        ("code", "names code"),
    ],
)
def test_a_damaged_file_is_refused(what: str, message: str, tmp_path: Path):
    folder = tn.save(made(["shift"]), tmp_path / "m")
    damage(folder, what)
    with pytest.raises(CheckpointError, match=message):
        tn.load(folder)


def test_a_model_is_one_file(tmp_path: Path):
    """What lies beside it is for people and the Hub; without it, or with another network's, the same is loaded."""
    model = made(["soft-sharing(templates=2)"])
    folder = tn.save(model, tmp_path / "m", metadata={"class_names": ["a"] * 10})
    shown = json.loads((folder / "config.json").read_text())
    assert shown == read_config(folder)
    images = torch.randn(2, 1, 8, 8)
    (folder / "config.json").write_text("{")
    moved = tmp_path / "renamed"
    moved.write_bytes((folder / "model.safetensors").read_bytes())
    for source in (folder, folder / "model.safetensors", str(moved)):
        assert torch.equal(tn.load(source)(images), model(images))
    assert torch.equal(open_model(str(moved))(images), model(images))
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    folder.rename(run / "model")
    assert torch.equal(tn.load(run)(images), model(images))


def test_a_missing_folder_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="no model folder"):
        tn.load(tmp_path / "nothing")


# What the config says


def test_facts_have_fields_of_their_own(tmp_path: Path):
    facts = {
        "input_size": (1, 8, 8),
        "normalisation": {"mean": [0.5], "std": [0.25]},
        "class_names": ["nought", "one"],
        "metrics": {"top1": 91.5, "loss": float("nan")},
        "data": "digits",
    }
    folder = tn.save(made(["shift"]), tmp_path / "m", metadata=facts)
    config = read_config(folder)
    assert config["input_size"] == [1, 8, 8]
    assert config["normalisation"] == facts["normalisation"]
    assert config["class_names"] == ["nought", "one"]
    assert config["metrics"] == {"top1": 91.5, "loss": None}
    assert config["metadata"] == {"data": "digits"}
    assert config["model"] == {"name": "resnet20", "kwargs": {"in_chans": 1}}
    card = (folder / "README.md").read_text()
    for said in ("1 x 8 x 8", "nought, one", "top1: 91.5", "data: digits", "mean [0.5], std [0.25]"):
        assert said in card
    assert read_config(tn.save(made(["shift"]), tmp_path / "n"))["input_size"] == [1, 32, 32]


@pytest.mark.parametrize(
    "facts",
    [
        {"input_size": 32},
        {"input_size": [3, 32]},
        {"normalisation": {"mean": [0.5], "std": [0.0]}},
        {"normalisation": {"mean": [0.5, 0.5], "std": [1.0]}},
        {"class_names": "cat"},
        {"metrics": {"top1": "high"}},
        {"model": range},
    ],
    ids=str,
)
def test_facts_of_the_wrong_type_are_refused(facts: dict[str, Any], tmp_path: Path):
    with pytest.raises(ConfigError, match="metadata" if "model" in facts else next(iter(facts))):
        tn.save(made(["shift"]), tmp_path / "m", metadata=facts)
    assert not list(tmp_path.iterdir())


def test_the_selected_width_comes_back(tmp_path: Path):
    model = made(["slimmable(widths=(0.25, 0.5, 1.0))"])
    images = torch.randn(2, 1, 8, 8)
    for width in (0.25, 1.0, 0.5):
        tn.set_width(model, width)
        loaded = tn.load(tn.save(model, tmp_path / "m"))
        assert torch.equal(loaded(images), model(images))
        tn.set_width(loaded, "largest")
        tn.set_width(model, "largest")
        assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("steps", STEPS, ids=" + ".join)
def test_every_type_comes_back(steps: list[str], dtype: torch.dtype, tmp_path: Path):
    model = made(steps).to(dtype)
    loaded = tn.load(tn.save(model, tmp_path / "m"))
    assert {name: t.dtype for name, t in loaded.named_parameters()} == {
        name: t.dtype for name, t in model.named_parameters()
    }
    images = torch.randn(2, 1, 8, 8).to(dtype)
    assert torch.equal(loaded(images), model(images))
    assert {b.dtype for b in loaded.buffers() if b.is_floating_point()} == {dtype}


def test_mixed_types_come_back(tmp_path: Path):
    model = made(["shift"]).to(torch.bfloat16)
    model.fc.float()
    loaded = tn.load(tn.save(model, tmp_path / "m"))
    assert {name: t.dtype for name, t in loaded.state_dict().items()} == {n: t.dtype for n, t in model.state_dict().items()}


@pytest.mark.parametrize(
    "steps", [["weight-sharing(trained=True)"], ["weight-sharing(trained=True)", "soft-sharing"]], ids=str
)
def test_fused_weights_come_back(steps: list[str], tmp_path: Path):
    model = made(steps[:1])
    folded = tn.fold(model)
    images = torch.randn(2, 1, 8, 8)
    for network in (model, folded):
        assert torch.equal(tn.load(tn.save(network, tmp_path / "m"))(images), network(images))


@pytest.mark.parametrize(
    ("name", "size"),
    [("swrn16_1_2", 32), ("shiftresnet20", 32), ("slimmable_mobilenetv1", 64), ("resnet56_double_shared", 32)],
)
def test_networks_of_the_papers_come_back(name: str, size: int, tmp_path: Path):
    model = tn.create_model(name).eval()
    loaded = tn.load(tn.save(model, tmp_path / "m"))
    images = torch.randn(2, 3, size, size)
    assert torch.equal(loaded(images), model(images))
    assert list(loaded.state_dict()) == list(model.state_dict())
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize(
    "source",
    ["timm:resnet10t", "timm:test_byobnet", "timm:resnetblur18", "torchvision:regnet_y_400mf", "torchvision:resnet18"],
)
@pytest.mark.parametrize("technique", ["", "weight-sharing"], ids=["plain", "converted"])
def test_networks_of_others_come_back(source: str, technique: str, tmp_path: Path):
    pytest.importorskip(source.partition(":")[0])
    model = open_model(source, num_classes=7).eval()
    if technique:
        model = tn.convert(model, technique)
    before = torch.get_rng_state()
    loaded = tn.load(tn.save(model, tmp_path / "m"))
    assert torch.equal(torch.get_rng_state(), before)
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(loaded(images), model(images))
    assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))


def test_what_wraps_a_network_is_left_out(tmp_path: Path):
    model = made(["soft-sharing(templates=2)"])
    images = torch.randn(2, 1, 8, 8)
    for wrapped in (torch.compile(model), torch.optim.swa_utils.AveragedModel(model), nn.DataParallel(model)):
        assert torch.equal(tn.load(tn.save(wrapped, tmp_path / "m"))(images), model(images))


def test_tensors_tied_by_hand_come_back(tmp_path: Path):
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight
            self.register_buffer("table", torch.arange(4.0), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)) + self.table

    model, plain = Own().eval(), Own()
    before = copy.deepcopy(plain.state_dict())
    loaded = tn.load(tn.save(model, tmp_path / "m"), model=plain)
    x = torch.randn(2, 4)
    assert torch.equal(loaded(x), model(x))
    assert loaded.first.weight is loaded.second.weight
    assert all(torch.equal(before[name], tensor) for name, tensor in plain.state_dict().items())
    assert loaded.table.data_ptr() != plain.table.data_ptr()


def test_meta_networks_are_not_saved(tmp_path: Path):
    with torch.device("meta"):
        model = tn.create_model("resnet20")
    with pytest.raises(CheckpointError, match="holds no values"):
        tn.save(model, tmp_path / "m")


def test_other_files_in_the_folder_stay(tmp_path: Path):
    folder = tn.save(made(["shift"]), tmp_path / "m")
    (folder / "logs").mkdir()
    (folder / "logs" / "run.txt").write_text("mine")
    (folder / "notes.txt").write_text("mine, too")
    tn.save(made(["soft-sharing(templates=2)"]), folder)
    assert (folder / "logs" / "run.txt").read_text() == "mine"
    assert (folder / "notes.txt").read_text() == "mine, too"
    assert read_config(folder)["history"][0]["plan"]["technique"]["technique"] == "soft-sharing"


def test_a_folder_with_a_config_of_others_is_left_alone(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="left alone"):
        tn.save(made(["shift"]), tmp_path)


def test_a_network_that_other_code_changed(tmp_path: Path):
    """Before it is converted: it is not what its name builds. Afterwards: converted layers are gone."""
    plain = tn.create_model("resnet20").eval()
    plain.layer1[0].conv1 = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
    model = tn.convert(plain, "soft-sharing(templates=2)").eval()
    folder = tn.save(model, tmp_path / "m")
    with pytest.raises(CheckpointError, match="or was changed by other code: give its plain form"):
        tn.load(folder)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(tn.load(folder, model=plain)(x), model(x))
    model.layer1[1] = nn.Conv2d(16, 16, 1)
    with pytest.raises(CheckpointError, match=r"'layer1\.1\.conv1' of .* was converted, and is gone: .*plain network first"):
        tn.save(model, folder)
    tn.load(folder, model=plain)


# Loading fits nothing and trusts nothing


def test_loading_fits_nothing(tmp_path: Path):
    """Nothing is allocated or computed for the fits: their results would have to be on a device."""
    model = made(["filter-basis(shared_rank=4, bases=2)"])
    folder = tn.save(model, tmp_path / "m")
    plain = made([])
    seen: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            if any(isinstance(t, torch.Tensor) and not t.is_meta for t in (args or [None])[:1]):
                seen.add(func.overloadpacket.__name__)
            return out

    with Watch():
        tn.load(folder)
        tn.load(folder, model=plain)
    assert not {
        name for name in seen if name.startswith(("linalg", "_linalg", "mm", "bmm", "addmm", "normal", "uniform"))
    }, seen
    assert "clone" in seen, "the watch saw nothing"


def test_loading_takes_at_most_twice_the_file(tmp_path: Path):
    folder = tn.save(tn.create_model("wrn40_4"), tmp_path / "m")
    script = (
        "import resource, sys, torch, thriftnet as tn\n"
        "tn.load(sys.argv[2])\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "before = peak(); model = tn.load(sys.argv[1]); print(peak() - before)\n"
    )
    small = tn.save(tn.create_model("wrn16_4"), tmp_path / "small")
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder), str(small)], capture_output=True, text=True, check=True
    )
    size = (folder / "model.safetensors").stat().st_size
    assert int(done.stdout) < 2.2 * size


HOSTILE: dict[str, Callable[[dict[str, Any]], object]] = {
    "classes": lambda c: c["model"]["kwargs"].update(num_classes=10**12),
    "somewhat more classes": lambda c: c["model"]["kwargs"].update(num_classes=1000),
    "expansion": lambda c: c["history"][0]["plan"]["technique"].update(expansion=1e12),
    "no number": lambda c: c["history"][0]["plan"]["technique"].update(expansion=float("nan")),
    "text for classes": lambda c: c["model"]["kwargs"].update(num_classes="ten"),
    "list for classes": lambda c: c["model"]["kwargs"].update(num_classes=[[]]),
    "unknown kwarg": lambda c: c["model"]["kwargs"].update(colour="red"),
    "own arguments": lambda c: c["model"]["kwargs"].update(self=1, name="resnet20"),
    "unknown model": lambda c: c["model"].update(name="resnet21"),
    "code": lambda c: c["model"].update(name="os:getcwd", kwargs={}),
    "hub in hub": lambda c: c["model"].update(name="hf-hub:a/b", kwargs={}),
    "timm from the Hub": lambda c: c["model"].update(name="timm:hf-hub:a/b", kwargs={}),
    "timm with a file": lambda c: c["model"].update(name="timm:resnet10t", kwargs={"checkpoint_path": "/dev/zero"}),
    "timm with nonsense": lambda c: c["model"].update(name="timm:resnet10t", kwargs={"block": 5, "layers": "x"}),
    "name is a list": lambda c: c["model"].update(name=["resnet20"]),
    "model is text": lambda c: c.update(model="resnet20"),
    "history is text": lambda c: c.update(history="convert"),
    "history is endless": lambda c: c.update(history=[{"verb": "fold"}] * 5000),
    "history of numbers": lambda c: c.update(history=[1]),
    "plan is missing": lambda c: c.update(history=[{"verb": "convert"}]),
    "plan without rows": lambda c: c["history"][0]["plan"].pop("rows"),
    "rows of text": lambda c: c["history"][0]["plan"].update(rows=["a"]),
    "names of lists": lambda c: c["history"][0]["plan"]["rows"][0].update(names=[[]]),
    "no names": lambda c: c["history"][0]["plan"]["rows"][0].update(names=[]),
    "ties that are not there": lambda c: c["history"].append({"verb": "tie", "groups": [["a", "b"]]}),
    "a width of one": lambda c: c["history"].append({"verb": "freeze", "width": 0.5}),
    "a list for a width": lambda c: c["history"].append({"verb": "freeze", "width": []}),
    "another width": lambda c: c.update(width=0.5),
    "format is text": lambda c: c.update(thriftnet_format="1"),
    "format 0": lambda c: c.update(thriftnet_format=0),
    "params is text": lambda c: c.update(params="many"),
    "metadata is a list": lambda c: c.update(metadata=[]),
    "classes are numbers": lambda c: c.update(class_names=[1, 2]),
    "metrics of lists": lambda c: c.update(metrics={"top1": []}),
    "size of text": lambda c: c.update(input_size=["3", "32", "32"]),
}


def edits_the_name(what: str) -> bool:
    """Whether it is in the part of the config that is not used with ``model=``."""
    config = {
        "model": {"name": "resnet20", "kwargs": {}},
        "history": [{"plan": {"rows": [{}], "technique": {}}}],
    }
    HOSTILE[what](config)
    return config["model"] != {"name": "resnet20", "kwargs": {}}


CASES = [(what, given) for what in HOSTILE for given in (False, True) if not (given and edits_the_name(what))]


@pytest.mark.parametrize(("what", "given"), CASES)
def test_a_hostile_config_is_refused(what: str, given: bool, tmp_path: Path):
    folder = rewritten(tn.save(made(["shift"]), tmp_path / "m"), HOSTILE[what])
    with pytest.raises(CheckpointError) as caught:
        tn.load(folder, model=tn.create_model("resnet20", in_chans=1) if given else None)
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 1000


BEGIN = '{"sha256":"' + "0" * 64 + '"'


@pytest.mark.parametrize(
    "text",
    [
        BEGIN + ',"a":' + "[" * 100_000,
        BEGIN,
        BEGIN + "}",
        BEGIN + ',"thriftnet_format":true}',
        BEGIN + ',"a":' + "9" * 5000 + "}",
    ],
    ids=range(5),
)
def test_what_is_no_config_is_refused(text: str, tmp_path: Path):
    folder = rewritten(tn.save(made(["shift"]), tmp_path / "m"), text=text)
    with pytest.raises(CheckpointError):
        tn.load(folder)


@pytest.mark.parametrize("size", [0, 4, 8, 100, 1000])
def test_what_is_no_safetensors_file_is_refused(size: int, tmp_path: Path):
    path = tn.save(made(["shift"]), tmp_path / "m") / "model.safetensors"
    cut = path.read_bytes()[:size]
    path.write_bytes(sealed(cut))
    with pytest.raises(CheckpointError, match=r"not a (safetensors|model) file|checksum"):
        tn.load(path)


def test_every_field_is_explained():
    page = (Path(__file__).parent.parent / "docs" / "saving.md").read_text()
    for field in ("thriftnet_format", "sha256", *FIELDS):
        assert f"`{field}`" in page, f"docs/saving.md does not explain {field}"


# Names of networks


def test_a_file_is_opened_by_the_importer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    expected, path = tn.create_model("resnet20"), tmp_path / "theirs.pth"
    path.write_bytes(b"")
    monkeypatch.setattr(
        resolve, "import_checkpoint", lambda given: SimpleNamespace(model=expected) if Path(given) == path else None
    )
    assert open_model(str(path)) is expected
    assert open_model(str(path), num_classes=5).fc.out_features == 5
    with pytest.raises(ConfigError, match=r"takes no arguments but num_classes, got \['depth'\]"):
        open_model(str(tn.save(expected, tmp_path / "ours")), depth=5)


def test_names_that_lead_nowhere(tmp_path: Path):
    with pytest.raises(ConfigError, match="no such file"):
        open_model(str(tmp_path / "nothing"))


@pytest.mark.parametrize("place", [None, b"bytes", "a\0b"])
def test_what_is_no_path_is_refused(place: Any):
    with pytest.raises(tn.ConfigError, match=r"expected .*path"):
        tn.save(tn.create_model("resnet20"), place)
    with pytest.raises(tn.ConfigError, match=r"expected .*path"):
        tn.load(place)


def test_what_is_no_network_is_refused(tmp_path: Path):
    with pytest.raises(tn.ConfigError, match="expected a network"):
        tn.save({"a": 1}, tmp_path / "m")  # type: ignore[arg-type]
    with pytest.raises(tn.ConfigError, match="'resnet20'"):
        tn.load(tn.save(tn.create_model("resnet20"), tmp_path / "m"), model="resnet20")  # type: ignore[arg-type]


# What a network knows of its data


def test_the_verbs_keep_what_a_network_knows_of_its_data(tmp_path: Path):
    facts = {
        "input_size": [1, 8, 8],
        "normalisation": {"mean": [0.3], "std": [0.7]},
        "class_names": [f"class {index}" for index in range(10)],
        "resize": 9,
        "crop_pct": 0.9,
        "eval_interpolation": "bicubic",
    }
    loaded = tn.load(tn.save(made([]), tmp_path / "plain", metadata=facts))
    slim = tn.convert(loaded, "slimmable(widths=(0.5, 1.0))").eval()
    shared = tn.convert(loaded, "weight-sharing").eval()
    tn.recalibrate(slim, [torch.randn(4, 1, 8, 8)])
    networks = [loaded, slim, shared, tn.fold(shared), tn.freeze(slim, 0.5), tn.pack(shared, input_size=(1, 8, 8))]
    for network in [*networks, copy.deepcopy(shared), tn.fold_recurrence(made_of(loaded), threshold=0.2)]:
        assert data_facts(network).to_dict() == facts
        assert data_facts(tn.load(tn.save(network, tmp_path / "m"))).to_dict() == facts
    overridden = tn.load(tn.save(shared, tmp_path / "m", metadata={"resize": 12}))
    assert data_facts(overridden).to_dict() == {**facts, "resize": 12}


def made_of(plain: nn.Module) -> nn.Module:
    return tn.convert(plain, "soft-sharing(templates=2)").eval()


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_network_that_the_user_built_with_a_library_remembers_it(library: str, tmp_path: Path):
    pytest.importorskip(library)
    if library == "timm":
        import timm

        plain = timm.create_model("resnet10t", num_classes=5, in_chans=1)
        other = timm.create_model("resnet10t", num_classes=5, in_chans=1, output_stride=8)
    else:
        import torchvision.models

        plain = torchvision.models.resnet18(num_classes=5)
        other = torchvision.models.resnet18(num_classes=5, norm_layer=lambda channels: nn.BatchNorm2d(channels, eps=0.1))
    model = tn.convert(plain, "weight-sharing").eval()
    images = torch.randn(1, 1 if library == "timm" else 3, 64, 64)
    assert torch.equal(tn.load(tn.save(model, tmp_path / "m"))(images), model(images))
    with pytest.raises(CheckpointError, match="model="):
        tn.load(tn.save(other, tmp_path / "other"))  # the same shapes, another function
