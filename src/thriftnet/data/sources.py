"""Data sets by name: the bundled digits, CIFAR, class folders, parquet tables and the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

from thriftnet.arguments import as_path, checked
from thriftnet.data.cifar import CIFAR, open_cifar
from thriftnet.data.dataset import DataSource, ImageDataset, Subset
from thriftnet.data.digits import digits_source
from thriftnet.data.folder import open_folder
from thriftnet.data.hub import open_hub
from thriftnet.data.parquet import open_parquet
from thriftnet.errors import ConfigError, DataError, unknown_name

FOLDERS: dict[str, Callable[[Path], DataSource]] = {
    **{kind: partial(open_cifar, kind) for kind in CIFAR},
    "folder": open_folder,
    "parquet": open_parquet,
}
KINDS = ("digits", *FOLDERS, "hf")
SPECS = "digits, cifar10:DIR, cifar100:DIR, folder:DIR, parquet:DIR or hf:OWNER/NAME"


@checked
def open_data(spec: str, *, on_corrupt: Literal["error", "skip"] = "error") -> DataSource:
    """The data set that ``spec`` names.

    Args:
        spec: ``digits``, ``cifar10:DIR``, ``cifar100:DIR``, ``folder:DIR``, ``parquet:DIR`` or ``hf:OWNER/NAME[:CONFIG][@REVISION]``.
        on_corrupt: ``error``: an image that cannot be decoded raises when it is read, and is named. ``skip``: every image
            is decoded once now, and those that cannot be are left out; `DataSource.skipped` names them.

    Raises:
        ConfigError: No such kind of data.
        DataError: It is missing, broken or has fewer than two classes.
    """
    kind, _, place = spec.partition(":")
    if kind not in KINDS:
        raise ConfigError(f"{unknown_name('data', spec, KINDS)}. Write {SPECS}")
    if bool(place) == (kind == "digits"):
        problem = "the digits need no folder" if place else f"the {'name' if kind == 'hf' else 'folder'} is missing"
        raise ConfigError(f"data {spec!r}: {problem}. Write {SPECS}")
    if kind == "digits":
        source = digits_source()
    elif kind == "hf":
        source = open_hub(place)
    else:
        source = FOLDERS[kind](as_path(place, kind, home=True))
    return _without_corrupt(source) if on_corrupt == "skip" else source


def _without_corrupt(source: DataSource) -> DataSource:
    """The data set without the images that cannot be decoded."""
    skipped: list[str] = []
    splits = {}
    for name, images in source.splits.items():
        with ThreadPoolExecutor() as pool:  # decoding releases the GIL
            problems = list(pool.map(lambda index, images=images: _problem(images, index), range(len(images))))
        intact = torch.tensor([i for i, problem in enumerate(problems) if not problem], dtype=torch.int64)
        if len(intact) == 0:
            raise DataError(f"{source.spec}: not one image of the {name} split can be decoded; the first: {problems[0]}")
        skipped += filter(None, problems)
        splits[name] = images if len(intact) == len(images) else Subset(images, intact)
        lost = set(images.labels.tolist()) - set(splits[name].labels.tolist())
        if lost and name == "train":
            first = problems[images.labels.tolist().index(min(lost))]
            raise DataError(
                f"{source.spec}: no training image of class {source.classes[min(lost)]!r} can be decoded; the first: {first}"
            )
    return replace(source, splits=splits, skipped=tuple(skipped))


def _problem(images: ImageDataset, index: int) -> str:
    """Why an image cannot be decoded; "" if it can."""
    try:
        images.image(index)
    except DataError as error:
        return str(error).partition(". Repair")[0]
    return ""
