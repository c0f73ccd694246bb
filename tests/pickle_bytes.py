"""Pickles, legacy files and zip archives of torch.save put together by hand, so that they can be wrong in one place."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
NONE, EMPTY_TUPLE = b"N", b")"


def text(value: str) -> bytes:
    """A string as Python 3 pickles it."""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def text2(value: bytes) -> bytes:
    """A string as Python 2 pickles it."""
    return b"U" + bytes([len(value)]) + value


def integer(value: int) -> bytes:
    return b"\x8a\x0a" + value.to_bytes(10, "little", signed=True)


def name(origin: str) -> bytes:
    module, _, attribute = origin.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def tuple_of(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(origin: str, *args: bytes) -> bytes:
    return name(origin) + tuple_of(*args) + b"R"


def dict_of(**items: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def list_of(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def storage(count: int, key: str = "0", kind: str = "torch.FloatStorage", *, view: bytes | None = NONE) -> bytes:
    """A storage by persistent id; archives have no field for views: ``view=None``."""
    fields = [text("storage"), name(kind), text(key), text("cuda:0"), integer(count), *([view] if view is not None else [])]
    return tuple_of(*fields) + b"Q"


def tensor(source: bytes, size: Iterable[int], stride: Iterable[int], offset: int = 0) -> bytes:
    shape, steps = tuple_of(*map(integer, size)), tuple_of(*map(integer, stride))
    hooks = call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", source, integer(offset), shape, steps, b"\x89", hooks)


def pickled(body: bytes) -> bytes:
    return b"\x80\x02" + body + b"."


def legacy(
    body: bytes,
    weights: dict[str, bytes] | None = None,
    *,
    itemsize: int = 4,
    system: bytes = dict_of(little_endian=b"\x88"),
) -> bytes:
    """A file of the format before torch 1.6; ``weights`` are the bytes of each storage."""
    weights = weights or {}
    parts = [MAGIC, pickled(integer(1001)), pickled(system), pickled(body), pickled(list_of(*map(text, weights)))]
    for data in weights.values():
        parts.append(struct.pack("<q", len(data) // itemsize) + data)
    return b"".join(parts)


@dataclass(frozen=True)
class Entry:
    """One record of an archive: its data, and what directory and header say of it where that is to differ."""

    name: str
    data: bytes = b""
    method: int = 0
    attributes: int = 0
    size: int | None = None
    header_size: int | None = None
    header_name: str | None = None
    offset: int | None = None
    crc: int | None = None
    packed: int | None = None
    wide: bool = False  # whether its numbers stand in a zip64 field, as those of over 4 GiB do


def archive(*entries: Entry, more: bytes = b"", gap: bytes = b"", comment: bytes = b"") -> bytes:
    """A zip archive."""
    out, directory = io.BytesIO(), b""
    for entry in entries:
        offset = out.tell() if entry.offset is None else entry.offset
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        size = len(entry.data) if entry.size is None else entry.size
        stated = size if entry.header_size is None else entry.header_size
        own, listed = (entry.header_name or entry.name).encode(), entry.name.encode()
        fixed = (20, 0, entry.method, 0, 0, crc)
        out.write(struct.pack("<4sHHHHHIIIHH", b"PK\x03\x04", *fixed, stated, stated, len(own), 0) + own + entry.data)
        extra = struct.pack("<HHHHQQQ", 0x9999, 0, 1, 24, size, size, offset) if entry.wide else b""
        size, offset = (0xFFFFFFFF, 0xFFFFFFFF) if entry.wide else (size, offset)
        tail = (
            size if entry.packed is None else entry.packed,
            size,
            len(listed),
            len(extra),
            0,
            0,
            0,
            entry.attributes,
            offset,
        )
        directory += struct.pack("<4sHHHHHHIIIHHHHHII", b"PK\x01\x02", 20, *fixed, *tail) + listed + extra
    place = out.tell()
    directory += more
    count = len(entries)
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, count, count, len(directory), place, len(comment)) + comment
    return out.getvalue() + directory + gap + end


def zipped(body: bytes, *more: Entry, weights: dict[str, bytes] | None = None, **changes: Any) -> bytes:
    """A sound archive of torch.save, with further records, or its pickle's entry changed."""
    records = [replace(Entry("archive/data.pkl", pickled(body)), **changes)]
    records += [Entry(f"archive/data/{key}", data) for key, data in (weights or {}).items()]
    return archive(*records, *more)


def saved(value: Any, *, archived: bool = True, protocol: int = 2) -> bytes:
    """What torch.save writes."""
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=archived, pickle_protocol=protocol)
    return out.getvalue()
