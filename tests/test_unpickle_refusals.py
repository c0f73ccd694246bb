"""What the reader of torch.save's files refuses, each in one line: files that lie, that would take all memory, or of other kinds."""

from __future__ import annotations

import os
import struct
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
from thriftnet.importing.unpickle import read_pickled

FOUR = struct.pack("<4f", 1, 2, 3, 4)


@pytest.fixture
def read(tmp_path: Path) -> Any:
    """Reads bytes as a file."""

    def read_bytes(data: bytes) -> Any:
        path = tmp_path / "file.pt"
        path.write_bytes(data)
        return read_pickled(path)

    return read_bytes


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
    "cut off": (legacy(NONE)[:-3], "ends in the middle"),
    "magic alone": (legacy(NONE)[:15], "ends in the middle"),
    "takes too much": (legacy(b"0"), "closes a group|takes more"),
    "tuple of nothing": (legacy(b"\x87"), "takes more values"),
    "mark without end": (legacy(b"t"), "closes a group"),
    "leaves values": (legacy(NONE + NONE), "leaves values behind"),
    "unknown opcode": (legacy(b"\xff"), "no pickle opcode"),
    "protocol 9": (legacy(b"\x80\x09N"), "protocol 9"),
    "extension": (legacy(b"\x82\x01"), "extension registry"),
    "buffer": (legacy(b"\x97"), "buffer that is not in the file"),
    "text persistent id": (legacy(b"Pstorage\n"), "text form"),
    "long string": (legacy(b"X\xff\xff\xff\xff"), "ends in the middle"),
    "long frame": (legacy(b"\x95" + b"\xff" * 8 + NONE), "ends in the middle"),
    "long integer": (legacy(b"\x8b" + struct.pack("<i", 500) + b"\x7f" * 500), "integer of 500 bytes"),
    "negative long": (legacy(b"\x8b\xff\xff\xff\xff"), "integer of 4294967295 bytes"),
    "long decimal": (legacy(b"I" + b"9" * 4000 + b"\n"), "no number that is read"),
    "endless line": (legacy(b"I" + b"9" * 9000 + b"\n"), "does not end within"),
    "decimal": (legacy(b"Ione\n"), "no number"),
    "float": (legacy(b"Fone\n"), "no number"),
    "quotes": (legacy(b"Sa\n"), "quotes"),
    "utf-8": (legacy(b"X\x01\x00\x00\x00\xff"), "no valid utf-8"),
    "memo far": (legacy(NONE + b"r\xff\xff\xff\xff"), "numbers an object 4294967295"),
    "memo unknown": (legacy(b"h\x05"), "refers to object 5"),
    "list as key": (legacy(b"}]Ns"), "a list as a key"),
    "nested key": (legacy(b"}" + tuple_of(tuple_of(NONE)) + b"Ns"), "a tuple as a key"),
    "tensor as key": (legacy(b"}" + tensor(ONE, [4], [1]) + b"Ns", GOOD), "a Tensor as a key"),
    "huge key": (legacy(b"}" + integer(1 << 70) + b"Ns"), "more than 64 bits"),
    "set of lists": (legacy(call("builtins.set", list_of(b"]"))), "a list as a key"),
    "odd pairs": (legacy(b"}(" + NONE + b"u"), "sets 1 keys"),
    "append to text": (legacy(text("a") + b"Na"), "appends to a str"),
    "state of text": (legacy(text("a") + b"}b"), "state of a str"),
    "call text": (legacy(text("a") + b")R"), "calls a str"),
    "call with list": (legacy(name("a.b") + b"]R"), "with a list"),
    "name of number": (legacy(integer(1) + text("b") + b"\x93"), "no name"),
    "computed name": (legacy(text("os") + call("operator.add", text("sys"), text("tem")) + b"\x93"), "no name"),
    "name with a line break": (legacy(text("a\nb") + text("c") + b"\x93"), "no name"),
    "long name": (legacy(name("a." + "b" * 900)), "no name"),
    "deep tuples": (legacy(deep(300)), "more than 200 deep"),
    "deep stand-ins": (legacy(NONE + (b"q\x010" + name("a.b") + b"h\x01\x85R") * 150), "more than 200 deep"),
    "unfolds": (legacy(unfolding(60)), "over and over"),
    "holds itself": (legacy(b"]q\x01h\x01a"), "holds itself"),
    "many containers": (legacy(b"(" + b"}" * 600_000 + b"t"), "more memory than the file"),
    "many tuple keys": (legacy(b"}(" + b"".join(integer(i) + b"\x85N" for i in range(20_000)) + b"u"), "more memory than"),
    "set over and over": (
        legacy(list_of(*[b"K\x01"] * 9000) + b"q\x01" + name("builtins.set") + b"q\x02" + b"h\x02h\x01\x85R0" * 3000),
        "more memory than",
    ),
    # persistent ids
    "id is text": (legacy(text("storage") + b"Q"), "outside its pickle"),
    "id is none": (legacy(NONE + b"Q"), "outside its pickle"),
    "id is array": (
        legacy(tuple_of(array(b"K\x01", integer(1) + b"\x85", F8, b"\x89", b"C\x08" + b"a" * 8)) + b"Q"),
        "outside",
    ),
    "id of another kind": (legacy(tuple_of(text("file"), text("/etc/passwd")) + b"Q"), "outside its pickle"),
    "id with a call": (
        legacy(tuple_of(text("storage"), integer(1), text("0"), text("cpu"), integer(4), NONE) + b"Q"),
        "described",
    ),
    "module is text": (legacy(tuple_of(text("module"), text("os"), NONE, NONE) + b"Q"), "outside its pickle"),
    # tensors
    "negative count": (legacy(storage(-1), GOOD), "described by something else"),
    "huge count": (legacy(storage(1 << 39), GOOD), "more weights than it has bytes"),
    "two sizes": (legacy(list_of(ONE, storage(2)), GOOD), "two types or sizes"),
    "two types": (legacy(list_of(ONE, storage(4, kind="torch.IntStorage")), GOOD), "two types or sizes"),
    "view outside": (legacy(storage(4, view=tuple_of(text("v"), integer(3), integer(2))), GOOD), "leaves its storage"),
    "view negative": (legacy(storage(4, view=tuple_of(text("v"), integer(-1), integer(2))), GOOD), "leaves its storage"),
    "size outside": (legacy(tensor(ONE, [5], [1]), GOOD), "leaves its storage"),
    "offset outside": (legacy(tensor(ONE, [4], [1], 1), GOOD), "leaves its storage"),
    "stride outside": (legacy(tensor(ONE, [2], [4]), GOOD), "leaves its storage"),
    "negative offset": (legacy(tensor(ONE, [1], [1], -1), GOOD), "negative"),
    "negative size": (legacy(tensor(ONE, [-1], [1]), GOOD), "negative"),
    "negative stride": (legacy(tensor(ONE, [2], [-1], 1), GOOD), "negative"),
    "huge size": (legacy(tensor(ONE, [1 << 62], [0]), GOOD), "huge"),
    "huge empty": (legacy(tensor(ONE, [0, 1 << 39, 1 << 39], [0, 0, 0]), GOOD), "impossible shape"),
    "expanded": (legacy(tensor(ONE, [5], [0]), GOOD), "expanded"),
    "strides missing": (legacy(tensor(ONE, [4], []), GOOD), "dimensions"),
    "many dimensions": (legacy(tensor(ONE, [1] * 40, [1] * 40), GOOD), "40 dimensions"),
    "no storage": (legacy(tensor(integer(1), [4], [1])), "something else than storage"),
    "tensor as storage": (legacy(tensor(tensor(ONE, [2, 2], [2, 1]), [4], [1]), GOOD), "no storage"),
    "parameter": (legacy(call("torch._utils._rebuild_parameter", NONE, NONE, NONE)), "no tensor"),
    "sparse": (legacy(call("torch._utils._rebuild_sparse_tensor", NONE)), "dense tensors"),
    "quantized": (legacy(call("torch._utils._rebuild_qtensor", NONE)), "dense tensors"),
    "complex": (legacy(storage(2, kind="torch.ComplexFloatStorage")), "ComplexFloatStorage"),
    "size of text": (legacy(call("torch.Size", tuple_of(text("a")))), "torch.Size"),
    # numpy and Python
    "objects": (
        legacy(array(b"K\x01", integer(1) + b"\x85", call("numpy.dtype", text("O")), b"\x89", list_of(NONE))),
        "numbers",
    ),
    "array short": (legacy(array(b"K\x01", integer(9) + b"\x85", F8, b"\x89", b"C\x01a")), "9 numbers"),
    "array negative": (legacy(array(b"K\x01", integer(-1) + b"\x85", F8, b"\x89", b"C\x00")), "negative"),
    "array huge": (
        legacy(array(b"K\x01", integer(0) + integer(1 << 39) + integer(9) + b"\x87", F8, b"\x89", b"C\x00")),
        "shape",
    ),
    "scalar short": (legacy(call("numpy.core.multiarray.scalar", F8, b"C\x01a")), "1 numbers"),
    "big-endian dtype": (legacy(F8 + tuple_of(b"K\x03", text(">"), NONE) + b"b"), "big-endian"),
    "dtype of array": (legacy(F8 + tuple_of(b"K\x03", F8, NONE) + b"b"), "big-endian"),
    "pairs": (legacy(call("collections.OrderedDict", list_of(NONE))), "keys and values"),
    "encoding": (legacy(call("_codecs.encode", text("a"), text("zip"))), "latin1"),
    "not latin": (legacy(call("_codecs.encode", text("\u20ac"), text("latin1"))), "bytes in it"),
    # the legacy format
    "other version": (legacy(NONE).replace(pickled(integer(1001)), pickled(integer(1002))), "another version"),
    "version is array": (
        legacy(NONE).replace(pickled(integer(1001)), pickled(tensor(storage(2), [2], [1]))),
        "another version",
    ),
    "big-endian": (legacy(NONE, system=dict_of(little_endian=b"\x89")), "big-endian"),
    "no byte order": (legacy(NONE, system=NONE), "big-endian"),
    "storage missing": (legacy(ONE), "1 storages"),
    "storage unknown": (legacy(NONE, GOOD), "0 storages"),
    "weights cut": (legacy(ONE, GOOD)[:-1], "ends before its weights"),
    "weights short": (legacy(ONE, {"0": FOUR[:8]}), "4 numbers, where 2"),
    "weights long": (legacy(ONE, GOOD) + b"x", "follows its weights"),
    # archives
    "zip cut": (zipped(NONE)[:-1], "does not end"),
    "zip comment": (archive(Entry("archive/data.pkl", pickled(NONE)), comment=b"x"), "does not end"),
    "zip gap": (archive(Entry("archive/data.pkl", pickled(NONE)), gap=b"x"), "not where it should be"),
    "zip without pickle": (archive(Entry("archive/version", b"3")), "without a record data.pkl"),
    "zip of a program": (zipped(NONE, Entry("archive/constants.pkl", b"")), "TorchScript"),
    "no weights": (zipped(INSIDE), "lacks the weights"),
    "weights too short": (zipped(INSIDE, weights={"0": FOUR[:8]}), "cannot have 8 bytes"),
    "key leads elsewhere": (zipped(storage(4, "../../x", view=None), RECORD), "lacks the weights"),
    "view in zip": (zipped(storage(4, view=tuple_of(text("v"), integer(0), integer(1))), RECORD), "archives do not have"),
    "byte order": (zipped(NONE, Entry("archive/byteorder", b"middle")), "byte order"),
    "pickle goes on": (archive(Entry("archive/data.pkl", pickled(NONE) + b"N")), "follows its pickle"),
    "parent folder": (zipped(NONE, Entry("archive/../x", b"")), "leads elsewhere"),
    "absolute": (zipped(NONE, Entry("/etc/x", b"")), "leads elsewhere"),
    "backslash": (zipped(NONE, Entry("archive\\x", b"")), "leads elsewhere"),
    "second folder": (zipped(NONE, Entry("other/x", b"")), "outside the folder"),
    "symbolic link": (zipped(NONE, Entry("archive/x", b"/etc", attributes=0o120777 << 16)), "symbolic link"),
    "compressed": (zipped(NONE, Entry("archive/x", b"..", method=8)), "compressed"),
    "twice": (zipped(NONE, Entry("archive/x"), Entry("archive/x")), "twice"),
    "overlap": (zipped(INSIDE, RECORD, Entry("archive/data/0", FOUR, offset=0)), "overlaps"),
    "longer than the file": (zipped(NONE, Entry("archive/x", b"..", size=1 << 30)), "overlaps"),
    "longer than its place": (zipped(NONE, Entry("archive/x", b"..", size=10)), "overlaps"),
    "far away": (zipped(NONE, Entry("archive/x", b"..", offset=(1 << 64) - 1, wide=True)), "overlaps"),
    "two directory sizes": (zipped(NONE, Entry("archive/x", b"..", packed=1)), "two sizes"),
    "longer directory": (archive(Entry("archive/data.pkl", pickled(NONE)), more=b"x"), "longer than its entries"),
    "header of another size": (zipped(NONE, Entry("archive/x", b"..", header_size=1)), "another size"),
    "header of another name": (zipped(NONE, Entry("archive/x", b"..", header_name="archive/y")), "disagrees"),
    "checksum": (zipped(INSIDE, Entry("archive/data/0", FOUR, crc=1)), "checksum"),
    # other files
    "empty": (b"", "empty"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
    "tar": (b"\0" * 257 + b"ustar" + b"\0" * 250, "0.1.10"),
    "pickle": (pickled(NONE), "not of torch.save"),
    "page": (b"<html>", "no file of torch.save"),
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


def test_what_the_refusals_change_is_read_otherwise(read: Any) -> None:
    assert read(zipped(INSIDE, RECORD)).content.tolist() == [1, 2, 3, 4]
    assert read(legacy(tensor(ONE, [2, 2], [1, 2]), GOOD)).content.tolist() == [[1, 3], [2, 4]]
    assert read(legacy(array(b"K\x01", integer(1) + b"\x85", F8, b"\x89", b"C\x08" + struct.pack("<d", 3)))).content == [3.0]
    read(legacy(deep(150)))
    read(legacy(unfolding(8)))


@pytest.mark.parametrize("kind", ["missing", "folder", "pipe", "null", "unreadable"])
def test_refuses_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a\0b" if kind == "null" else "two\nlines")
    reasons = {
        "missing": "No such file",
        "folder": "is a folder",
        "pipe": "device or pipe",
        "null": "no file can have",
        "unreadable": "denied",
    }
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "unreadable":
        path.write_bytes(legacy(NONE))
        path.chmod(0)
        if os.access(path, os.R_OK):
            pytest.skip("this user may read everything")
    with pytest.raises(CheckpointError, match=reasons[kind]) as caught:
        read_pickled(path)
    assert "\n" not in str(caught.value)
