"""Class folders: one folder of image files for each class, in ``train`` and ``val`` as ImageNet has them, or alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from thriftnet.data.dataset import DataSource, ImageDataset, Size, stacked
from thriftnet.data.decode import common_size, decode, stored_size
from thriftnet.data.split import train_validation
from thriftnet.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEST_FRACTION = 0.2  # of class folders without splits


class FolderImages:
    """Image files; only their names are kept in memory.

    Args:
        root: The folder they are in.
        files: Paths below it.
        labels: int64 (N,).
    """

    def __init__(self, root: Path, files: list[str], labels: Tensor) -> None:
        self.root = root
        self.files = np.array([os.fsencode(file) for file in files])  # one block: a list of a million str is 10x larger
        self.labels = labels

    @cached_property
    def input_size(self) -> Size | None:
        return common_size(len(self), lambda index: stored_size(self._path(index), str(self._path(index))))

    def __len__(self) -> int:
        return len(self.files)

    def image(self, index: int) -> Image:
        return decode(self._path(index), str(self._path(index)))

    def resident(self, indices: Tensor | None = None) -> Tensor:
        return stacked(self, indices)

    def _path(self, index: int) -> Path:
        return self.root / os.fsdecode(bytes(self.files[index]))


def open_folder(folder: Path) -> DataSource:
    """All splits of a tree of class folders.

    ``train``, ``val`` and ``test`` folders are splits. Without any, the folders are classes, and a seeded fifth of each
    class is the test split. The classes are those of ``train``, sorted by name.

    Raises:
        DataError: No such folder, no images, fewer than two classes, or splits that disagree about them.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}. folder:DIR needs class folders in DIR/train and DIR/val, or in DIR")
    places = {SPLITS[name]: folder / name for name in SPLITS if (folder / name).is_dir()}
    classes = _classes(places.get("train") or next(iter(places.values()), folder))
    splits: dict[str, ImageDataset]
    if places:
        splits = {split: _split(place, classes) for split, place in places.items()}
    else:
        splits = dict(zip(("train", "test"), train_validation(_split(folder, classes), TEST_FRACTION), strict=True))
    return DataSource(f"folder:{folder}", classes, splits, IMAGENET_MEAN, IMAGENET_STD)


def _classes(place: Path) -> tuple[str, ...]:
    names = tuple(_subfolders(place))
    if len(names) < 2:
        found = f"one class folder, {names[0]!r}" if names else "no class folders"
        raise DataError(f"{place} has {found}: classification needs a folder of images for each of two classes or more")
    empty = [name for name in names if next(_files(place, name), None) is None]
    if empty:
        raise DataError(
            f"{place / empty[0]} has no images{f', nor have {len(empty) - 1} other classes' if empty[1:] else ''}: looked for "
            f"{', '.join(ENDINGS)}"
        )
    return names


def _split(place: Path, classes: tuple[str, ...]) -> FolderImages:
    strange = [name for name in _subfolders(place) if name not in classes]
    if strange:
        raise DataError(f"{place} has class {strange[0]!r}, which is not among the {len(classes)} training classes")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(_files(place, name))
        files += found
        labels += [label] * len(found)
    if not files:
        raise DataError(f"{place} has no images in its class folders: looked for {', '.join(ENDINGS)}")
    return FolderImages(place, files, torch.tensor(labels, dtype=torch.int64))


def _subfolders(place: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(place) if entry.is_dir() and not entry.name.startswith("."))


def _files(place: Path, name: str) -> Iterator[str]:
    """Images of a class, at any depth, as paths below ``place``."""
    for folder, _, files in os.walk(place / name, followlinks=True):
        inside = os.path.relpath(folder, place)
        yield from (os.path.join(inside, file) for file in files if file.lower().endswith(ENDINGS))
