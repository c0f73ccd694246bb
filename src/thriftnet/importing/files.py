"""Reading any stored file by its content, whatever its name; nothing in it is run."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class StoredFile:
    """What a file holds.

    Args:
        content: State dict, dict around one, or stand-in for a pickled network.
        format: "torch zip", "torch legacy" or "safetensors".
    """

    content: Any
    format: str


def read_file(path: str | os.PathLike[str]) -> StoredFile:
    """Read a checkpoint, whose format its content shows.

    Args:
        path: A file of torch.save (zip or legacy, python-2 ones too) or safetensors.

    Raises:
        CheckpointError: There is no such file, it is not a checkpoint, or it is damaged; one line says which.
    """
    place = Path(path)
    head, size = _head(place)
    _refuse(place, head, size)
    if _looks_safetensors(head, size):
        return _read_safetensors(place)
    if not head.startswith(ZIP) and MAGIC not in head[:32]:
        raise CheckpointError(f"{place} is {_named(head)}. {POSSIBLE}")
    content, format = read_torch(place)
    return StoredFile(content, f"torch {format}")


def _head(place: Path) -> tuple[bytes, int]:
    """The first bytes, and the size."""
    try:
        if place.is_dir():
            raise CheckpointError(_folder(place))
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


def _folder(place: Path) -> str:
    if (place / "config.json").is_file():
        return f"{place} is a folder that thriftnet.save wrote, it seems: thriftnet.load reads it"
    return f"{place} is a folder: give the file in it"


def _refuse(place: Path, head: bytes, size: int) -> None:
    """Raise for what is not weights and looks like text or nothing."""
    if not size:
        raise CheckpointError(f"{place} is empty: copy it again")
    if head.startswith(LFS):
        stated = next((line.split()[-1] for line in head.decode("latin1").splitlines() if line.startswith("size ")), "")
        full = f" ({int(stated):,} bytes)" if stated.isdigit() else ""
        raise CheckpointError(f"{place} is a Git LFS pointer, not the weights{full}: fetch it with `git lfs pull`")
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError(
            f"{place} is a web page, not the weights: what was downloaded is the page about it, or an error"
        )
    if not _looks_safetensors(head, size) and _is_text(head):
        raise CheckpointError(f"{place} is text, not weights: it begins with {head[:40].decode('utf-8', 'replace')!r}")


def _is_text(head: bytes) -> bool:
    """Whether all of it is printable; a character may be cut at the end."""
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.start < len(head) - 3 or len(head) < HEAD:
            return False
        text = head[: error.start].decode()
    return all(character.isprintable() or character in "\t\r\n\f" for character in text)


def _named(head: bytes) -> str:
    """What a file is that is no checkpoint, as far as its beginning tells."""
    if head[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    return next(
        (name for start, name in OTHERS.items() if head.startswith(start)), "no checkpoint, or damaged at its beginning"
    )


def _looks_safetensors(head: bytes, size: int) -> bool:
    length = int.from_bytes(head[:8], "little")
    return len(head) > 9 and head[8:9] == b"{" and length <= size - 8


def _read_safetensors(place: Path) -> StoredFile:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return StoredFile(load_file(place), "safetensors")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{place} is a damaged safetensors file: {error}. Copy it again") from None
