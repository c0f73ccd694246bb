"""What the reader of torch.save's files refuses, each in one line: files that lie, that would take all memory, or of other kinds."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pickle_bytes import (
    NONE,
    Entry,
    archive,
    call,
    dict_of,
    integer,
    legacy,
    list_of,
    name,
    pickled,
    storage,
    tensor,
    text,
    tuple_of,
    zipped,
)
from thriftnet.errors import CheckpointError
from thriftnet.importing import inert, torchfile
from thriftnet.importing.files import read_file
from thriftnet.importing.inert import StandIn

FOUR = struct.pack("<4f", 1, 2, 3, 4)


def deep(count: int) -> bytes:
    return NONE + b"\x85" * count


def unfolding(levels: int) -> bytes:
    return NONE + b"".join(b"q\x01h\x01\x86" for _ in range(levels))


def array(*state: bytes) -> bytes:
    empty = call("numpy.core.multiarray._reconstruct", name("numpy.ndarray"), tuple_of(integer(0)), b"C\x01b")
    return empty + tuple_of(*state) + b"b"


F8 = call("numpy.dtype", text("f8"), b"\x89", b"\x88")
ONE = storage(4)
INSIDE = storage(4, view=None)
GOOD = {"0": FOUR}
RECORD = Entry("archive/data/0", FOUR)

REFUSALS = {
    # pickles
    "cut off": (legacy(NONE)[:-3], "cannot be decoded"),
    "magic alone": (legacy(NONE)[:15], "cannot be decoded"),
    "takes too much": (legacy(b"0"), "cannot be decoded"),
    "tuple of nothing": (legacy(b"\x87"), "cannot be decoded"),
    "mark without end": (legacy(b"t"), "cannot be decoded"),
    "unknown opcode": (legacy(b"\xff"), "cannot be decoded"),
    "protocol 9": (legacy(b"\x80\x09N"), "cannot be decoded"),
    "extension": (legacy(b"\x82\x01"), "cannot be decoded"),
    "buffer": (legacy(b"\x97"), "cannot be decoded"),
    "text persistent id": (legacy(b"Pstorage\n"), "outside its pickle"),
    "long string": (legacy(b"X\xff\xff\xff\xff"), "cannot be decoded"),
    "long frame": (legacy(b"\x95" + b"\xff" * 8 + NONE), "cannot be decoded"),
    "negative long": (legacy(b"\x8b\xff\xff\xff\xff"), "cannot be decoded"),
    "endless line": (legacy(b"I" + b"9" * 9000 + b"\n"), "cannot be decoded"),
    "decimal": (legacy(b"Ione\n"), "cannot be decoded"),
    "float": (legacy(b"Fone\n"), "cannot be decoded"),
    "quotes": (legacy(b"Sa\n"), "cannot be decoded"),
    "utf-8": (legacy(b"X\x01\x00\x00\x00\xff"), "cannot be decoded"),
    "memo unknown": (legacy(b"h\x05"), "cannot be decoded"),
    "list as key": (legacy(b"}]Ns"), "cannot be decoded"),
    "set of lists": (legacy(call("builtins.set", list_of(b"]"))), "cannot be decoded"),
    "odd pairs": (legacy(b"}(" + NONE + b"u"), "cannot be decoded"),
    "append to text": (legacy(text("a") + b"Na"), "cannot be decoded"),
    "call text": (legacy(text("a") + b")R"), "cannot be decoded"),
    "name of number": (legacy(integer(1) + text("b") + b"\x93"), "cannot be decoded"),
    "computed name": (legacy(text("os") + call("operator.add", text("sys"), text("tem")) + b"\x93"), "cannot be decoded"),
    "name with a line break": (legacy(text("a\nb") + text("c") + b"\x93"), "by something that is no name"),
    "long name": (legacy(name("a." + "b" * 900)), "by something that is no name"),
    "deep tuples": (legacy(deep(300)), "parts when unfolded"),
    "deep stand-ins": (legacy(NONE + (b"q\x010" + name("a.b") + b"h\x01\x85R") * 150), "parts when unfolded"),
    "unfolds": (legacy(unfolding(60)), "parts when unfolded"),
    "holds itself": (legacy(b"]q\x01h\x01a"), "parts when unfolded"),
    "many containers": (legacy(b"(" + b"}" * 600_000 + b"t"), "parts when unfolded"),
    # persistent ids
    "id is text": (legacy(text("storage") + b"Q"), "outside its pickle"),
    "id is none": (legacy(NONE + b"Q"), "outside its pickle"),
    "id is array": (
        legacy(tuple_of(array(b"K\x01", integer(1) + b"\x85", F8, b"\x89", b"C\x08" + b"a" * 8)) + b"Q"),
        "outside its pickle",
    ),
    "id of another kind": (legacy(tuple_of(text("file"), text("/etc/passwd")) + b"Q"), "outside its pickle"),
    "id with a call": (
        legacy(tuple_of(text("storage"), integer(1), text("0"), text("cpu"), integer(4), NONE) + b"Q"),
        "outside its pickle",
    ),
    "module is text": (legacy(tuple_of(text("module"), text("os"), NONE, NONE) + b"Q"), "outside its pickle"),
    # tensors
    "negative count": (legacy(storage(-1), GOOD), "outside its pickle"),
    "huge count": (legacy(storage(1 << 39), GOOD), "where others follow"),
    "two sizes": (legacy(list_of(ONE, storage(2)), GOOD), "two types or sizes"),
    "two types": (legacy(list_of(ONE, storage(4, kind="torch.IntStorage")), GOOD), "two types or sizes"),
    "size outside": (legacy(tensor(ONE, [5], [1]), GOOD), "leaves its storage"),
    "offset outside": (legacy(tensor(ONE, [4], [1], 1), GOOD), "leaves its storage"),
    "stride outside": (legacy(tensor(ONE, [2], [4]), GOOD), "leaves its storage"),
    "negative offset": (legacy(tensor(ONE, [1], [1], -1), GOOD), "negative, huge or no integer"),
    "negative size": (legacy(tensor(ONE, [-1], [1]), GOOD), "negative, huge or no integer"),
    "negative stride": (legacy(tensor(ONE, [2], [-1], 1), GOOD), "negative, huge or no integer"),
    "huge size": (legacy(tensor(ONE, [1 << 62], [0]), GOOD), "negative, huge or no integer"),
    "huge empty": (legacy(tensor(ONE, [0, 1 << 39, 1 << 39], [0, 0, 0]), GOOD), "negative, huge or no integer"),
    "expanded": (legacy(tensor(ONE, [5], [0]), GOOD), "expanded"),
    "strides missing": (legacy(tensor(ONE, [4], []), GOOD), "dimensions"),
    "many dimensions": (legacy(tensor(ONE, [1] * 40, [1] * 40), GOOD), "dimensions"),
    "no storage": (legacy(tensor(integer(1), [4], [1])), "something else than storage"),
    "tensor as storage": (legacy(tensor(tensor(ONE, [2, 2], [2, 1]), [4], [1]), GOOD), "something else than storage"),
    "parameter": (legacy(call("torch._utils._rebuild_parameter", NONE, NONE, NONE)), "dense tensors"),
    "sparse": (legacy(call("torch._utils._rebuild_sparse_tensor", NONE)), "dense tensors"),
    "quantized": (legacy(call("torch._utils._rebuild_qtensor", NONE)), "dense tensors"),
    "complex": (legacy(storage(2, kind="torch.ComplexFloatStorage")), "dense tensors"),
    # numpy and Python
    "scalar short": (legacy(call("numpy.core.multiarray.scalar", F8, b"C\x01a")), "numpy's type"),
    "pairs": (legacy(call("collections.OrderedDict", list_of(NONE))), "cannot be decoded"),
    "not latin": (legacy(call("_codecs.encode", text("\u20ac"), text("latin1"))), "cannot be decoded"),
    # the legacy format
    "other version": (legacy(NONE).replace(pickled(integer(1001)), pickled(integer(1002))), "another version"),
    "version is array": (
        legacy(NONE).replace(pickled(integer(1001)), pickled(tensor(storage(2), [2], [1]))),
        "another version",
    ),
    "big-endian": (legacy(NONE, system=dict_of(little_endian=b"\x89")), "big-endian"),
    "no byte order": (legacy(NONE, system=NONE), "big-endian"),
    "storage missing": (legacy(ONE), "other weights than it lists"),
    "storage unknown": (legacy(NONE, GOOD), "other weights than it lists"),
    "weights cut": (legacy(ONE, GOOD)[:-1], "before its weights do"),
    "weights short": (legacy(ONE, {"0": FOUR[:8]}), "where others follow"),
    "weights long": (legacy(ONE, GOOD) + b"x", "before its weights do"),
    # archives
    "zip cut": (zipped(NONE)[:-1], "cannot be decoded"),
    "zip gap": (archive(Entry("archive/data.pkl", pickled(NONE)), gap=b"x"), "cannot be decoded"),
    "zip without pickle": (archive(Entry("archive/version", b"3")), "without a record data.pkl"),
    "zip of a program": (zipped(NONE, Entry("archive/constants.pkl", b"")), "TorchScript"),
    "no weights": (zipped(INSIDE), "archive lacks"),
    "weights too short": (zipped(INSIDE, weights={"0": FOUR[:8]}), "archive lacks"),
    "key leads elsewhere": (zipped(storage(4, "../../x", view=None), RECORD), "archive lacks"),
    "byte order": (zipped(NONE, Entry("archive/byteorder", b"middle")), "big-endian"),
    "twice": (zipped(NONE, Entry("archive/x"), Entry("archive/x")), "without a record data.pkl"),
    "overlap": (zipped(INSIDE, RECORD, Entry("archive/data/0", FOUR, offset=0)), "without a record data.pkl"),
    "longer directory": (archive(Entry("archive/data.pkl", pickled(NONE)), more=b"x"), "cannot be decoded"),
    "checksum": (zipped(INSIDE, Entry("archive/data/0", FOUR, crc=1)), "checksum"),
    # other files
}

# what is wrong, but is data that nothing looks at
HARMLESS = {
    "leaves values": legacy(NONE + NONE),
    "memo far": legacy(NONE + b"r\xff\xff\xff\xff"),
    "nested key": legacy(b"}" + tuple_of(tuple_of(NONE)) + b"Ns"),
    "tensor as key": legacy(b"}" + tensor(ONE, [4], [1]) + b"Ns", GOOD),
    "huge key": legacy(b"}" + integer(1 << 70) + b"Ns"),
    "state of text": legacy(text("a") + b"}b"),
    "call with list": legacy(name("a.b") + b"]R"),
    "many tuple keys": legacy(b"}(" + b"".join(integer(i) + b"\x85N" for i in range(20_000)) + b"u"),
    "view outside": legacy(storage(4, view=tuple_of(text("v"), integer(3), integer(2))), GOOD),
    "view negative": legacy(storage(4, view=tuple_of(text("v"), integer(-1), integer(2))), GOOD),
    "size of text": legacy(call("torch.Size", tuple_of(text("a")))),
    "objects": legacy(array(b"K\x01", integer(1) + b"\x85", call("numpy.dtype", text("O")), b"\x89", list_of(NONE))),
    "array short": legacy(array(b"K\x01", integer(9) + b"\x85", F8, b"\x89", b"C\x01a")),
    "array negative": legacy(array(b"K\x01", integer(-1) + b"\x85", F8, b"\x89", b"C\x00")),
    "array huge": legacy(array(b"K\x01", integer(0) + integer(1 << 39) + integer(9) + b"\x87", F8, b"\x89", b"C\x00")),
    "big-endian dtype": legacy(F8 + tuple_of(b"K\x03", text(">"), NONE) + b"b"),
    "dtype of array": legacy(F8 + tuple_of(b"K\x03", F8, NONE) + b"b"),
    "encoding": legacy(call("_codecs.encode", text("a"), text("zip"))),
    "zip comment": archive(Entry("archive/data.pkl", pickled(NONE)), comment=b"x"),
    "view in zip": zipped(storage(4, view=tuple_of(text("v"), integer(0), integer(1))), RECORD),
    "pickle goes on": archive(Entry("archive/data.pkl", pickled(NONE) + b"N")),
    "parent folder": zipped(NONE, Entry("archive/../x", b"")),
    "absolute": zipped(NONE, Entry("/etc/x", b"")),
    "backslash": zipped(NONE, Entry("archive\\x", b"")),
    "second folder": zipped(NONE, Entry("other/x", b"")),
    "symbolic link": zipped(NONE, Entry("archive/x", b"/etc", attributes=0o120777 << 16)),
    "compressed": zipped(NONE, Entry("archive/x", b"..", method=8)),
    "longer than the file": zipped(NONE, Entry("archive/x", b"..", size=1 << 30)),
    "longer than its place": zipped(NONE, Entry("archive/x", b"..", size=10)),
    "far away": zipped(NONE, Entry("archive/x", b"..", offset=(1 << 64) - 1, wide=True)),
    "two directory sizes": zipped(NONE, Entry("archive/x", b"..", packed=1)),
    "header of another size": zipped(NONE, Entry("archive/x", b"..", header_size=1)),
    "header of another name": zipped(NONE, Entry("archive/x", b"..", header_name="archive/y")),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refuses(read: Any, case: str) -> None:
    data, reason = REFUSALS[case]
    with pytest.raises(CheckpointError, match=reason) as caught:
        read(data)
    message = str(caught.value)
    assert "file.pt: " in message
    assert "\n" not in message
    assert len(message) < 1000


@pytest.mark.parametrize("case", HARMLESS)
def test_what_nothing_looks_at_is_inert(read: Any, case: str) -> None:
    assert type(read(HARMLESS[case])) in (type(None), int, str, list, dict, StandIn)


def test_what_the_refusals_change_is_read_otherwise(read: Any) -> None:
    assert read(zipped(tensor(INSIDE, [4], [1]), RECORD)).tolist() == [1, 2, 3, 4]
    assert read(legacy(tensor(ONE, [2, 2], [1, 2]), GOOD)).tolist() == [[1, 3], [2, 4]]
    assert read(legacy(call("numpy.core.multiarray.scalar", F8, b"C\x08" + struct.pack("<d", 3)))) == 3.0
    read(legacy(deep(150)))
    read(legacy(unfolding(8)))


def test_views_of_storages_stay_inside(read: Any) -> None:
    for first, count, reason in ((3, 2, "leaves its storage"), (-1, 2, "negative"), (0, -1, "negative")):
        view = storage(4, view=tuple_of(text("v"), integer(first), integer(count)))
        with pytest.raises(CheckpointError, match=reason):
            read(legacy(tensor(view, [2], [1]), GOOD))


# -- in its process


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not limit memory")
@pytest.mark.parametrize(
    "body",
    [
        b"(" + b"}" * 3_000_000 + b"t",
        b"}" + deep(2_000_000) + b"Ns",
        pytest.param(b"]q\x01" + (b"(" + b"h\x01" * 30 + b"e") * 2_000_000, id="list of itself"),
    ],
    ids=["many dicts", "deep key", None],
)
def test_exhaustion_ends_the_process_that_reads(tmp_path: Path, body: bytes) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(legacy(body))
    before = set(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=r"MemoryError|crashed|parts when unfolded") as caught:
        torchfile.read_torch(path)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.skipif(sys.platform == "win32", reason="processor time is not limited there")
def test_endless_work_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(legacy(b"}(" + b"".join(integer(i * ((1 << 61) - 1)) + b"N" for i in range(60_000)) + b"u"))
    with pytest.raises(CheckpointError, match="took too much time"):
        torchfile.read_torch(path)


def test_a_reader_that_takes_too_long_or_dies_is_a_refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.pt"
    path.write_bytes(legacy(NONE))
    program = tmp_path / "program.py"
    monkeypatch.setattr(torchfile, "COMMAND", [sys.executable, str(program)])
    program.write_text("while True: pass")
    with monkeypatch.context() as patch:
        patch.setattr(torchfile, "SECONDS", 1)
        with pytest.raises(CheckpointError, match="more than 1 s"):
            torchfile.read_torch(path)
    for code, reason in {
        "import os, signal; os.kill(os.getpid(), 9)": "crashed",
        "print('x')": "do not fit each other",
        "print('[]')": "do not fit each other",
        'print(\'{"storages": [["Float", 0, 999999999999, 0]]}\')': "more weights than it has bytes",
        'print(\'{"storages": [], "format": "zip"}\\n\' + \'[\' * 100000)': "do not fit each other",
    }.items():
        program.write_text(code)
        with pytest.raises(CheckpointError, match=reason):
            torchfile.read_torch(path)


def test_the_reader_imports_no_torch_and_may_do_nothing_but_read(tmp_path: Path) -> None:
    (tmp_path / "file.pt").write_bytes(legacy(NONE))
    script = f"""
import sys
sys.path.insert(0, {os.path.dirname(inert.__file__)!r})
import inert
assert not {{"torch", "numpy", "thriftnet"}} & set(sys.modules)
def act(file):
    for attempt in (lambda: open("written", "w"), lambda: __import__("this"), lambda: __import__("os").system("true")):
        try:
            attempt()
        except inert.RefusedError:
            continue
        return "it could"
    return "refused"
inert.describe = act
inert.main()
"""
    with (tmp_path / "file.pt").open("rb") as file:
        done = subprocess.run([sys.executable, "-I", "-S", "-c", script], stdin=file, capture_output=True, cwd=tmp_path)
    assert done.stdout == b"refused", done.stderr


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "null", "unreadable", "empty", "tar", "pickle", "word"])
def test_refuses_what_is_no_file_of_torch(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a\0b" if kind == "null" else "file")
    contents = {
        "empty": (b"", "is empty"),
        "tar": (b"\0" * 257 + b"ustar" + b"\0" * 250, "tar archive"),
        "pickle": (pickled(NONE), "a pickle, but not one of torch.save"),
        "word": (archive(Entry("word/document.xml", b"x")), "not of torch.save"),
        "unreadable": (legacy(NONE), "permissions"),
    }
    reasons = {"missing": "there is no file", "folder": "is a folder", "pipe": "device or pipe", "null": "cannot be read"}
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind in contents:
        path.write_bytes(contents[kind][0])
    if kind == "unreadable":
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    with pytest.raises(CheckpointError, match=reasons.get(kind) or contents[kind][1]) as caught:
        read_file(path)
    assert "\n" not in str(caught.value)
