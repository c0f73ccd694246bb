"""The reader of torch.save's files: what it gives back, what it refuses, and that it runs nothing of a file."""

from __future__ import annotations

import argparse
import collections
import importlib.util
import struct
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pickle_bytes import (
    EMPTY_TUPLE,
    NONE,
    Entry,
    call,
    dict_of,
    integer,
    legacy,
    list_of,
    name,
    saved,
    storage,
    tensor,
    text,
    text2,
    tuple_of,
    zipped,
)
from thriftnet.importing.files import read_file
from thriftnet.importing.inert import StandIn

SHARED = Path(__file__).parents[2] / "shared"
FOUR = struct.pack("<4f", 1, 2, 3, 4)
LAYOUTS = [pytest.param(True, id="zip"), pytest.param(False, id="legacy")]


def tensors(value: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """All tensors with their path, also those in the state of stand-ins, ours or the prototype's."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        yield path, value.detach()
    elif id(value) not in seen:
        seen.add(id(value))
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, (list, tuple)) else ()
        for key, part in inner:
            yield from tensors(part, f"{path}/{key}", seen)
        yield from tensors(getattr(value, "state", None), path, seen)


def assert_same_tensors(got: Any, expected: Any) -> None:
    got_tensors, expected_tensors = dict(tensors(got)), dict(tensors(expected))
    assert list(got_tensors) == list(expected_tensors)
    assert got_tensors, "no tensor was compared"
    for path, value in expected_tensors.items():
        assert got_tensors[path].dtype is value.dtype, path
        assert got_tensors[path].stride() == value.stride(), path
        assert torch.equal(got_tensors[path], value), path


# -- what is read


def checkpoint() -> dict[str, Any]:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2, dtype=torch.bfloat16))
    flat = torch.arange(12.0)
    return {
        "state_dict": network.state_dict(),
        "parameter": nn.Parameter(torch.randn(2, 3).t()),
        "optimizer": torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9).state_dict(),
        "views": [flat, flat[4:8], flat.view(3, 4).t()[1]],
        "types": [torch.tensor([1, 0], dtype=d) for d in (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32)],
        "more": [torch.tensor(1.5, dtype=torch.float64), torch.empty(0, 3), torch.tensor([2.5], dtype=torch.float16)],
        "plain": [None, True, 7, -70_000, 10**15, -(2**62), 1.25, "text ü 😀", b"\xff\x00bytes", (), (1,), (1, 2, 3, 4)],
        "keys": {1: 1, "a": 2, (1, "b"): 3, None: 4, b"c": 5},
        "sets": [{1, 2}, frozenset("a")],
        "torch": [torch.Size([2, 3]), torch.device("cuda", 1), torch.float16],
        "numpy": [
            np.float64(0.1),
            np.int32(-3),
            np.bool_(True),
            np.arange(6.0).reshape(2, 3),
            np.asfortranarray(np.eye(2, 3)),
        ],
        "default": collections.defaultdict(list, a=[1]),
    }


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("archived", LAYOUTS)
def test_reads_what_torch_saves(read: Any, archived: bool, protocol: int) -> None:
    expected = checkpoint()
    content = read(saved(expected, archived=archived, protocol=protocol))
    assert list(content) == list(expected)
    assert_same_tensors(content, expected)
    assert content["plain"] == [*expected["plain"][:8], "ÿ\0bytes", [], [1], [1, 2, 3, 4]]
    assert content["keys"] == {"1": 1, "a": 2, "null": 4}
    assert [sorted(part) for part in content["sets"]] == [[1, 2], ["a"]]
    assert content["torch"][0] == [2, 3]
    assert [part.origin for part in content["torch"][1:]] == ["torch.device", "torch.float16"]
    assert content["numpy"][:3] == [0.1, -3, True]
    assert [type(number) for number in content["numpy"][:3]] == [float, int, bool]
    assert all(isinstance(array, StandIn) for array in content["numpy"][3:])
    assert content["default"] == {"a": [1]}
    views = content["views"]
    views[1].fill_(9.0)
    assert views[0][5] == 9.0, "views of one storage no longer share it"


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
@pytest.mark.parametrize("archived", LAYOUTS)
def test_whole_networks_of_classes_that_are_gone(read: Any, archived: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("models_of_then")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    module.Net = type("Net", (nn.Sequential,), {"__module__": module.__name__})  # type: ignore[attr-defined]
    network = module.Net(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))  # type: ignore[attr-defined]
    data = saved({"net": network, "args": argparse.Namespace(lr=0.1), "epoch": 3}, archived=archived)
    monkeypatch.delitem(sys.modules, module.__name__)
    content = read(data)
    net, norm = content["net"], content["net"].state["_modules"]["1"]
    assert (net.origin, norm.origin) == ("models_of_then.Net", "torch.nn.modules.batchnorm.BatchNorm2d")
    assert repr(net) == "<StandIn for models_of_then.Net>"
    assert torch.equal(net.state["_modules"]["0"].state["_parameters"]["weight"], network[0].weight)
    assert torch.equal(norm.state["_buffers"]["running_var"], network[1].running_var)
    assert content["args"].state == {"lr": 0.1}
    assert "models_of_then" not in sys.modules


def test_python_2_files(read: Any) -> None:
    weights = call(
        "torch._utils._rebuild_tensor",
        tuple_of(text2(b"storage"), name("torch.cuda.FloatStorage"), text2(b"7"), text2(b"cuda:0"), b"K\x04", NONE) + b"Q",
        b"K\x00",
        b"K\x02K\x02\x86",
        b"K\x02K\x01\x86",
    )
    parameter = name("torch.nn.parameter.Parameter") + weights + b"\x85R" + tuple_of(b"\x88", b"\x89", NONE) + b"b"
    source = tuple_of(text2(b"module"), name("models.Net"), text2(b"models.py"), text2(b"import os")) + b"Q"
    net = source + EMPTY_TUPLE + b"\x81}" + text2(b"weight") + parameter + b"sb"
    accuracy = name("numpy.core.multiarray.scalar") + call("numpy.dtype", text2(b"f8"), b"K\x00", b"K\x01")
    accuracy += (
        tuple_of(b"K\x03", text2(b"<"), NONE, NONE, NONE, b"J\xff\xff\xff\xff", b"J\xff\xff\xff\xff", b"K\x00") + b"b"
    )
    accuracy += text2(struct.pack("<d", 93.25)) + b"\x86R"
    words = list_of(text2(b"caf\xe9"), b"S'it\\'s'\n", b"Vuml\\u00e4ut\n", b"I01\n", b"I42\n", b"L99L\n", b"F1.5\n")
    old = b"(iutils\nRecorder\n" + dict_of(n=b"K\x01") + b"b"
    groups = call("__builtin__.set", list_of(b"K\x01", b"K\x02"))
    content = read(legacy(dict_of(net=net, acc=accuracy, words=words, old=old, groups=groups), {"7": FOUR}))
    assert content["net"].origin == "models.Net"
    assert torch.equal(content["net"].state["weight"], torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert content["acc"] == 93.25
    assert content["words"] == ["café", "it's", "umläut", True, 42, 99, 1.5]
    assert (content["old"].origin, content["old"].state) == ("utils.Recorder", {"n": 1})
    assert content["groups"] == [1, 2]


def test_storages_that_are_views(read: Any) -> None:
    view = storage(4, view=tuple_of(text("v"), integer(1), integer(2)))
    content = read(legacy(list_of(tensor(storage(4), [4], [1]), tensor(view, [2], [1])), {"0": FOUR}))
    assert content[1].tolist() == [2.0, 3.0]
    content[1].zero_()
    assert content[0].tolist() == [1.0, 0.0, 0.0, 4.0]


def test_archives_with_zip64_fields(read: Any) -> None:
    wide = Entry("archive/data/0", FOUR, wide=True)
    assert read(zipped(tensor(storage(4, view=None), [4], [1]), wide)).tolist() == [1, 2, 3, 4]


def test_truth_values_are_0_or_1(read: Any) -> None:
    body = tensor(storage(4, kind="torch.BoolStorage", view=None), [4], [1])
    value = read(zipped(body, weights={"0": b"\x00\x01\x02\xff"}))
    assert value.view(torch.uint8).tolist() == [0, 1, 1, 1]


def test_stand_ins_keep_all_that_is_done_to_them(read: Any) -> None:
    made = call("shop.Thing", integer(1)) + b"(" + text("k") + integer(2) + b"u(" + integer(3) + b"e"
    made += dict_of(a=integer(4)) + b"b" + tuple_of(NONE, dict_of(b=integer(5))) + b"b"
    thing = read(legacy(made))
    assert isinstance(thing, StandIn)
    assert (thing.origin, thing.args, thing.items, thing.elements) == ("shop.Thing", (1,), {"k": 2}, [3])
    assert thing.state == {"a": 4, "b": 5}
    assert not callable(thing)


def test_modules_that_know_their_parent(read: Any) -> None:
    net = (
        call("models.Net")
        + b"q\x01"
        + dict_of(_modules=dict_of(a=call("models.Block") + dict_of(net=b"h\x01") + b"b"))
        + b"b"
    )
    inner = read(legacy(net)).state["_modules"]["a"].state["net"]
    assert (inner.origin, inner.state) == ("models.Net", None)


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared material is not beside this checkout")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_authors_files_read_as_torch_reads_them() -> None:
    spec = importlib.util.spec_from_file_location("restricted_reader", SHARED / "prototypes" / "restricted_reader.py")
    assert spec is not None
    assert spec.loader is not None
    prototype = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prototype)
    files = [path for path in sorted((SHARED / "checkpoints").glob("*/*")) if path.suffix != ".json"]
    assert len(files) > 30
    for path in files:
        content, format = read_file(path)
        assert format == ("torch zip" if path.read_bytes().startswith(b"PK") else "torch legacy")
        assert_same_tensors(content, prototype.read(path))
