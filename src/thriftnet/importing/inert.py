"""Describes a file of torch.save as inert data: what was pickled, and where each storage lies in the file.

Run as a program it reads standard input in a short-lived process and prints JSON. It imports the standard library only, limits
its memory and time, and ends when anything but reading is tried. Python's own pickle machine decodes the opcodes, with
everything replaced that could import or call something: names become a `Name`, and calling one makes a `StandIn`.

Source: the opcodes in the standard library's ``pickletools``; ``torch/serialization.py`` for both formats.
"""

from __future__ import annotations

import codecs
import gc
import io
import json
import os
import pickle
import struct
import sys
import zipfile
import zlib
from contextlib import suppress
from typing import Any, BinaryIO, ClassVar

MAX_DEPTH, MAX_PARTS, MAX_TEXT = 200, 300_000, 8 << 20  # of the description: nesting, containers, bytes
BASE_MEMORY, CPU_SECONDS = 128 << 20, 5
PARTS = ("args", "state", "items", "elements")  # of a stand-in
ORIGIN = "\0"  # the key that marks a stand-in among dicts
MAGIC, PROTOCOL = b"l\xfc\x9cF\xf9 j\xa8P\x19", 1001
SIZES = {"Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1}
CODECS = [codecs.lookup(name) for name in ("unicode_escape", "raw_unicode_escape", "cp437")]  # imported on first use, else


class StandIn:
    """Takes the place of an object whose class a file names, or of what a function would return. It runs nothing."""

    __slots__ = ("origin", *PARTS)

    def __init__(self, origin: str, args: tuple[Any, ...] = ()) -> None:
        self.origin, self.args = origin, args  # the class or function, as models.resnet.ResNet, and what it was called with
        self.state: Any = None  # what the file restores it with, merged if that is a dict
        self.items: dict[Any, Any] = {}  # what the file sets on it by key
        self.elements: list[Any] = []  # what the file appends to it

    def __repr__(self) -> str:
        return f"<StandIn for {self.origin}>"

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items[key] = value

    def append(self, element: Any) -> None:
        """What the opcode APPEND calls."""
        self.elements.append(element)

    def restore(self, state: Any) -> None:
        """Keep a state as the opcode BUILD gives it: anything, or a dict and the slots' values."""
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, dict) and isinstance(self.state, dict):
                self.state.update(part)
            elif isinstance(part, dict):
                self.state = dict(part)
            elif part is not None:
                self.state = state


class Name(StandIn):
    """A class or function as the file names it. Calling it makes a stand-in, or one of Python's containers."""

    __slots__ = ()

    def __call__(self, *args: Any) -> Any:
        return CONTAINERS[self.origin](*args) if self.origin in CONTAINERS else StandIn(self.origin, args)


CONTAINERS: dict[str, Any] = {
    "collections.OrderedDict": dict,
    "collections.defaultdict": lambda *_: {},
    "torch.Size": tuple,
    "_codecs.encode": lambda text, _: text.encode("latin1"),  # how protocol 2 writes bytes
    **{f"{module}.{kind.__name__}": kind for module in ("builtins", "__builtin__") for kind in (set, frozenset)},
}


class RefusedError(Exception):
    """Why a file is not described."""


class Unpickler(pickle._Unpickler):
    """Python's pickle machine without imports and calls."""

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")
        self.storages: dict[str, tuple[int, str, int]] = {}  # index, kind and count by key

    def find_class(self, module: str, name: str) -> Name:
        origin = f"{module}.{name}"
        if len(origin) > 500 or not origin.isprintable():
            raise RefusedError("it names a class or function by something that is no name")
        return Name(origin)

    def persistent_load(self, pid: Any) -> StandIn:
        """A storage, or the class of a network whose source stands beside it."""
        match pid:
            case ("module" | b"module", Name() as origin, _, _):
                return origin
            case ("storage" | b"storage", Name(origin=name), str() as key, _, int() as count, *view) if count >= 0:
                kind = name.rpartition(".")[2].removesuffix("Storage")
                if kind not in SIZES:
                    raise RefusedError(f"it holds weights of the type {name}; dense tensors of common types are read")
                storage = self.storages.setdefault(key, (len(self.storages), kind, count))
                if storage[1:] != (kind, count):
                    raise RefusedError("the same weights in it have two types or sizes")
                _, start, length = view[0] if view and view[0] is not None else (None, 0, count)
                return StandIn("storage", (storage[0], start, length))
        raise RefusedError("it refers to something outside its pickle that is neither weights nor the source of a class")

    def build(self) -> None:
        """Attributes that are set on containers are dropped: nothing reads them."""
        state, target = self.stack.pop(), self.stack[-1]  # type: ignore[attr-defined]
        if isinstance(target, StandIn):
            target.restore(state)

    dispatch[pickle.BUILD[0]] = build
    dispatch[pickle.NEWOBJ[0]] = pickle._Unpickler.load_reduce  # type: ignore[attr-defined]


def describe(file: BinaryIO) -> str:
    """Two lines of JSON: the format and the kind, start, size and checksum of each storage; the content. Or an ``error``."""
    try:
        format = "zip" if file.read(4) == b"PK\x03\x04" else "legacy"
        content, storages = read_zip(file) if format == "zip" else read_legacy(file)
        head, body = {"format": format, "storages": storages}, Encoder()(content)
        text = f"{json.dumps(head)}\n{json.dumps(body, skipkeys=True, separators=(',', ':'))}"
        if len(text) > MAX_TEXT:
            raise RefusedError(f"what it holds beside its weights takes {len(text)} bytes, more than {MAX_TEXT}")
        return text
    except RefusedError as error:
        reason = str(error)
    except Exception as error:  # whatever broken bytes make the standard library raise, MemoryError and RecursionError, too
        reason = f"it is damaged or cut off, and cannot be decoded ({type(error).__name__}: {error})"
    return json.dumps({"error": reason})


def read_zip(file: BinaryIO) -> tuple[Any, list[list[Any]]]:
    """Content and storages of an archive, of which the standard library reads the directory only."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
    records = {entry.filename.partition("/")[2]: entry for entry in entries}
    if "constants.pkl" in records:
        raise RefusedError("it is a TorchScript archive, which is a program: save torch.jit.load(FILE).state_dict() instead")
    if len(records) != len(entries) or "data.pkl" not in records:
        raise RefusedError("it is a zip archive without a record data.pkl, or with two of one name, so not of torch.save")
    if "byteorder" in records and read_record(file, records["byteorder"]) != b"little":
        raise RefusedError("it was written on a big-endian machine")
    unpickler = Unpickler(io.BytesIO(read_record(file, records["data.pkl"])))
    content, storages = unpickler.load(), []
    for key, (_, kind, count) in unpickler.storages.items():
        record = records.get(f"data/{key}")
        if count and (record is None or record.file_size != count * SIZES[kind]):
            raise RefusedError(f"its archive lacks the {count} numbers of weights {key!r}")
        place = (find_record(file, record), record.file_size, record.CRC) if record and count else (0, 0, 0)
        storages.append([kind, *place])
    return content, storages


def find_record(file: BinaryIO, record: zipfile.ZipInfo) -> int:
    """Where the bytes of an uncompressed record begin."""
    file.seek(record.header_offset)
    signature, _, flags, method, _, _, crc, _, _, name, extra = struct.unpack("<4s5H3I2H", file.read(30))
    if method or record.compress_type or record.compress_size != record.file_size or flags & 1:
        raise RefusedError(f"{record.filename!r} in its archive is compressed or encrypted, which torch.save never does")
    crc_agrees = crc == record.CRC or (flags & 8 and not crc)  # flag: the numbers follow the data
    if signature != b"PK\x03\x04" or file.read(name) != record.orig_filename.encode() or not crc_agrees:
        raise RefusedError(f"{record.filename!r} in its archive has a header that disagrees with the directory")
    return int(record.header_offset + 30 + name + extra)


def read_record(file: BinaryIO, record: zipfile.ZipInfo) -> bytes:
    """The bytes of a record, checked against its checksum, which is 0 where torch wrote none."""
    file.seek(find_record(file, record))
    data = file.read(record.file_size)
    if len(data) != record.file_size or record.CRC not in (0, zlib.crc32(data)):
        raise RefusedError(f"{record.filename!r} in its archive does not have the checksum that was written with it")
    return data


def read_legacy(file: BinaryIO) -> tuple[Any, list[list[Any]]]:
    """Content and storages of the format before torch 1.6: five pickles, then each storage after its number of elements."""
    file.seek(0)
    magic, protocol, system = (Unpickler(file).load() for _ in range(3))
    if (magic, protocol) != (int.from_bytes(MAGIC, "little"), PROTOCOL):
        raise RefusedError(f"it is written in another version of its format than {PROTOCOL}")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise RefusedError("it was written on a big-endian machine, or does not say on which")
    unpickler = Unpickler(file)
    content, keys = unpickler.load(), Unpickler(file).load()
    if not isinstance(keys, list) or len(keys) != len(unpickler.storages):
        raise RefusedError("it describes other weights than it lists")
    position, places = file.tell(), {}
    for key in keys:
        _, kind, count = unpickler.storages[key]
        file.seek(position)
        if int.from_bytes(file.read(8), "little") != count:
            raise RefusedError(f"it describes {count} numbers of weights {key!r}, where others follow")
        places[key] = [kind, position + 8, count * SIZES[kind], 0]
        position += 8 + count * SIZES[kind]
    if position != file.seek(0, os.SEEK_END):
        raise RefusedError("it ends before its weights do, or goes on after them")
    return content, [places[key] for key in unpickler.storages]


class Encoder:
    """Makes of stand-ins and containers what JSON has: dicts and lists, in a tree whose walk comes to an end.

    What is shared is repeated, and a stand-in that lies in itself is cut off.
    """

    def __init__(self) -> None:
        self.parts = 0
        self.path: set[StandIn] = set()

    def __call__(self, value: Any, depth: int = 0) -> Any:
        if isinstance(value, (bytes, bytearray)):
            return value.decode("latin1")
        if not isinstance(value, (StandIn, dict, list, tuple, set, frozenset)):
            return value
        self.parts += 1
        if self.parts > MAX_PARTS or depth > MAX_DEPTH:
            limits = f"over {MAX_PARTS} parts when unfolded, or is nested more than {MAX_DEPTH} deep"
            raise RefusedError(f"what it holds has {limits}")
        if isinstance(value, dict):
            return {key: self(part, depth + 1) for key, part in value.items()}
        if not isinstance(value, StandIn):
            return [self(part, depth + 1) for part in value]
        made = {ORIGIN: value.origin}
        if value not in self.path:
            self.path.add(value)
            made |= {part: self(getattr(value, part), depth + 1) for part in PARTS if getattr(value, part)}
            self.path.remove(value)
        return made


def _refuse_event(event: str, args: tuple[Any, ...]) -> None:
    if event != "builtins.id":  # which encoding JSON needs
        raise RefusedError(f"it made its reader try {event}, which was stopped")


def main() -> None:
    """Describe standard input, within limits."""
    gc.disable()
    with suppress(ImportError):  # Windows has no limits
        import resource

        memory = BASE_MEMORY + 3 * os.fstat(0).st_size
        limits = {"AS": memory, "CPU": CPU_SECONDS, "CORE": 0, "FSIZE": 0, "NPROC": 0, "NOFILE": 3}
        for name, limit in limits.items():
            with suppress(ValueError, OSError):  # a lower one is set, or the system has none
                resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (limit, limit))
    with open(0, "rb", closefd=False) as file:
        sys.addaudithook(_refuse_event)
        sys.stdout.write(describe(file))
        sys.stdout.flush()
    os._exit(0)  # nothing that was made is torn down


if __name__ == "__main__":
    main()
