"""Reading any stored file by its content, whatever its name; nothing in it is run."""

from __future__ import annotations

import codecs
import os
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from thriftnet.errors import CheckpointError
from thriftnet.importing.inert import MAGIC
from thriftnet.importing.torchfile import read_torch

HEAD = 4096  # bytes that are looked at
ZIP = b"PK\x03\x04"
LFS = b"version https://git-lfs.github.com/spec/"
# how files begin that are often mistaken for checkpoints -> what they are
OTHERS = {
    b"\x89HDF": "an HDF5 file",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "compressed with xz: unpack it first",
    b"\x93NUMPY": "one NumPy array",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a picture",
    b"\xff\xd8\xff": "a picture",
    b"\x7fELF": "a program",
    b"\x80": "a pickle, but not one of torch.save",
}
POSSIBLE = "Possible are files of torch.save, old and new, and safetensors"


def read_file(path: str | os.PathLike[str]) -> tuple[Any, str]:
    """What a checkpoint holds: a state dict, a dict around one, or the stand-in for a pickled network; and its format.

    Args:
        path: A file of torch.save ("torch zip", or "torch legacy", python-2 ones too) or "safetensors": its content shows which.

    Raises:
        CheckpointError: There is no such file, it is not a checkpoint, or it is damaged; one line says which.
    """
    place = Path(path)
    head, size = _head(place)
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return _read_safetensors(place), "safetensors"
    if not head.startswith(ZIP) and MAGIC not in head[:32]:
        raise CheckpointError(f"{place} is {_mistaken(head)}")
    content, format = read_torch(place)
    return content, f"torch {format}"


def _head(place: Path) -> tuple[bytes, int]:
    """The first bytes, and the size."""
    try:
        if (place / "config.json").is_file():
            raise CheckpointError(f"{place} is a folder that thriftnet.save wrote, it seems: thriftnet.load reads it")
        if place.is_dir():
            raise CheckpointError(f"{place} is a folder: give the file in it")
        if place.exists() and not place.is_file():
            raise CheckpointError(f"{place} is a device or pipe: copy what it gives to a file")
        with place.open("rb") as file:
            return file.read(HEAD), place.stat().st_size
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {place}") from None
    except PermissionError:
        raise CheckpointError(f"{place} may not be read: its permissions forbid it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{str(place)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _mistaken(head: bytes) -> str:
    """What a file is that is no checkpoint, as far as its beginning tells, and what to do."""
    if not head:
        return "empty: copy it again"
    if head.startswith(LFS):
        size = re.search(rb"\nsize (\d+)", head)
        full = f" ({int(size[1]):,} bytes)" if size else ""
        return f"a Git LFS pointer, not the weights{full}: fetch it with `git lfs pull`"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "a web page, not the weights: what was downloaded is the page about it, or an error"
    if _is_text(head):
        return f"text, not weights: it begins with {head[:40].decode('utf-8', 'replace')!r}"
    if head[257:262] == b"ustar":
        return f"a tar archive: unpack it first. {POSSIBLE}"
    known = (name for start, name in OTHERS.items() if head.startswith(start))
    return f"{next(known, 'no checkpoint, or damaged at its beginning')}. {POSSIBLE}"


def _is_text(head: bytes) -> bool:
    """Whether all of it is printable; a character may be cut at the end."""
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head, final=len(head) < HEAD)
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)


def _read_safetensors(place: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(place)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{place} is a damaged safetensors file: {error}. Copy it again") from None
