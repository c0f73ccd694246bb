"""CIFAR-10 and CIFAR-100 in torchvision's layout; torchvision checks the files' md5 sums before it reads them.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from thriftnet.data.dataset import ArrayImages, DataSource
from thriftnet.errors import DataError


@dataclass(frozen=True)
class Facts:
    """Name, and mean and standard deviation of the training pixels."""

    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


CIFAR = {
    "cifar10": Facts("CIFAR10", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": Facts("CIFAR100", (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def open_cifar(kind: str, folder: Path) -> DataSource:
    """Both splits; what is missing is downloaded by torchvision.

    Args:
        kind: ``cifar10`` or ``cifar100``.
        folder: Holds ``cifar-10-batches-py`` or ``cifar-100-python``, or is it.

    Raises:
        DataError: The files are missing or damaged and cannot be downloaded.
    """
    try:
        from torchvision import datasets
    except ImportError:
        raise DataError(f"{kind} is read by torchvision, which is missing: pip install 'thriftnet[train]'") from None
    facts = CIFAR[kind]
    make = getattr(datasets, facts.name)
    root = folder.parent if folder.name == make.base_folder else folder
    train = _opened(make, root, train=True)
    splits = {"train": _images(train), "test": _images(_opened(make, root, train=False))}
    return DataSource(f"{kind}:{folder}", tuple(train.classes), dict(splits), facts.mean, facts.std)


def _opened(make: Any, root: Path, *, train: bool) -> Any:
    """One split; downloaded when the files are not there or not whole."""
    with contextlib.redirect_stdout(io.StringIO()):  # results are printed there
        try:
            return make(root=str(root), train=train)
        except RuntimeError:
            was_there = root.exists()
        try:
            return make(root=str(root), train=train, download=True)
        except (OSError, RuntimeError) as error:
            if not was_there and root.exists() and not any(root.iterdir()):
                root.rmdir()  # torchvision made it
            raise DataError(
                f"{root} holds no whole {make.__name__} ({root / make.base_folder}: missing, or md5 sums differ), and it could "
                f"not be downloaded: {error}. Put the files of {make.filename} there, unpacked"
            ) from None


def _images(dataset: Any) -> ArrayImages:
    pixels = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()
    return ArrayImages(pixels, torch.tensor(dataset.targets, dtype=torch.int64))
