"""What is done to a data set before it is opened: to the bytes of a file, to files and folders, and to what files hold."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from images import picture, png
from test_torchfile_hostile import mutant

HUGE = 1 << 36  # bytes that a sparse file seems to have
SUFFIXES = (".png", ".jpg")


@dataclass
class Damage:
    """What was done to a data set.

    Args:
        said: In words.
        files: Paths below the data set that hold what is damaged; "" for all of it.
        lost: Whether images may be missing without a word, as their files were removed.
        refused: Whether the data set must be refused.
    """

    said: str
    files: set[str] = field(default_factory=set)
    lost: bool = False
    refused: bool = False

    def covers(self, name: str) -> bool:
        """Whether an image is in what is damaged."""
        return any(not file or name == file or name.startswith((f"{file}/", f"{file},")) for file in self.files)


Way = Callable[[Path, random.Random], Damage]


def pick(root: Path, chance: random.Random) -> Path:
    """Any file of a data set."""
    return chance.choice(sorted(path for path in root.rglob("*") if path.is_file()))


def pick_class(root: Path, chance: random.Random) -> Path:
    """Any folder that holds files; the data set itself where there is no other."""
    return chance.choice(sorted({path.parent for path in root.rglob("*") if path.is_file()}))


def _bytes(said: str, change: Callable[[bytes, random.Random], bytes]) -> Way:
    def way(root: Path, chance: random.Random) -> Damage:
        path = pick(root, chance)
        path.write_bytes(change(path.read_bytes(), chance))
        return Damage(said, {str(path.relative_to(root))})

    return way


def _zeroed(data: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(data))
    stop = min(len(data), start + chance.choice([1, 16, 512, 4096]))
    return data[:start] + bytes(stop - start) + data[stop:]


def _flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.choice([1, 1, 3, 20])):
        changed[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def _at_the_end(data: bytes, chance: random.Random) -> bytes:
    keep = max(0, len(data) - chance.choice([8, 300, 3000]))  # where parquet has its description
    return data[:keep] + mutant(data[keep:], [data], chance)


BYTES: list[Way] = [
    _bytes("bits flipped", _flipped),
    _bytes("bytes changed", lambda data, chance: mutant(data, [data], chance)),
    _bytes("bytes changed at the end", _at_the_end),
    _bytes("cut short", lambda data, chance: data[: chance.randrange(len(data))]),
    _bytes("a block of zeros", _zeroed),
    _bytes("emptied", lambda data, chance: b""),
    _bytes("more at the end", lambda data, chance: data + chance.randbytes(chance.choice([1, 100, 10_000]))),
]


def _instead(said: str, put: Callable[[Path], object]) -> Way:
    def way(root: Path, chance: random.Random) -> Damage:
        path = pick(root, chance)
        path.unlink()
        put(path)
        return Damage(f"{said} instead of a file", {str(path.relative_to(root))})

    return way


def _class_instead(said: str, put: Callable[[Path], object]) -> Way:
    def way(root: Path, chance: random.Random) -> Damage:
        path = pick_class(root, chance)
        shutil.rmtree(path)
        put(path)
        gone = (
            path.parent == root and not path.is_symlink() and not path.is_dir()
        )  # as if there had never been such a class: other labels follow
        files = {"" if gone or path == root else str(path.relative_to(root))}
        return Damage(f"{said} instead of a folder", files, lost=gone)

    return way


def _sparse(root: Path, chance: random.Random) -> Damage:
    path = pick(root, chance)
    os.truncate(path, HUGE)
    return Damage(f"{HUGE:,} bytes, most of them zeros", {str(path.relative_to(root))})


def _removed(root: Path, chance: random.Random) -> Damage:
    path = pick(root, chance)
    path.unlink()
    return Damage("a file removed", {str(path.relative_to(root))}, lost=True)


def _renamed(name: Callable[[Path], bytes], said: str) -> Way:
    def way(root: Path, chance: random.Random) -> Damage:
        path = pick(root, chance)
        new = Path(os.fsdecode(os.fsencode(path.parent) + b"/" + name(path)))
        path.rename(new)
        return Damage(said, {str(path.relative_to(root)), str(new.relative_to(root))}, lost=True)

    return way


def _swapped(root: Path, chance: random.Random) -> Damage:
    one, other = pick(root, chance), pick(root, chance)
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)
    return Damage("two files swapped", {str(path.relative_to(root)) for path in (one, other)}, lost=True)


def _linked(root: Path, chance: random.Random) -> Damage:
    path = pick(root, chance)
    path.rename(root.parent / f"{root.name}-linked")
    path.symlink_to(root.parent / f"{root.name}-linked")
    return Damage("a link to a sound file")


def _added(said: str, add: Callable[[Path], object]) -> Way:
    def way(root: Path, chance: random.Random) -> Damage:
        add(pick_class(root, chance))
        return Damage(said)

    return way


FILES: list[Way] = [
    _instead("a pipe", os.mkfifo),
    _instead("an endless device", lambda path: path.symlink_to("/dev/zero")),
    _instead("a terminal", lambda path: path.symlink_to("/dev/tty")),
    _instead("a folder", lambda path: path.mkdir()),
    _instead("a link to nothing", lambda path: path.symlink_to("nowhere")),
    _instead("a link to itself", lambda path: path.symlink_to(path.name)),
    _class_instead("a link to nothing", lambda path: path.symlink_to("nowhere")),
    _class_instead("a link to itself", lambda path: path.symlink_to(path.name)),
    _class_instead("a pipe", os.mkfifo),
    _class_instead("a file", lambda path: path.write_bytes(b"text")),
    _class_instead("an empty folder", lambda path: path.mkdir()),
    _sparse,
    _removed,
    _swapped,
    _linked,
    _renamed(lambda path: os.fsencode("." + path.name), "a file hidden"),
    _renamed(lambda path: os.fsencode(path.stem), "a suffix removed"),
    _renamed(lambda path: os.fsencode(path.stem) + b"\xff\xfe" + os.fsencode(path.suffix), "a name that is not UTF-8"),
    _renamed(lambda path: os.fsencode(f"{path.stem}\n\x1b[31m{path.suffix}"), "a name with control characters"),
    _added("a link to a folder above", lambda place: (place / "up").symlink_to("..", True)),
    _added("a link to its own folder", lambda place: (place / "loop").symlink_to(".", True)),
    _added("hidden files", lambda place: (place / "._0.png").write_bytes(b"Mac OS X")),
    _added("notes", lambda place: (place / "notes.txt").write_text("no image")),
]


# -- what image files hold


def _saved(image: Image.Image, format: str, **how: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **how)
    return buffer.getvalue()


def _stating(width: int, height: int) -> bytes:
    """A PNG file that states another size."""
    data = bytearray(png(0))
    data[16:24] = struct.pack(">II", width, height)
    data[29:33] = struct.pack(">I", zlib.crc32(bytes(data[12:29])))
    return bytes(data)


def _bomb() -> bytes:
    """A small PNG file of many pixels."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    parts = ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def _turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return _saved(picture(3, 12, 8), "jpeg", exif=exif)


PICTURES: dict[str, Callable[[], bytes]] = {
    "16 bit": lambda: _saved(Image.fromarray(np.arange(144, dtype=np.uint16).reshape(12, 12) * 400), "png"),
    "fractions": lambda: _saved(Image.fromarray(np.random.default_rng(0).random((12, 12), dtype=np.float32)), "tiff"),
    "palette with transparency": lambda: _saved(picture(1).convert("P"), "png", transparency=3),
    "RGBA": lambda: _saved(picture(1).convert("RGBA"), "png"),
    "CMYK": lambda: _saved(picture(1).convert("CMYK"), "jpeg"),
    "black and white": lambda: _saved(picture(1).convert("1"), "tiff"),
    "one pixel": lambda: png(0, 1, 1),
    "very narrow": lambda: png(0, 1, 5000),
    "no pixels": lambda: _stating(0, 12),
    "far too large, it says": lambda: _stating(2**31 - 1, 2**31 - 1),
    "a decompression bomb": _bomb,
    "animated": lambda: _saved(picture(1), "gif", save_all=True, append_images=[picture(2), picture(3)]),
    "turned by its EXIF data": _turned,
    "webp": lambda: _saved(picture(1), "webp"),
    "postscript": lambda: _saved(picture(1), "eps"),
    "text": lambda: b"<html>not found</html>",
    "a Git LFS pointer": lambda: b"version https://git-lfs.github.com/spec/v1\nsize 100\n",
}


def _picture(root: Path, chance: random.Random) -> Damage:
    path = chance.choice(sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES))
    kind = chance.choice(sorted(PICTURES))
    path.write_bytes(PICTURES[kind]())
    return Damage(f"an image: {kind}", {str(path.relative_to(root))})


def _class_added(root: Path, chance: random.Random) -> Damage:
    """Another class: without images, or of a name that looks the same as another."""
    place = pick_class(root, chance)
    names = chance.choice([["more"], ["e\u0301", "\xe9"], ["caf\udce9"], ["\udcff"]])
    for name in names:
        if name == "more":
            place.with_name(name).mkdir()
        else:
            shutil.copytree(place, place.with_name(name))
    return Damage(f"a class {names!a} added", {str(place.parent.relative_to(root)).strip(".")}, refused=True)


# -- what tables hold


def _table(said: str, change: Callable[[Any, random.Random], Any], *, lost: bool = False, refused: bool = False) -> Way:
    def way(root: Path, chance: random.Random) -> Damage:
        from pyarrow import parquet

        path = pick(root, chance)
        parquet.write_table(change(parquet.ParquetFile(path).read(), chance), path, row_group_size=chance.choice([2, 100]))
        return Damage(f"a table: {said}", {str(path.relative_to(root))}, lost=lost, refused=refused)

    return way


def _with_label(at_random: bool, *values: Any, kind: str = "int64") -> Callable[[Any, random.Random], Any]:
    """Labels of another type; one of them, or all, with another value."""

    def change(table: Any, chance: random.Random) -> Any:
        import pyarrow

        labels = table.column("label").to_pylist()
        for place in [chance.randrange(len(labels))] if at_random else range(len(labels)):
            labels[place] = chance.choice(values) if values else labels[place]
        place = table.schema.get_field_index("label")
        return table.set_column(place, "label", pyarrow.array(map(str, labels) if kind == "string" else labels, kind))

    return change


def _with_names(*stated: Any) -> Callable[[Any, random.Random], Any]:
    """Another description of the classes."""

    def change(table: Any, chance: random.Random) -> Any:
        names = chance.choice(stated)
        text = names if isinstance(names, bytes) else json.dumps({"info": {"features": {"label": {"names": names}}}})
        return table.replace_schema_metadata({"huggingface": text})

    return change


def _with_content(*values: Any) -> Callable[[Any, random.Random], Any]:
    """One image with another content."""

    def change(table: Any, chance: random.Random) -> Any:
        import pyarrow

        images = table.column("image").to_pylist()
        images[chance.randrange(len(images))] = chance.choice(values)
        kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        return table.set_column(table.schema.get_field_index("image"), "image", pyarrow.array(images, kind))

    return change


def _as_text(table: Any, chance: random.Random) -> Any:
    import pyarrow

    images = pyarrow.array([{"bytes": "text"}] * len(table))
    return table.set_column(table.schema.get_field_index("image"), "image", images)


def _repeated(table: Any, chance: random.Random) -> Any:
    return table.append_column(chance.choice(["label", "image"]), table.column("label"))


TABLES: list[Way] = [
    _table("a negative label", _with_label(True, -1, -(2**40)), refused=True),
    _table("a label beyond the classes", _with_label(True, 3, 10, 2_000_000_000, 2**60), refused=True),
    _table("no label", _with_label(True, None), refused=True),
    _table("labels as text", _with_label(False, kind="string"), refused=True),
    _table("labels as fractions", _with_label(False, kind="double"), refused=True),
    _table("labels of another size", _with_label(False, kind="uint8")),
    _table("huge unsigned labels", _with_label(True, 2**64 - 1, kind="uint64"), refused=True),
    _table("no rows", lambda table, chance: table.slice(0, 0), lost=True),
    _table("no images", lambda table, chance: table.drop_columns(["image"]), refused=True),
    _table("no labels", lambda table, chance: table.drop_columns(["label"]), refused=True),
    _table("a column twice", _repeated),
    _table("another column", lambda table, chance: table.append_column("text", table.column("label"))),
    _table("columns in another order", lambda table, chance: table.select(table.column_names[::-1])),
    _table("a column renamed", lambda table, chance: table.rename_columns(["picture", "labels"])),
    _table("images as text", _as_text, refused=True),
    _table("a broken image", _with_content(None, {"bytes": b""}, {"bytes": b"text"}, {"bytes": png(1)[:100]})),
    _table("no class names", lambda table, chance: table.replace_schema_metadata({})),
    _table("class names of a wrong type", _with_names(5, "abc", [1, 2, 3], {"a": 1}, [None], {"0": ["x"]}), refused=True),
    _table("other class names", _with_names(["dog", "cat", "owl"], ["cat", "dog"], ["cat", "dog", "cow", "owl"])),
    _table("two classes of one name", _with_names(["cat", "cat", "owl"])),
    _table("a damaged description", _with_names(b"{", b"[]", b"\xff", b"[" * 100_000, b'{"info": 1}'), refused=True),
]


def _pickled(root: Path, chance: random.Random) -> Damage:
    path = chance.choice(sorted(root.rglob("*_batch*")))
    content = pickle.loads(path.read_bytes())  # noqa: S301 -- our own
    key = chance.choice(sorted(content))
    content[key] = chance.choice([content[key][:1], [-1, 99, 5], None, "text", np.zeros((3, 3072), dtype=np.float64)])
    path.write_bytes(pickle.dumps(content))
    return Damage(f"a pickle: other {key}", {str(path.relative_to(root))}, refused=True)


CONTENT: dict[str, list[Way]] = {
    "folder": [_picture, _picture, _picture, _class_added],
    "parquet": TABLES,
    "cifar10": [_pickled],
}
