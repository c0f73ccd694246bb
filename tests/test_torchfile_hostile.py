"""Files that were made to run something: the reader runs nothing of them, and no broken file makes it fail another way."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pickle_bytes import (
    NONE,
    Entry,
    call,
    dict_of,
    integer,
    legacy,
    list_of,
    name,
    pickled,
    saved,
    storage,
    tensor,
    text,
    tuple_of,
    zipped,
)
from thriftnet.errors import CheckpointError
from thriftnet.importing import inert, torchfile

FLOATS = bytes(range(16))


def payloads(folder: Path) -> dict[str, bytes]:
    """Pickles that write the file ``canary`` into the folder when they are run, by many ways."""
    canary = folder / "canary"
    touch = text(f"touch '{canary}'")
    code = text(f"open({str(canary)!r}, 'w')")
    system = call("os.system", touch)
    (folder / "hubconf.py").write_text(f"open({str(canary)!r}, 'w')\n\ndef entry():\n    pass\n")
    nested = legacy(system)
    blob = call("_codecs.encode", text(nested.decode("latin-1")), text("latin1"))
    namespace = call("argparse.Namespace")
    return {
        "os.system": system,
        "posix.system": call("posix.system", touch),
        "eval": call("builtins.eval", code),
        "exec": call("builtins.exec", code),
        "python 2's exec": call("__builtin__.eval", code),
        "subprocess": call("subprocess.check_call", list_of(text("touch"), text(str(canary)))),
        "check_output": call("subprocess.check_output", list_of(text("touch"), text(str(canary)))),
        "open": call("builtins.open", text(str(canary)), text("w")),
        "torch.load": call("torch.storage._load_from_bytes", blob),
        "pickle.loads": call(
            "_pickle.loads", call("_codecs.encode", text(pickled(system).decode("latin-1")), text("latin1"))
        ),
        "torch.hub": call("torch.hub._load_local", text(str(folder)), text("entry")),
        "torch.jit": call("torch.jit.unsupported_tensor_ops.execWrapper", code, b"}", b"}"),
        "getattr": call("builtins.getattr", call("importlib.import_module", text("os")), text("system"))
        + tuple_of(touch)
        + b"R",
        "INST": b"(" + touch + b"ios\nsystem\n",
        "OBJ": b"(" + name("os.system") + touch + b"o",
        "STACK_GLOBAL": text("os") + text("system") + b"\x93" + tuple_of(touch) + b"R",
        "computed name": text("os") + call("operator.add", text("sys"), text("tem")) + b"\x93" + tuple_of(touch) + b"R",
        "map": call("builtins.list", name("builtins.map") + tuple_of(name("builtins.exec"), list_of(code)) + b"\x81"),
        "partial": call("functools.partial", name("os.system"), touch) + b")R",
        "keywords": name("functools.partial")
        + tuple_of(name("subprocess.call"), touch)
        + dict_of(shell=b"\x88")
        + b"\x92)R",
        "__setstate__": namespace + dict_of(__setstate__=name("os.system")) + b"b" + touch + b"b",
        "append": namespace + dict_of(append=name("os.system")) + b"b" + touch + b"a",
        "extend": namespace + dict_of(extend=name("subprocess.call")) + b"b(" + text("touch") + text(str(canary)) + b"e",
        "reconstructor": call("copyreg._reconstructor", name("argparse.Namespace"), name("builtins.object"), NONE)
        + dict_of(__setstate__=name("os.system"))
        + b"b"
        + touch
        + b"b",
        "default factory": call("collections.defaultdict", name("builtins.list")) + system + NONE + b"s",
        "as key": b"}" + system + NONE + b"s",
        "in a persistent id": tuple_of(text("storage"), system, text("0"), text("cpu"), integer(0), NONE) + b"Q",
        "in a size": call("torch.Size", tuple_of(system)),
        "popped": system + b"0N",
    }


SCRIPT = """
import json, os, sys, warnings
from pathlib import Path
import torch
from thriftnet.errors import CheckpointError
from thriftnet.importing import inert, torchfile

torchfile.describe = lambda file: inert.describe(file).encode()  # here, where the hook sees all of it
warnings.simplefilter("ignore")
folder, sound, *files = map(Path, sys.argv[1:])
canary = os.path.join(folder, "canary")
torchfile.read_torch(sound)  # whatever torch and numpy load on first use is there now
seen, watching = [], True
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC

def hook(event, args):
    if not watching:
        return
    if event == "open":
        if str(args[0]) != str(file) or args[2] & WRITING or any(letter in (args[1] or "") for letter in "wax+"):
            seen.append(f"open {args[0]} {args[1]}")
    elif event != "builtins.id":
        seen.append(event)

sys.addaudithook(hook)
result = {}
for file in files:
    seen.clear()
    try:
        outcome = type(torchfile.read_torch(file)[0]).__name__
    except CheckpointError as error:
        outcome = str(error)
    watching = False
    result[str(file)] = {"outcome": outcome, "seen": list(seen), "fired": os.path.exists(canary)}
    watching = True
for file in files:
    seen.clear()
    try:
        torch.load(file, map_location="cpu", weights_only=False)
    except Exception as error:
        result[str(file)]["error"] = repr(error)[:300]
    result[str(file)]["fires_in_torch"] = os.path.exists(canary)
    result[str(file)]["seen_in_torch"] = len(seen)
    if os.path.exists(canary):
        os.remove(canary)
print(json.dumps(result))
"""


def test_hostile_files_run_nothing(tmp_path: Path) -> None:
    """Python's audit events are watched in a process of its own; the same files do fire in torch.load."""
    files = []
    for index, (case, payload) in enumerate(payloads(tmp_path).items()):
        body = dict_of(state=tensor(storage(4), [4], [1]), payload=payload)
        archived = dict_of(state=tensor(storage(4, view=None), [4], [1]), payload=payload)
        for data in (legacy(body, {"0": FLOATS}), zipped(archived, Entry("archive/version", b"3"), weights={"0": FLOATS})):
            files.append(tmp_path / f"{index} {case} {len(files) % 2}.pt")
            files[-1].write_bytes(data)
    sound = tmp_path / "sound.pt"
    sound.write_bytes(saved({"a": torch.ones(2), "b": np.arange(3.0), "c": [np.float32(1)]}))
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(sound), *map(str, files)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])
    assert len(result) == len(files)
    for file, facts in result.items():
        assert not facts["fired"], f"{file} ran: {facts}"
        assert not facts["seen"], f"{file} caused {facts['seen']}"
    assert all(facts["seen_in_torch"] for facts in result.values()), "the watch sees nothing even where something runs"
    silent = [(Path(file).name, facts.get("error")) for file, facts in result.items() if not facts["fires_in_torch"]]
    assert not silent, f"these payloads do not work at all, so they prove nothing: {silent}"


def test_nested_pickles_are_never_followed(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(
        zipped(NONE, Entry("archive/data/0", legacy(call("os.system", text("false")))), Entry("archive/more.pkl", b"x"))
    )
    assert torchfile.read_torch(path)[0] is None


# -- broken files


def small_files() -> list[bytes]:
    """Files with a little of everything; archives without checksums, so that changes get past them."""
    network = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2))
    flat = torch.arange(6.0)
    content = {
        "net": network,
        "views": [flat, flat[2:4]],
        "numpy": [np.float64(1), np.arange(3)],
        "args": argparse.Namespace(a=1),
        "plain": [{1, 2}, "ü", b"\xff", 10**15, (1, "a"), torch.Size([1])],
    }
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        return [saved(content, archived=archived, protocol=protocol) for archived in (False, True) for protocol in (2, 4)]
    finally:
        torch.serialization.set_crc32_options(before)


def mutant(data: bytes, others: list[bytes], random_: random.Random) -> bytes:
    """Bits flipped, bytes replaced, cut out, doubled or taken from another file."""
    changed = bytearray(data)
    for _ in range(random_.choice([1, 1, 2, 5])):
        at = random_.randrange(min(len(changed), random_.choice([300, 3000, len(changed)])))
        kind = random_.randrange(6)
        if kind == 0:
            changed[at] ^= 1 << random_.randrange(8)
        elif kind == 1:
            changed[at] = random_.choice(b"(.0NKM)}]abceqhtuRQ\x81\x85\x86\x87")
        elif kind == 2:
            del changed[at + 1 :]
        elif kind == 3:
            del changed[at : at + random_.choice([1, 2, 8])]
            changed = changed or bytearray(b"x")
        elif kind == 4:
            other = random_.choice(others)
            start = random_.randrange(len(other))
            changed[at : at + random_.choice([0, 20])] = other[start : start + random_.choice([4, 40, 400])]
        else:
            changed[at : at + 4] = random_.choice([b"\xff\xff\xff\xff", b"\xff\xff\xff\x7f", b"\x00\x00\x00\x80"])
    return bytes(changed)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_broken_files_are_read_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchfile, "describe", lambda file: inert.describe(file).encode())
    random_ = random.Random(0)
    files = small_files()
    path = tmp_path / "file.pt"
    read, messages = 0, list[str]()
    for index in range(600):
        path.write_bytes(mutant(files[index % len(files)], files, random_))
        try:
            torchfile.read_torch(path)
            read += 1
        except CheckpointError as error:
            messages.append(str(error))
    assert read > 20, "hardly a mutant was still readable: they test the first check only"
    assert len(messages) > 200
    assert not [message for message in messages if "\n" in message]
