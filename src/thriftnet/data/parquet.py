"""Parquet tables in the layout of Hugging Face: a column of encoded images and a column of labels."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter, OrderedDict
from collections.abc import Iterable
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch

from thriftnet.data.dataset import DataSource, ImageDataset
from thriftnet.data.decode import EncodedImages
from thriftnet.data.folder import IMAGENET_MEAN, IMAGENET_STD, SPLITS
from thriftnet.errors import DataError

NAME = re.compile(rf"({'|'.join(SPLITS)})([-._/].*)?\.parquet")
OF = re.compile(r"-\d+-of-(\d+)\.parquet")
LABELS = ("label", "labels", "fine_label")
CACHE_BYTES = 1 << 30  # of encoded images, in each process


class ParquetImages(EncodedImages):
    """Rows of parquet files; a row group is read when one of its rows is asked for, and kept up to `CACHE_BYTES`.

    ``image`` names the column of images, a struct with ``bytes``, ``label`` that of labels.
    """

    def __init__(self, files: list[Path], image: str, label: str) -> None:
        from pyarrow import parquet

        self.files = files
        self.column = image
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._lock = Lock()
        self.groups: list[tuple[int, int]] = []  # number of the file, and of the group in it
        starts, labels, self.first_rows = [0], [], [0]
        for number, path in enumerate(files):
            file = parquet.ParquetFile(path)
            for group in range(file.num_row_groups):
                self.groups.append((number, group))
                starts.append(starts[-1] + file.metadata.row_group(group).num_rows)
            self.first_rows.append(starts[-1])
            labels.append(_labels(file.read([label]).column(0), f"{path}: column {label!r}"))
        self.starts = np.array(starts)
        self.labels = torch.from_numpy(np.concatenate(labels))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cache": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def encoded(self, index: int) -> tuple[bytes, str]:
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        file, _ = self.groups[group]
        with self._lock:
            content = self._group(group)[index - int(self.starts[group])].as_py()
        return content or b"", f"{self.files[file]}, row {index - self.first_rows[file]},"

    def _group(self, group: int) -> Any:
        """The encoded images of a row group."""
        if group not in self._cache:
            from pyarrow import parquet

            file, number = self.groups[group]
            table = parquet.ParquetFile(self.files[file]).read_row_group(number, [f"{self.column}.bytes"], use_threads=False)
            self._cache[group] = table.column(0).combine_chunks().field("bytes")
            while len(self._cache) > 1 and sum(images.nbytes for images in self._cache.values()) > CACHE_BYTES:
                self._cache.popitem(last=False)
        self._cache.move_to_end(group)
        return self._cache[group]


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
    import pyarrow

    splits: dict[str, ImageDataset] = {}
    names: tuple[str, ...] | None = None
    for split, paths in files.items():
        _check_files(paths)
        try:
            image, label, stated = _columns(paths[0])
            splits[split] = ParquetImages(paths, image, label)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{paths[0].parent}: the {split} files are no complete parquet tables: {error}") from None
        names = names or stated
    highest = max(int(images.labels.max()) if len(images) else -1 for images in splits.values())
    classes = names or tuple(map(str, range(highest + 1)))
    if len(classes) < 2 or highest >= len(classes):
        raise DataError(f"{spec} has labels up to {highest} and {len(classes)} class names: at least two classes are needed")
    return DataSource(spec, classes, splits, IMAGENET_MEAN, IMAGENET_STD)


def _check_files(paths: list[Path]) -> None:
    """Refuse pipes, which pyarrow would wait for, and incomplete sets of files."""
    for path in paths:
        if not path.is_file():
            raise DataError(f"{path} is not a file")
    match = OF.search(paths[0].name)
    if match and len(paths) != int(match[1]):
        raise DataError(f"{paths[0].parent} has {len(paths)} of the {int(match[1])} files that {paths[0].name} is one of")


def _columns(path: Path) -> tuple[str, str, tuple[str, ...] | None]:
    """Names of the image column, of the label column and, if stated, of the classes."""
    from pyarrow import parquet, types

    schema = parquet.read_schema(path)
    images = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    labels = [name for name in LABELS if name in schema.names and types.is_integer(schema.field(name).type)]
    if not images or not labels:
        raise DataError(
            f"{path} has the columns {schema.names}: expected images, a struct with `bytes`, and an integer column "
            f"named {' or '.join(LABELS)}"
        )
    return images[0], labels[0], _class_names(schema.metadata or {}, labels[0])


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    """Names in Hugging Face's metadata; repeated ones get their label, since results are listed by name."""
    try:
        stated = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    names = [str(name) for name in (stated.values() if isinstance(stated, dict) else stated)]
    counts = Counter(names)
    return tuple(name if counts[name] == 1 else f"{name} ({number})" for number, name in enumerate(names))


def _labels(column: Any, name: str) -> Any:
    """Labels as int64, checked."""
    if column.null_count:
        raise DataError(f"{name} has {column.null_count} rows without a label: remove them")
    values = column.to_numpy().astype(np.int64)
    if len(values) and values.min() < 0:
        raise DataError(f"{name} has the label {values.min()}: labels count from 0 (-1 marks images without one)")
    return values
