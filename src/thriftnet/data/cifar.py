"""CIFAR-10 and CIFAR-100, read by torchvision, which checks the files' md5 sums first.

Source: Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009.
"""

from __future__ import annotations

import contextlib
import io
import stat
from pathlib import Path
from typing import Any

import torch

from thriftnet.data.dataset import ArrayImages, DataSource, ImageDataset
from thriftnet.data.decode import LARGEST_FILE
from thriftnet.errors import DataError

CIFAR = {  # mean and standard deviation of the training pixels
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def open_cifar(kind: str, folder: Path) -> DataSource:
    """Both splits of ``cifar10`` or ``cifar100``; torchvision downloads missing files.

    The folder is ``cifar-10-batches-py`` or ``cifar-100-python``, or its parent.
    """
    try:
        from torchvision import datasets
    except ImportError:
        raise DataError(f"{kind} is read by torchvision, which is missing: pip install 'thriftnet[train]'") from None
    dataset: Any = getattr(datasets, kind.upper())
    root = folder.parent if folder.name == dataset.base_folder else folder
    for name in (dataset.meta["filename"], *(name for name, _ in dataset.train_list + dataset.test_list)):
        _check_file(root / dataset.base_folder / name)
    splits: dict[str, ImageDataset] = {}
    for name in ("train", "test"):
        split = _open(dataset, root, train=name == "train")
        pixels = torch.from_numpy(split.data).permute(0, 3, 1, 2).contiguous()
        splits[name] = ArrayImages(pixels, torch.tensor(split.targets, dtype=torch.int64))
    return DataSource(f"{kind}:{folder}", tuple(split.classes), splits, *CIFAR[kind])


def _check_file(path: Path) -> None:
    """Refuse what torchvision could take for ever to hash, or would write to."""
    try:
        status = path.stat()
    except FileNotFoundError:
        if not path.is_symlink():
            return
        raise DataError(f"{path} is a link to nothing: remove it") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}. Repair or remove it") from None
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_FILE:
        raise DataError(
            f"{path} is no file of CIFAR: it is {'too large' if stat.S_ISREG(status.st_mode) else 'no file'}. Remove it"
        )


def _open(dataset: Any, root: Path, *, train: bool) -> Any:
    """One split; downloaded if files are missing or damaged."""
    with contextlib.redirect_stdout(io.StringIO()):  # torchvision prints; stdout is for results
        try:
            return dataset(root=str(root), train=train)
        except (OSError, RuntimeError):
            existed = root.exists()
        try:
            return dataset(root=str(root), train=train, download=True)
        except (OSError, RuntimeError) as error:
            if not existed and root.exists() and not any(root.iterdir()):
                root.rmdir()  # torchvision made it
            raise DataError(
                f"{root} holds no complete {dataset.__name__} ({root / dataset.base_folder}: missing, or md5 sums differ), and "
                f"it could not be downloaded: {error}. Put the files of {dataset.filename} there, unpacked"
            ) from None
