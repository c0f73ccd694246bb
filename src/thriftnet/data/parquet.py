"""Parquet tables in the layout of Hugging Face: a column of encoded images and a column of labels."""

from __future__ import annotations

import json
import re
from collections import OrderedDict
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from thriftnet.data.dataset import DataSource, ImageDataset, Size, stacked
from thriftnet.data.decode import common_size, decode, stored_size
from thriftnet.data.folder import IMAGENET_MEAN, IMAGENET_STD, SPLITS
from thriftnet.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

FILE = re.compile(rf"({'|'.join(SPLITS)})([-._].*)?\.parquet")
LABELS = ("label", "labels", "fine_label")
CACHE_BYTES = 1 << 30  # of encoded images, in each process


class ParquetImages:
    """Rows of parquet files; row groups are read when one of their rows is asked for, and kept up to `CACHE_BYTES`.

    Args:
        files: In order.
        image: Name of the column of images, a struct with ``bytes``.
        label: Name of the column of labels.
    """

    def __init__(self, files: list[Path], image: str, label: str) -> None:
        from pyarrow import parquet

        self.files = files
        self.column = image
        self._cache: OrderedDict[int, Any] = OrderedDict()
        self._cached = 0
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
        return {key: value for key, value in self.__dict__.items() if key != "_lock"} | {
            "_cache": OrderedDict(),
            "_cached": 0,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()

    @cached_property
    def input_size(self) -> Size | None:
        return common_size(len(self), lambda index: stored_size(*self._encoded(index)))

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image:
        return decode(*self._encoded(index))

    def resident(self, indices: Tensor | None = None) -> Tensor:
        return stacked(self, indices)

    def _encoded(self, index: int) -> tuple[bytes, str]:
        """The bytes of an image, and what to call it."""
        group = int(np.searchsorted(self.starts, index, side="right")) - 1
        file, _ = self.groups[group]
        with self._lock:
            content = self._group(group)[index - int(self.starts[group])].as_py()
        return content or b"", f"{self.files[file]}, row {index - self.first_rows[file]},"

    def _group(self, group: int) -> Any:
        """The encoded images of a row group."""
        if group not in self._cache:
            from pyarrow import parquet

            file, place = self.groups[group]
            table = parquet.ParquetFile(self.files[file]).read_row_group(place, [f"{self.column}.bytes"], use_threads=False)
            images = table.column(0).combine_chunks().field("bytes")
            self._cache[group] = images
            self._cached += images.nbytes
            while self._cached > CACHE_BYTES and len(self._cache) > 1:
                self._cached -= self._cache.popitem(last=False)[1].nbytes
        self._cache.move_to_end(group)
        return self._cache[group]


def open_parquet(folder: Path) -> DataSource:
    """All splits of a folder of parquet files, named ``train-*``, ``validation-*`` and ``test-*``, there or in ``data``.

    Raises:
        DataError: No such folder, no such files, unreadable files, or columns that are no images and labels.
    """
    try:
        import pyarrow
    except ImportError:
        raise DataError("parquet is read by pyarrow, which is missing: pip install 'thriftnet[data]'") from None
    splits: dict[str, ImageDataset] = {}
    names: tuple[str, ...] | None = None
    for split, files in _files(folder).items():
        try:
            image, label, stated = _columns(files[0])
            splits[split] = ParquetImages(files, image, label)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{files[0].parent}: the {split} files are no whole parquet tables: {error}") from None
        names = names or stated
    highest = max(int(images.labels.max()) if len(images) else -1 for images in splits.values())
    classes = names or tuple(map(str, range(highest + 1)))
    if len(classes) < 2 or highest >= len(classes):
        raise DataError(
            f"{folder} has labels up to {highest} and {len(classes)} class names: at least two classes are needed"
        )
    return DataSource(f"parquet:{folder}", classes, splits, IMAGENET_MEAN, IMAGENET_STD)


def _files(folder: Path) -> dict[str, list[Path]]:
    """Split -> its files, train first."""
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}. parquet:DIR needs files train-*.parquet and test-*.parquet in DIR")
    for place in (folder, folder / "data"):
        found: dict[str, list[Path]] = {}
        for path in sorted(place.glob("*.parquet")):
            match = FILE.fullmatch(path.name)
            if match:
                found.setdefault(SPLITS[match[1]], []).append(path)
        if found:
            return {split: found[split] for split in ("train", "val", "test") if split in found}
    raise DataError(
        f"{folder} has no files named train-*.parquet, validation-*.parquet or test-*.parquet, nor has its data/"
    )


def _columns(path: Path) -> tuple[str, str, tuple[str, ...] | None]:
    """Names of the image and label columns, and of the classes where the file states them."""
    from pyarrow import parquet, types

    schema = parquet.read_schema(path)
    images = [f.name for f in schema if types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0]
    labels = [name for name in LABELS if name in schema.names and types.is_integer(schema.field(name).type)]
    if not images or not labels:
        raise DataError(
            f"{path} has the columns {schema.names}: needed are images, a struct with `bytes`, and an integer column "
            f"named {' or '.join(LABELS)}"
        )
    return images[0], labels[0], _class_names(schema.metadata or {}, labels[0])


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...] | None:
    try:
        names = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None  # files of other writers do not name their classes
    return tuple(map(str, names.values() if isinstance(names, dict) else names))


def _labels(column: Any, name: str) -> Any:
    """Labels as int64, checked."""
    if column.null_count:
        raise DataError(f"{name} has {column.null_count} rows without a label: remove them")
    values = column.to_numpy().astype(np.int64)
    if len(values) and values.min() < 0:
        raise DataError(f"{name} has the label {values.min()}: labels count from 0 (-1 marks images without one)")
    return values
