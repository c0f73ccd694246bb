"""Data sets by what the user writes: ``digits``, ``cifar10:DIR``, ``cifar100:DIR``, ``folder:DIR``, ``parquet:DIR``."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

from thriftnet.data.cifar import CIFAR, open_cifar
from thriftnet.data.dataset import DataSource, ImageDataset, Subset
from thriftnet.data.digits import digits_source
from thriftnet.data.folder import open_folder
from thriftnet.data.parquet import open_parquet
from thriftnet.errors import ConfigError, DataError, unknown_name

KINDS = ("digits", "cifar10", "cifar100", "folder", "parquet")
SPECS = "digits, cifar10:DIR, cifar100:DIR, folder:DIR, parquet:DIR"


def open_data(spec: str, *, on_corrupt: str = "error") -> DataSource:
    """The data set that ``spec`` names.

    Args:
        spec: ``digits``, ``cifar10:DIR``, ``cifar100:DIR``, ``folder:DIR`` or ``parquet:DIR``.
        on_corrupt: ``error`` raises when an image that cannot be decoded is met, and names it. ``skip`` decodes every
            image once now and leaves such images out; `DataSource.skipped` names them.

    Raises:
        ConfigError: No such kind of data.
        DataError: It is missing, broken or has fewer than two classes.
    """
    kind, _, folder = spec.partition(":")
    if on_corrupt not in ("error", "skip"):
        raise ConfigError(f"on_corrupt={on_corrupt!r}: possible are 'error' and 'skip'")
    if kind not in KINDS:
        raise ConfigError(f"{unknown_name('data', spec, KINDS)}. Write one of {SPECS}")
    if bool(folder) == (kind == "digits"):
        raise ConfigError(
            f"data {spec!r}: {'the digits need no folder' if folder else 'the folder is missing'}. Write {SPECS}"
        )
    source = _open(kind, Path(folder).expanduser())
    return _without_corrupt(source) if on_corrupt == "skip" else source


def _open(kind: str, folder: Path) -> DataSource:
    if kind == "digits":
        return digits_source()
    if kind in CIFAR:
        return open_cifar(kind, folder)
    return open_folder(folder) if kind == "folder" else open_parquet(folder)


def _without_corrupt(source: DataSource) -> DataSource:
    """The same without the images that cannot be decoded."""
    skipped: list[str] = []
    splits = {}
    for name, images in source.splits.items():
        with ThreadPoolExecutor() as pool:  # decoding runs outside the interpreter's lock
            complaints = list(pool.map(lambda index, images=images: _complaint(images, index), range(len(images))))
        whole = torch.tensor([i for i, complaint in enumerate(complaints) if not complaint], dtype=torch.int64)
        if len(whole) == 0:
            raise DataError(f"{source.spec}: not one image of the {name} split can be decoded; the first: {complaints[0]}")
        skipped += [complaint for complaint in complaints if complaint]
        splits[name] = images if len(whole) == len(images) else Subset(images, whole)
    return replace(source, splits=splits, skipped=tuple(skipped))


def _complaint(images: ImageDataset, index: int) -> str:
    """What is wrong with an image, "" for nothing."""
    try:
        images.image(index)
    except DataError as error:
        return str(error).partition(". Repair")[0]
    return ""
