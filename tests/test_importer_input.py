"""Files that lie, files that are no checkpoints, hints that make no sense, and the command line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thriftnet as tn
from pickle_bytes import call, dict_of, legacy, storage, tensor
from test_importer import SMALL, stirred, theirs
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.importing.importer import build, import_checkpoint
from thriftnet.importing.shiftresnet import layout as shiftresnet_layout
from thriftnet.importing.soft_sharing import layout as swrn_layout
from thriftnet.importing.systems import recognise
from thriftnet.importing.weight_sharing import layout as convmixer_layout


def test_numbers_in_names_are_bounded_by_the_tensors_present() -> None:
    state = theirs(tn.create_model("resnet20", shortcut="projection"), shiftresnet_layout)
    state["layer1.99999999.conv1.weight"] = torch.zeros(1)
    with pytest.raises(CheckpointError, match="number 3 is missing"):
        recognise(state, {}, {})


def test_shapes_that_promise_more_than_is_stored() -> None:
    state = theirs(tn.create_model("wrn", depth=10, width=1), swrn_layout)
    state["classifier.weight"] = torch.zeros(1).expand(10**9, 64)
    state["classifier.bias"] = torch.zeros(1).expand(10**9)
    with pytest.raises(CheckpointError, match="cannot be built: num_classes=1000000000"):
        build(recognise(state, {}, {})[1])


def mutate(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "missing":
        return {key: tensor for key, tensor in state.items() if key not in ("layer2.1.bn1.bias", "layer1.0.bn2.running_var")}
    if how == "unexpected":
        return {**state, "layer9.weight": torch.zeros(3)}
    if how == "shape":
        return {**state, "layer2.1.conv1.weight": torch.zeros(3, 32, 3, 3)}
    if how == "transposed":
        return {
            **state,
            "linear.weight": state["linear.weight"].T[:, :10].contiguous().reshape(64, 10),
            "linear.bias": torch.zeros(64),
        }
    if how == "whole numbers":
        return {**state, "bn1.weight": torch.zeros(16, dtype=torch.int64)}
    return {key: tensor for key, tensor in state.items() if not key.startswith("layer3.2")}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", r"missing: .*layer1\.0\.bn2\.running_var.*layer2\.1\.bn1\.bias"),
        ("unexpected", "unexpected: layer9.weight"),
        ("shape", r"layer2\.1\.conv1\.weight has shape \(3, 32, 3, 3\), the network needs \(32, 32, 3, 3\)"),
        ("transposed", r"linear\.weight has shape \(64, 10\), the network needs \(64, 64\)"),
        ("whole numbers", "torch.int64"),
        ("fewer blocks", r"\(3, 3, 2\) blocks"),
    ],
)
def test_tensors_that_do_not_fit(how: str, message: str, tmp_path: Path) -> None:
    state = theirs(tn.create_model("resnet20", shortcut="projection"), shiftresnet_layout)
    path = tmp_path / "c.pth"
    torch.save(mutate(state, how), path)
    with pytest.raises(CheckpointError, match=message) as caught:
        import_checkpoint(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def save_script(path: Path) -> None:
    torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), path)


def save_part(path: Path) -> None:
    torch.save(nn.Linear(200, 200).state_dict(), path)
    path.write_bytes(path.read_bytes()[:9000])


WRITERS: dict[str, Callable[[Path], object]] = {
    "absent": lambda path: None,
    "empty": lambda path: path.write_bytes(b""),
    "pointer": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 82432896\n"),
    "page": lambda path: path.write_text("\n<!DOCTYPE html><html>not found</html>"),
    "text": lambda path: path.write_text("accuracy 91.3\n" * 400),
    "script": save_script,
    "bytes": lambda path: path.write_bytes(bytes(range(256)) * 20),
    "folder": lambda path: path.mkdir(),
    "cut": save_part,
    "cut safetensors": lambda path: path.write_bytes((30).to_bytes(8, "little") + b'{"a":{"dtype":"F32"' + b" " * 30),
    "number": lambda path: torch.save(3, path),
    "other": lambda path: torch.save({"encoder.attention.weight": torch.zeros(3, 3)}, path),
    "nothing": lambda path: torch.save({"epoch": 3, "optimizer": {}}, path),
}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("absent", "there is no file"),
        ("empty", "is empty"),
        ("pointer", r"Git LFS pointer, not the weights \(82,432,896 bytes\): fetch it with `git lfs pull`"),
        ("page", "web page"),
        ("text", "is text"),
        ("script", "TorchScript"),
        ("bytes", "no checkpoint"),
        ("folder", "is a folder"),
        ("cut", "damaged|cut off|does not end"),
        ("cut safetensors", "damaged safetensors"),
        ("number", "holds no weights: a int"),
        ("other", r"not recognised; it holds 1 tensors: encoder.attention.weight \(3, 3\)"),
        ("nothing", "a dict with epoch, optimizer"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_checkpoint(how: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from thriftnet.cli import main

    path = tmp_path / "file"
    WRITERS[how](path)
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(path)
    assert main(["import", str(path)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("thriftnet import: ")
    assert captured.err.count("\n") == 1


def test_a_folder_of_ours_is_named_as_such(tmp_path: Path) -> None:
    tn.save(tn.create_model("resnet20"), tmp_path / "m")
    with pytest.raises(CheckpointError, match=r"thriftnet\.load reads it"):
        import_checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"mappin": "strided"}, "did you mean 'mapping'"),
        ({"mapping": "sideways"}, "sequential or strided"),
        ({"rate": 3}, "the tensors show rate=2"),
        ({"fusion": "mean"}, "plays no part"),
        ({"system": "weight-sharin"}, "did you mean 'weight-sharing'"),
        ({"system": "dsnet"}, "it is no file of dsnet"),
        ({"system": "thriftnet"}, "model="),
        ({"strides": (1, 2)}, "says nothing about a file of SPIN"),
        ({"activation": "tanh"}, "tanh"),
        ({"model": "resnet99"}, "unknown model"),
        ({"model": "resnet20"}, "missing: .*unexpected: "),
        (
            {"model": "ws_convmixer", "rate": 3},
            r"rate=3 does not divide the depth 32.*depth=32 is ws_convmixer's default: give",
        ),
        ({"ema": "yes"}, "True or False"),
    ],
)
def test_hints_that_make_no_sense(hints: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.pyth"
    torch.save({"model_state": theirs(tn.create_model("ws_convmixer", **SMALL), convmixer_layout)}, path)
    with pytest.raises((ConfigError, CheckpointError), match=message):
        import_checkpoint(path, **hints)


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from thriftnet.cli import main

    model = stirred(tn.create_model("ws_convmixer", **SMALL, mapping="strided"))
    path, folder = tmp_path / "c.pyth", tmp_path / "folder"
    torch.save({"model_state": theirs(model, convmixer_layout), "epoch": 7}, path)
    assert main(["import", str(path), "--mapping", "strided", "-o", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "create_model('ws_convmixer'" in text
    assert "activation='relu' is assumed" in text
    images = torch.randn(1, 3, 8, 8)
    assert torch.equal(tn.load(folder)(images), model(images))
    config = json.loads((folder / "config.json").read_text())
    stored = json.dumps(config)
    assert config["metadata"]["checkpoint"] == {"epoch": 7}
    assert len(config["metadata"]["source"]["sha256"]) == 64
    assert "0.485" in stored
    assert main(["import", str(path), "--json", "--mapping=strided"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (result["system"], result["model"], result["kwargs"]["mapping"]) == ("weight-sharing", "ws_convmixer", "strided")
    assert result["params"] == sum(p.numel() for p in model.parameters())
    assert result["metadata"] == {"epoch": 7}


def test_modules_that_hold_themselves_end(tmp_path: Path) -> None:
    inside = dict_of(_modules=dict_of(a=b"h\x01", b=b"h\x01"), _parameters=dict_of(), _buffers=dict_of())
    (tmp_path / "c.pth").write_bytes(legacy(call("models.resnet.ResNet") + b"q\x01" + inside + b"b"))
    with pytest.raises(CheckpointError, match="the pickled network has no parameters"):
        import_checkpoint(tmp_path / "c.pth")


def test_long_names_are_not_multiplied(tmp_path: Path) -> None:
    weights = dict_of(**{f"p{i}": tensor(storage(1), [1], [1]) for i in range(2)})
    block = call("Block") + dict_of(_modules=dict_of(), _parameters=weights) + b"b"
    net = call("Net") + dict_of(_modules=dict_of(**{"x" * 3000: block})) + b"b"
    (tmp_path / "c.pth").write_bytes(legacy(net, {"0": bytes(4)}))
    with pytest.raises(CheckpointError, match="a name of 3001 characters"):
        import_checkpoint(tmp_path / "c.pth")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="device or pipe"):
        import_checkpoint(tmp_path / "pipe")


def test_half_precision_is_named(tmp_path: Path) -> None:
    model = stirred(tn.create_model("wrn", depth=10, width=1)).half()
    torch.save(theirs(model, swrn_layout), tmp_path / "c.pth")
    imported = import_checkpoint(tmp_path / "c.pth")
    assert any("torch.float16" in note for note in imported.notes)
    assert torch.equal(imported.model.fc.weight, model.fc.weight.float())
