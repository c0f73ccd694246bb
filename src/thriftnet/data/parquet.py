"""Parquet tables in the layout of Hugging Face: a column of encoded images and a column of labels."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from thriftnet.data.dataset import DataSource, normal_name
from thriftnet.data.decode import EncodedImages
from thriftnet.data.folder import IMAGENET_MEAN, IMAGENET_STD, SPLITS
from thriftnet.errors import DataError
from thriftnet.files import open_regular
from thriftnet.text import shortened

NAME = re.compile(rf"({'|'.join(SPLITS)})([-._/].*)?\.parquet")
OF = re.compile(r"-(\d+)-of-(\d+)(?:-[0-9a-f]+)?\.parquet")
LABELS = ("label", "labels", "fine_label")
CACHE_BYTES = 1 << 30  # of encoded images, in each process


class ParquetImages(EncodedImages):
    """Rows of parquet files; a row group is read when one of its rows is asked for, and kept up to `CACHE_BYTES`.

    ``image`` names the column of images, a struct with ``bytes``, ``label`` that of labels; "": there are none.
    """

    def __init__(self, files: list[Path], image: str, label: str) -> None:
        self.files = files
        self.column = image
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()
        self.groups: list[tuple[int, int]] = []  # number of the file, and of the group in it
        self.versions: list[tuple[int, int]] = []  # of each file, when its labels were read
        starts, labels, self.first_rows = [0], [], [0]
        for number, path in enumerate(files):
            with table_in(path) as (file, version):
                for group in range(file.num_row_groups):
                    self.groups.append((number, group))
                    starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
                self.first_rows.append(starts[-1])
                if label:
                    labels.append(_labels(file.read([label], use_threads=False).column(0), f"column {label!r}"))
                else:
                    labels.append(np.zeros(starts[-1] - self.first_rows[-2], dtype=np.int64))
                if len(labels[-1]) != starts[-1] - self.first_rows[-2]:
                    raise ValueError(f"it has {len(labels[-1])} labels, and states {starts[-1] - self.first_rows[-2]} rows")
                self.versions.append(version)
        self.starts = np.array(starts)
        self.labels = torch.from_numpy(np.concatenate(labels))

    def check_labels(self, classes: int) -> None:
        """Refuse labels beyond the classes; the message names the row."""
        wrong = (self.labels >= classes).nonzero().flatten().tolist()
        if wrong:
            file = int(np.searchsorted(self.first_rows, wrong[0], side="right")) - 1
            raise DataError(
                f"{self.files[file]}, row {wrong[0] - self.first_rows[file]}, has the label {int(self.labels[wrong[0]])}: "
                f"with {classes} classes, labels are 0 to {classes - 1}"
            )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def encoded(self, index: int) -> tuple[bytes, str]:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        file, _ = self.groups[group]
        with self._lock:
            images = self._group(group)
        if isinstance(images, DataError):
            raise images
        content = images[index - int(self.starts[group])].as_py()
        return content or b"", f"{self.files[file]}, row {index - self.first_rows[file]},"

    def _group(self, group: int) -> Any:
        """The encoded images of a row group, or why it cannot be read."""
        if group not in self._cache:
            try:
                self._cache[group] = self._read(group)
            except DataError as error:
                self._cache[group] = error  # reading it again for each of its rows would take long
            while len(self._cache) > 1 and sum(getattr(kept, "nbytes", 0) for kept in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]

    def _read(self, group: int) -> Any:
        number, own = self.groups[group]
        rows = int(self.starts[group + 1] - self.starts[group])
        with table_in(self.files[number]) as (file, version):
            if version != self.versions[number]:
                raise ValueError("it was changed after it was opened: start again")
            column = file.read_row_group(own, [f"{self.column}.bytes"], use_threads=False).column(0)
            column.validate(full=True)
            if len(column) != rows:
                raise ValueError(f"row group {own} has {len(column)} images, and states {rows} rows")
            return column.combine_chunks().field("bytes")


@contextmanager
def table_in(path: Path) -> Iterator[tuple[Any, tuple[int, int]]]:
    """An open parquet file, and its version; errors in the block are raised as `DataError` that names the file."""
    from pyarrow import parquet

    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            yield parquet.ParquetFile(file, page_checksum_verification=True), (status.st_size, status.st_mtime_ns)
    except DataError:
        raise
    except Exception as error:  # pyarrow raises its own, and OSError, ValueError, IndexError, UnicodeDecodeError, ...
        reason = shortened(" ".join((getattr(error, "strerror", None) or str(error)).split()), 200) or type(error).__name__
        raise DataError(f"{path} cannot be read: {reason}. Get it again; on_corrupt='skip' only skips images") from None


def open_parquet(folder: Path) -> DataSource:
    """All splits of a folder of parquet files, named ``train-*``, ``validation-*`` and ``test-*``, there or in ``data``."""
    require_pyarrow()
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}. parquet:DIR needs files train-*.parquet and test-*.parquet in DIR")
    for place in (folder, folder / "data"):
        names = files_by_split(path.name for path in place.glob("*.parquet"))
        if names:
            files = {split: [place / name for name in found] for split, found in names.items()}
            return read_parquet(f"parquet:{folder}", files)
    raise DataError(
        f"{folder} has no files named train-*.parquet, validation-*.parquet or test-*.parquet, nor has its data/"
    )


def require_pyarrow() -> None:
    """Raise a `DataError` that says how to install pyarrow, if it is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise DataError("parquet is read by pyarrow, which is missing: pip install 'thriftnet[data]'")


def files_by_split(names: Iterable[str]) -> dict[str, list[str]]:
    """Split -> its files in order, train first; other files are left out.

    Example:
        >>> files_by_split(["test-0.parquet", "train/0000.parquet", "README.md"])
        {'train': ['train/0000.parquet'], 'test': ['test-0.parquet']}
    """
    found: dict[str, list[str]] = {}
    for name in sorted(names):
        if match := NAME.fullmatch(name):
            found.setdefault(SPLITS[match[1]], []).append(name)
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def read_parquet(spec: str, files: dict[str, list[Path]]) -> DataSource:
    """A data set of parquet files: split -> files, in order."""
    splits: dict[str, ParquetImages] = {}
    columns = {path: _columns(path) for paths in files.values() for path in paths}
    for split, paths in files.items():
        _check_files(paths)
        first = columns[paths[0]]
        for path in paths:
            if columns[path][:2] != first[:2]:
                raise DataError(f"{path} has images and labels in {columns[path][:2]}, {paths[0].name} in {first[:2]}")
        splits[split] = ParquetImages(paths, *first[:2])
        if not len(splits[split]):
            raise DataError(f"{paths[0]} has no rows, and no other file of the {split} split has: remove or repair it")
    unlabelled = [path for path, (_, label, _) in columns.items() if not label]
    if 0 < len(unlabelled) < len(columns):
        raise DataError(f"{unlabelled[0]} has no column of labels named {' or '.join(LABELS)}, and other files have one")
    if unlabelled:
        return DataSource(spec, (), dict(splits), IMAGENET_MEAN, IMAGENET_STD, labelled=False)
    stated = {names: path for path, (*_, names) in columns.items() if names is not None}
    if len(stated) > 1:
        one, other = list(stated.values())[:2]
        raise DataError(f"{one} and {other} name their classes differently, or in another order: labels would be mixed up")
    classes = next(iter(stated), None) or _numbered(splits, spec)
    if len(classes) < 2:
        raise DataError(f"{spec} has {len(classes)} class{'' if classes else 'es'}: at least two classes are needed")
    for images in splits.values():
        images.check_labels(len(classes))
    return DataSource(spec, classes, dict(splits), IMAGENET_MEAN, IMAGENET_STD)


def _numbered(splits: dict[str, ParquetImages], spec: str) -> tuple[str, ...]:
    """Names of classes that the files do not name."""
    highest = max(int(images.labels.max()) if len(images) else -1 for images in splits.values())
    count = sum(len(images) for images in splits.values())
    if highest >= count:  # a damaged label would ask for a network of any size
        raise DataError(
            f"{spec} has the label {highest}, no class names, and only {count} images: name the classes in the files' metadata"
        )
    return tuple(map(str, range(highest + 1)))


def _check_files(paths: list[Path]) -> None:
    """Refuse sets of files that are incomplete, or of which some are not part."""
    found = [match for path in paths if (match := OF.search(path.name))]
    if not found:
        return
    count = int(found[0][2])
    numbers = {int(match[1]) for match in found if int(match[2]) == count and int(match[1]) < count}
    if len(numbers) != len(paths):
        raise DataError(
            f"{paths[0].parent} has {paths[0].name} and files that do not belong to it, as {paths[-1].name}: remove them"
        )
    if len(paths) != count:
        raise DataError(f"{paths[0].parent} has {len(paths)} of the {count} files that {paths[0].name} is one of")


def _columns(path: Path) -> tuple[str, str, tuple[str, ...] | None]:
    """Names of the image column, of the label column ("": there is none) and, if stated, of the classes."""
    from pyarrow import types

    with table_in(path) as (file, _):
        schema = file.schema_arrow
        images = [field.name for field in schema if types.is_struct(field.type) and _holds_bytes(field.type)]
        labels = [name for name in LABELS if schema.names.count(name) == 1 and types.is_integer(schema.field(name).type)]
        if not images or (not labels and any(name in LABELS for name in schema.names)):
            raise DataError(
                f"{path} has the columns {schema.names}: expected images, a struct with `bytes`, and an integer column "
                f"named {' or '.join(LABELS)}"
            )
        return (images[0], labels[0], _class_names(schema.metadata or {}, labels[0])) if labels else (images[0], "", None)


def _holds_bytes(kind: Any) -> bool:
    from pyarrow import types

    place = kind.get_field_index("bytes")
    return place >= 0 and bool(types.is_binary(kind.field(place).type) or types.is_large_binary(kind.field(place).type))


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    """Names in Hugging Face's metadata; repeated ones get their label, since results are listed by name."""
    if b"huggingface" not in metadata:
        return None
    features = json.loads(metadata[b"huggingface"])["info"]["features"]
    names = features[label].get("names") if label in features else None
    if names is None:
        return None
    if isinstance(names, dict):
        names = [names.get(str(number)) for number in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"the names of its classes are not text: {shortened(str(names), 60)}")
    counts = Counter(map(normal_name, names))
    return tuple(name if counts[normal_name(name)] == 1 else f"{name} ({number})" for number, name in enumerate(names))


def _labels(column: Any, name: str) -> Any:
    """Labels as int64, checked."""
    column.validate(full=True)
    if column.null_count:
        raise ValueError(f"{name} has {column.null_count} rows without a label: remove them")
    values = column.cast("int64").to_numpy()
    if len(values) and values.min() < 0:
        raise ValueError(f"{name} has the label {values.min()}: labels count from 0 (-1 marks images without one)")
    return values
