"""Reads what torch.save wrote without running anything that the file contains.

Weights, numbers, text and containers come back as they were. Every class or function that the file names, and that is not on the
short list in `rebuild`, becomes an inert `StandIn` that keeps what it was made with: whole pickled networks can be looked
through without their code. Every size that the file states is checked against what is there before memory is taken for it.

Read are zip archives and the older format in one stream, on the CPU, also as written by Python 2. Not read: sparse, quantized and
complex tensors, expanded ones (more elements than stored), numpy arrays of anything but numbers, pickled parts of more than
64 MiB (weights aside), TorchScript, the tar format of torch before 0.1.10.

    StandIn        takes the place of a class
    read_pickled   file -> PickledFile
    looks_pickled  first bytes -> bool
"""

from __future__ import annotations

import os
import re
import stat
from dataclasses import dataclass
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from thriftnet.errors import CheckpointError
from thriftnet.importing.inert import Budget, Name, StandIn, damaged, unsupported
from thriftnet.importing.pickle_machine import Machine
from thriftnet.importing.rebuild import MAX_EXTENT, STORAGES
from thriftnet.importing.torchfile import Record, as_dtype, fill, new_bytes, read_directory, read_record, read_storage

__all__ = ["PickledFile", "StandIn", "looks_pickled", "read_pickled"]

MAX_PICKLE = 64 << 20
MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
MAGIC_START = re.compile(rb"\x80[\x02-\x05](\x95.{8})?\x8a\x0a" + re.escape(MAGIC.to_bytes(10, "little")), re.DOTALL)
ZIP_START = b"PK\x03\x04"
FIRST_RECORD = re.compile(rb"[^/]+/(data\.pkl|version|byteorder|constants\.pkl|\.format_version|data/\w+)")
ADVICE = "torch.save writes such a file; give one that it wrote"


@dataclass(frozen=True)
class PickledFile:
    """What torch.save wrote: dicts, lists, numbers, tensors (plain, on the CPU), and stand-ins for everything else.

    Tensors that shared memory share it again. Stand-ins may hold each other in a circle; lists, tuples and dicts do not.
    """

    content: Any
    format: Literal["zip", "legacy"]


def read_pickled(path: str | os.PathLike[str]) -> PickledFile:
    """Read a file of torch.save; nothing in it is executed or imported, and the file is only read.

    Args:
        path: The file: a zip archive, or the format before torch 1.6.

    Raises:
        CheckpointError: Whatever is wrong with the file, in one line.
    """
    try:
        return _read(path)
    except CheckpointError as error:
        reason = str(error)
    except MemoryError:
        reason = "there is not enough memory. Close other programs, or use a machine with more"
    except OSError as error:
        reason = f"{error.strerror or error}. Check the path and that you may read it"
    raise CheckpointError(f"cannot read {_one_line(str(path), 500)}: {_one_line(reason, 600)}")


def looks_pickled(head: bytes) -> bool:
    """Whether a file that begins like this (a hundred bytes or more are best) may be one of torch.save."""
    if head.startswith(ZIP_START) and len(head) >= 30:
        length = int.from_bytes(head[26:28], "little")
        return FIRST_RECORD.fullmatch(head[30 : 30 + length]) is not None
    return MAGIC_START.match(head) is not None


def _read(path: str | os.PathLike[str]) -> PickledFile:
    try:
        state = os.stat(path)
    except ValueError as error:  # null characters, lone surrogates
        raise CheckpointError(f"no file can have this path ({error}). Check it") from None
    if stat.S_ISDIR(state.st_mode):
        raise CheckpointError("it is a folder. Give the file in it")
    if not stat.S_ISREG(state.st_mode):
        raise CheckpointError("it is a device or pipe. Copy it to a file first")
    if not state.st_size:
        raise CheckpointError("it is empty. Copy or download it again")
    with open(path, "rb") as file:
        head = file.read(512)
        if head.startswith(ZIP_START):
            return PickledFile(_read_zip(file, state.st_size), "zip")
        if MAGIC_START.match(head):
            return PickledFile(_read_legacy(file, state.st_size), "legacy")
    raise _other_format(head)


def _other_format(head: bytes) -> CheckpointError:
    if head.startswith(b"version https://git-lfs"):
        return CheckpointError("it is a Git LFS pointer, not the file itself. Get the file with `git lfs pull`")
    if head[257:262] == b"ustar":
        return unsupported("it is a tar archive, as torch before 0.1.10 wrote; that format is not read")
    if head[:1] == b"\x80":
        return CheckpointError(f"it is a pickle, but not of torch.save. {ADVICE}")
    return CheckpointError(f"it is no file of torch.save: it begins with {head[:16]!r}. {ADVICE}")


# -- zip archives


def _read_zip(file: BinaryIO, size: int) -> Any:
    records = read_directory(file, size)
    if "data.pkl" not in records:
        raise CheckpointError(f"it is a zip archive without a record data.pkl. {ADVICE}")
    if "constants.pkl" in records:
        raise unsupported("it is a TorchScript archive, which is a program")
    if records["data.pkl"].size > MAX_PICKLE:
        raise unsupported(f"its pickled part has {records['data.pkl'].size} bytes; {MAX_PICKLE} are read at most")
    order = b"little"
    if "byteorder" in records:
        order = read_record(file, "byteorder", records["byteorder"]) if records["byteorder"].size < 16 else b"?"
    if order not in (b"little", b"big"):
        raise damaged(f"its byte order is {order!r}, not little or big")
    data = read_record(file, "data.pkl", records["data.pkl"])
    return _complete(Machine(data, 0, Budget(len(data)), _ZipStorages(file, records, order == b"big")))


def _complete(machine: Machine) -> Any:
    content = machine.read()
    if machine.position != len(machine.data):
        raise damaged("something follows its pickle")
    return content


class _ZipStorages:
    """Gives the storages of an archive as flat tensors, each one once."""

    def __init__(self, file: BinaryIO, records: dict[str, Record], swap: bool) -> None:
        self.file = file
        self.records = records
        self.swap = swap
        self.read: dict[str, Tensor] = {}

    def __call__(self, persistent_id: Any) -> Any:
        kind, fields = _parse_id(persistent_id)
        if kind == "module":
            return fields[0]
        dtype, key, count, view = _parse_storage(fields)
        if view is not None:
            raise damaged("a storage in it is a view of another, which archives do not have")
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if key not in self.read:
            self.read[key] = self._storage(f"data/{key}", dtype, count)
        return _same(self.read[key], dtype, count)

    def _storage(self, name: str, dtype: torch.dtype, count: int) -> Tensor:
        if name not in self.records:
            raise damaged(f"its archive lacks the weights {name!r}")
        if self.records[name].size != count * dtype.itemsize:
            raise damaged(f"{count} numbers of type {dtype} cannot have {self.records[name].size} bytes, as {name!r} has")
        return as_dtype(read_storage(self.file, name, self.records[name]), dtype, swap=self.swap)


# -- the format before torch 1.6: five pickles, then the storages


def _read_legacy(file: BinaryIO, size: int) -> Any:
    file.seek(0)
    data = file.read(min(size, MAX_PICKLE))
    budget = Budget(len(data))
    storages = _LegacyStorages(size)
    position, values = 0, []
    for _ in range(5):
        machine = Machine(data, position, budget, storages)
        values.append(machine.read())
        position = machine.position
    magic, protocol, system, content, keys = values
    if not (isinstance(magic, int) and magic == MAGIC and isinstance(protocol, int) and protocol == PROTOCOL):
        raise unsupported(f"it is written in another version of its format than {PROTOCOL}")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise unsupported("it was written on a big-endian machine, or does not say on which")
    storages.fill(file, position, keys)
    return content


class _LegacyStorages:
    """Gives storages before their bytes are read, which come last in the file."""

    def __init__(self, file_size: int) -> None:
        self.left = file_size
        self.raw: dict[str, Tensor] = {}
        self.typed: dict[str, Tensor] = {}
        self.views: dict[tuple[str, str], tuple[int, int, Tensor]] = {}

    def __call__(self, persistent_id: Any) -> Any:
        kind, fields = _parse_id(persistent_id)
        if kind == "module":
            return fields[0]
        dtype, key, count, view = _parse_storage(fields)
        if key not in self.raw:
            self.left -= count * dtype.itemsize
            if self.left < 0:
                raise damaged("it describes more weights than it has bytes")
            self.raw[key] = new_bytes(count * dtype.itemsize)
            self.typed[key] = self.raw[key].view(dtype)
        storage = _same(self.typed[key], dtype, count)
        return storage if view is None else self._view(key, storage, view)

    def _view(self, key: str, storage: Tensor, view: Any) -> Tensor:
        match view:
            case (str() as name, int() as offset, int() as count) if 0 <= offset <= offset + count <= storage.numel():
                known = self.views.setdefault((key, name), (offset, count, storage[offset : offset + count]))
                if known[:2] == (offset, count):
                    return known[2]
        raise damaged("a storage in it is a view that leaves its storage, or one of two places")

    def fill(self, file: BinaryIO, position: int, keys: Any) -> None:
        if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
            raise damaged("its list of storages is none")
        if len(set(keys)) != len(keys) or set(keys) != set(self.raw):
            raise damaged(f"it describes {len(self.raw)} storages, but lists {len(keys)} others")
        file.seek(position)
        for key in keys:
            count = torch.empty(8, dtype=torch.uint8)
            fill(file, count)
            if int(count.view(torch.int64)) != self.typed[key].numel():
                raise damaged(f"it describes {self.typed[key].numel()} numbers, where {int(count.view(torch.int64))} follow")
            fill(file, self.raw[key])
            as_dtype(self.raw[key], self.typed[key].dtype)
        if file.read(1):
            raise damaged("something follows its weights")


# -- persistent ids


def _parse_id(persistent_id: Any) -> tuple[str, tuple[Any, ...]]:
    match persistent_id:
        case (str() | bytes() as kind, *fields) if kind in ("storage", b"storage"):
            return "storage", tuple(fields)
        case (str() | bytes() as kind, Name(), _, _) if kind in ("module", b"module"):
            return "module", persistent_id[1:]
    raise damaged("it refers to something outside its pickle that is neither weights nor the source of a class")


def _parse_storage(fields: tuple[Any, ...]) -> tuple[torch.dtype, str, int, Any]:
    """Dtype, key, number of elements, and the view of it that is meant. The device is of no concern."""
    match fields:
        case (Name() as kind, str() as key, _, int() as count, *view) if 0 <= count < MAX_EXTENT and len(view) < 2:
            if kind.origin not in STORAGES:
                raise unsupported(f"it holds weights of the type {kind.origin}; read are {', '.join(sorted(STORAGES)[:10])}")
            return STORAGES[kind.origin], key, count, view[0] if view else None
    raise damaged("weights in it are described by something else than type, key, device and count")


def _same(storage: Tensor, dtype: torch.dtype, count: int) -> Tensor:
    if storage.dtype is not dtype or storage.numel() != count:
        raise damaged("the same weights in it have two types or sizes")
    return storage


def _one_line(text: str, limit: int) -> str:
    plain = "".join(char if char.isprintable() else "?" for char in text)
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."
