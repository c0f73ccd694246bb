"""Class folders: a folder of image files for each class, in ``train`` and ``val`` as in ImageNet, or alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from thriftnet.data.dataset import DataSource, ImageDataset
from thriftnet.data.decode import EncodedImages
from thriftnet.data.split import train_validation
from thriftnet.errors import DataError

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")
SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "valid": "val", "test": "test"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TEST_FRACTION = 0.2  # of class folders without splits


class FolderImages(EncodedImages):
    """Image files below a folder; only their names are kept in memory."""

    def __init__(self, root: Path, files: list[str], labels: list[int]) -> None:
        self.labels = torch.tensor(labels, dtype=torch.int64)
        self.root = root
        self.files = np.array([os.fsencode(file) for file in files])  # one block: a list of a million str is 10x larger

    def encoded(self, index: int) -> tuple[str, str]:
        path = os.path.join(self.root, os.fsdecode(bytes(self.files[index])))
        return path, path


def open_folder(folder: Path) -> DataSource:
    """All splits of a tree of class folders.

    ``train``, ``val`` and ``test`` folders are splits. Without any, the folders are classes, and a seeded fifth of each
    class is the test split. The classes are those of ``train``, sorted by name. What is hidden (its name begins with a dot) is left out.
    Where images lie in place of class folders, they have no labels.
    """
    if not folder.is_dir():
        raise DataError(f"there is no folder {folder}. folder:DIR needs class folders in DIR/train and DIR/val, or in DIR")
    places: dict[str, Path] = {}
    for name in _subfolders(folder):
        split = SPLITS.get(name.lower())
        if split in places:
            raise DataError(f"{folder} has two folders for the {split} split, {places[split].name} and {name}: remove one")
        if split:
            places[split] = folder / name
    classes = _classes(places.get("train") or next(iter(places.values()), folder))
    splits: dict[str, ImageDataset]
    if places:
        splits = {split: _split(places[split], classes) for split in ("train", "val", "test") if split in places}
    else:
        splits = dict(zip(("train", "test"), train_validation(_split(folder, classes), TEST_FRACTION), strict=True))
    return DataSource(f"folder:{folder}", classes, splits, IMAGENET_MEAN, IMAGENET_STD, labelled=bool(classes))


def _classes(place: Path) -> tuple[str, ...]:
    names = tuple(_subfolders(place))
    if not names and _images_in(place):
        return ()
    if len(names) < 2:
        found = f"one class folder, {names[0]!r}" if names else "no class folders"
        raise DataError(
            f"{place} has {found}: classification needs a folder of images for each of two classes or more; images without labels "
            "lie in no subfolder"
        )
    empty = [name for name in names if next(_files(place, name), None) is None]
    if empty:
        others = f", nor have {len(empty) - 1} other classes" if empty[1:] else ""
        raise DataError(f"{place / empty[0]} has no images{others}: looked for {', '.join(SUFFIXES)}")
    return names


def _split(place: Path, classes: tuple[str, ...]) -> FolderImages:
    if not classes:
        return _unlabelled(place)
    unknown = [name for name in _subfolders(place) if name not in classes]
    if unknown:
        raise DataError(f"{place} has class {unknown[0]!r}, which is not among the {len(classes)} training classes")
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        own = sorted(_files(place, name))
        if not own and os.path.lexists(place / name):  # a split need not have every class
            raise DataError(
                f"{place / name} has no images: looked for {', '.join(SUFFIXES)}. Remove the folder if that is right"
            )
        files += own
        labels += [label] * (len(files) - len(labels))
    if not files:
        raise DataError(f"{place} has no images in its class folders: looked for {', '.join(SUFFIXES)}")
    return FolderImages(place, files, labels)


def _unlabelled(place: Path) -> FolderImages:
    files, folders = _images_in(place), _subfolders(place)
    if folders or not files:
        found = f"a folder {folders[0]!r}" if folders else "no images"
        raise DataError(f"{place} has {found}, and the training images have no classes: expected images beside each other")
    return FolderImages(place, files, [0] * len(files))


def _images_in(place: Path) -> list[str]:
    """Names of the images that lie in a folder itself."""
    try:
        names = sorted(entry.name for entry in os.scandir(place) if entry.is_file())
    except OSError as error:
        raise _unreadable(error) from None
    return [name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]


def _subfolders(place: Path) -> list[str]:
    try:
        entries = [entry for entry in os.scandir(place) if not entry.name.startswith(".")]
        for entry in entries:
            _check_link(entry.path)
        return sorted(entry.name for entry in entries if entry.is_dir())
    except OSError as error:
        raise _unreadable(error) from None


def _files(place: Path, name: str) -> Iterator[str]:
    """Images of a class, at any depth, as paths below ``place``; links to folders above or read before are not followed."""

    def refuse(error: OSError) -> None:
        raise _unreadable(error)

    if not os.path.lexists(place / name):
        return
    seen = {_identity(folder) for folder in (place, *place.resolve().parents)}
    for folder, subfolders, files in os.walk(place / name, followlinks=True, onerror=refuse):
        if _identity(folder) in seen:
            subfolders.clear()
            continue
        seen.add(_identity(folder))
        subfolders[:] = [each for each in subfolders if not each.startswith(".")]
        for each in subfolders:
            if each.lower().endswith(SUFFIXES):
                raise DataError(f"{os.path.join(folder, each)} is a folder, named as an image: rename or remove it")
        inside = os.path.relpath(folder, place)
        for file in files:
            if file.startswith("."):
                continue
            if file.lower().endswith(SUFFIXES):
                yield os.path.join(inside, file)
            else:
                _check_link(os.path.join(folder, file))


def _check_link(path: str) -> None:
    """Refuse a link to nothing: it may have been a folder."""
    if os.path.islink(path) and not os.path.exists(path):
        raise DataError(f"{path} is a link to nothing: its images would be missing. Repair or remove it")


def _identity(folder: str | Path) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(error) from None
    return status.st_dev, status.st_ino


def _unreadable(error: OSError) -> DataError:
    return DataError(f"{error.filename} cannot be read: {error.strerror}. Its images would be missing: repair or remove it")
