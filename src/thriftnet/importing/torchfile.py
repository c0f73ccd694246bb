"""The zip archives of torch.save, read by their directory after a check that it describes the file truthfully.

Python's zipfile makes an object per entry before anything can be checked, and joins, overlaps and inflates what it is told to.

Source: APPNOTE 6.3.10 of the ZIP format; PyTorch writes all records uncompressed, in one folder, without a comment.
"""

from __future__ import annotations

import stat
import struct
import zlib
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from thriftnet.errors import CheckpointError
from thriftnet.importing.inert import damaged, unsupported

MAX_RECORDS, MAX_DIRECTORY = 100_000, 64 << 20
LOCAL, ENTRY, END = "<4sHHHHHIIIHH", "<4sHHHHHHIIIHHHHHII", "<4sHHHHIIH"
END_64, LOCATOR_64 = "<4sQHHIIQQQQ", "<4sIQI"
IN_EXTRA, LATER = 0xFFFFFFFF, 8  # a number that stands in the zip64 field; a flag: sizes follow the data
FLAGS_READ = 0x0800 | LATER  # names in UTF-8


@dataclass(frozen=True)
class Record:
    """One file of the archive: where its bytes are, and their checksum, 0 where torch wrote none."""

    start: int
    size: int
    crc: int


@dataclass(frozen=True)
class _Entry:
    name: str
    header: int
    size: int
    crc: int


def read_directory(file: BinaryIO, file_size: int) -> dict[str, Record]:
    """The archive's records by their name inside its one folder.

    Raises:
        CheckpointError: No archive of torch.save, or one that contradicts itself.
    """
    start, length, count = _directory_place(file, file_size)
    if count > MAX_RECORDS or length > MAX_DIRECTORY:
        raise unsupported(f"its archive has {count} records; {MAX_RECORDS} are read at most")
    entries = sorted(_entries(_read_at(file, start, length), count), key=lambda entry: entry.header)
    folder = entries[0].name.partition("/")[0] if entries else ""
    records: dict[str, Record] = {}
    for entry, limit in zip(entries, [entry.header for entry in entries[1:]] + [start]):
        record = _located(file, entry, limit)
        head, slash, name = entry.name.partition("/")
        if not slash or head != folder:
            raise damaged(f"its archive has {_shown(entry.name)} outside the folder {_shown(folder)}")
        if name in records:
            raise damaged(f"its archive has {_shown(name)} twice")
        records[name] = record
    return records


def read_record(file: BinaryIO, name: str, record: Record) -> bytes:
    """A record's bytes, checked against its checksum."""
    data = _read_at(file, record.start, record.size)
    _check_crc(name, record, zlib.crc32(data) if record.crc else 0)
    return data


def read_storage(file: BinaryIO, name: str, record: Record) -> Tensor:
    """A record's bytes as a tensor of its own, checked against its checksum."""
    raw = new_bytes(record.size)
    file.seek(record.start)
    fill(file, raw)
    _check_crc(name, record, zlib.crc32(_bytes_of(raw)) if record.crc else 0)
    return raw


def new_bytes(size: int) -> Tensor:
    """Memory for a storage.

    Raises:
        CheckpointError: There is not as much.
    """
    try:
        return torch.empty(size, dtype=torch.uint8)
    except RuntimeError:
        raise CheckpointError(f"it has {size} bytes of weights in one piece, more than there is memory") from None


def fill(file: BinaryIO, raw: Tensor) -> None:
    """Read the next bytes of the file into a tensor."""
    view = _bytes_of(raw)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]  # typeshed lacks it on BinaryIO
        if not count:
            raise damaged("it ends before its weights do")
        done += count


def _bytes_of(raw: Tensor) -> memoryview:
    return memoryview(raw.numpy())  # type: ignore[arg-type]  # numpy's arrays are buffers, which typeshed knows from 3.12 on


def as_dtype(raw: Tensor, dtype: torch.dtype, *, swap: bool = False) -> Tensor:
    """Bytes as numbers; truth values are made 0 or 1."""
    if dtype is torch.bool:
        raw.clamp_(max=1)
    numbers = raw.view(dtype)
    if swap and dtype.itemsize > 1:
        numbers.untyped_storage().byteswap(dtype)  # type: ignore[no-untyped-call]  # of torch
    return numbers


def _directory_place(file: BinaryIO, file_size: int) -> tuple[int, int, int]:
    """Start, length and number of entries of the central directory, which must end where its end record starts."""
    position = file_size - struct.calcsize(END)
    signature, disk, first_disk, here, count, length, start, comment = _unpack_at(file, END, position)
    if signature != b"PK\x05\x06" or comment:
        raise damaged("it starts as a zip archive, but does not end as torch.save ends one")
    if disk or first_disk or here != count:
        raise damaged("its archive is a part of several")
    locator = position - struct.calcsize(LOCATOR_64)
    if locator >= 0 and _read_at(file, locator, 4) == b"PK\x06\x07":
        position = _unpack_at(file, LOCATOR_64, locator)[2]
        if position + struct.calcsize(END_64) != locator:
            raise damaged("its archive's directory is not where it should be")
        end = _unpack_at(file, END_64, position)
        if end[0] != b"PK\x06\x06" or end[4] or end[5] or end[6] != end[7]:
            raise damaged("its archive's directory is broken")
        for short, full, saturated in ((count, end[7], 0xFFFF), (length, end[8], IN_EXTRA), (start, end[9], IN_EXTRA)):
            if short not in (full, saturated):
                raise damaged("its archive has two directories that differ")
        count, length, start = end[7:]
    if start + length != position:
        raise damaged("its archive's directory is not where it should be")
    return start, length, count


def _entries(directory: bytes, count: int) -> list[_Entry]:
    entries, position, fixed = [], 0, struct.calcsize(ENTRY)
    for _ in range(count):
        if position + fixed > len(directory):
            raise damaged("its archive's directory is cut off")
        fields = struct.unpack_from(ENTRY, directory, position)
        name_end = position + fixed + fields[10]
        extra_end = name_end + fields[11]
        if fields[0] != b"PK\x01\x02" or extra_end + fields[12] > len(directory):
            raise damaged("its archive's directory is broken")
        name = _checked_name(directory[position + fixed : name_end])
        entries.append(_entry(name, fields, directory[name_end:extra_end]))
        position = extra_end + fields[12]
    if position != len(directory):
        raise damaged("its archive's directory is longer than its entries")
    return entries


def _entry(name: str, fields: tuple[Any, ...], extra: bytes) -> _Entry:
    _, _, _, flags, method, _, _, crc, packed, size, _, _, _, disk, _, attributes, header = fields
    if method or flags & ~FLAGS_READ:
        raise unsupported(f"{_shown(name)} in its archive is compressed or encrypted, which torch.save never does")
    if stat.S_ISLNK(attributes >> 16):
        raise damaged(f"{_shown(name)} in its archive is a symbolic link")
    wide = [number for number in (size, packed, header) if number == IN_EXTRA]
    found = iter(_zip64(extra, len(wide)))
    size, packed, header = [next(found) if number == IN_EXTRA else number for number in (size, packed, header)]
    if packed != size or disk:
        raise damaged(f"{_shown(name)} in its archive has two sizes, {packed} and {size}")
    return _Entry(name, header, size, crc)


def _zip64(extra: bytes, count: int) -> tuple[int, ...]:
    """The numbers that were too large for their place in the entry."""
    position = 0
    while count and position + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, position)
        if kind == 1 and length >= 8 * count and position + 4 + 8 * count <= len(extra):
            return struct.unpack_from(f"<{count}Q", extra, position + 4)
        position += 4 + length
    if count:
        raise damaged("its archive's directory lacks a size")
    return ()


def _located(file: BinaryIO, entry: _Entry, limit: int) -> Record:
    """The record of an entry, whose own header must agree, and which must end before the next one begins."""
    fixed = struct.calcsize(LOCAL)
    if entry.header + fixed + entry.size > limit:
        raise damaged(f"{_shown(entry.name)} in its archive overlaps what follows")
    fields = _unpack_at(file, LOCAL, entry.header)
    _, _, flags, method, _, _, crc, packed, size, name_length, extra_length = fields
    name = _read_at(file, entry.header + fixed, name_length)
    if fields[0] != b"PK\x03\x04" or name != entry.name.encode() or method or flags & ~FLAGS_READ:
        raise damaged(f"{_shown(entry.name)} in its archive has a header that disagrees with the directory")
    given_later = flags & LATER and not (crc or packed or size)
    sizes_agree = all(number in (entry.size, IN_EXTRA) for number in (packed, size))
    if not given_later and not (sizes_agree and crc == entry.crc):
        raise damaged(f"{_shown(entry.name)} in its archive has another size in its header than in the directory")
    start = entry.header + fixed + name_length + extra_length
    if start + entry.size > limit:
        raise damaged(f"{_shown(entry.name)} in its archive overlaps what follows")
    return Record(start, entry.size, entry.crc)


def _checked_name(data: bytes) -> str:
    try:
        name = data.decode("utf-8")
    except UnicodeDecodeError:
        raise damaged("its archive has a name that is no UTF-8") from None
    parts = name.split("/")
    if len(name) > 1000 or not name.isprintable() or "\\" in name or any(part in ("", ".", "..") for part in parts):
        raise damaged(f"its archive has the name {_shown(name)}, which leads elsewhere")
    return name


def _check_crc(name: str, record: Record, crc: int) -> None:
    if crc != record.crc:
        raise damaged(f"{_shown(name)} in its archive does not have the checksum that was written with it")


def _unpack_at(file: BinaryIO, layout: str, position: int) -> tuple[Any, ...]:
    return struct.unpack(layout, _read_at(file, position, struct.calcsize(layout)))


def _read_at(file: BinaryIO, position: int, count: int) -> bytes:
    if position < 0:
        raise damaged("its archive is cut off")
    file.seek(position)
    data = file.read(count)
    if len(data) != count:
        raise damaged("its archive is cut off")
    return data


def _shown(name: str) -> str:
    return repr(name[:80])
