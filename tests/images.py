"""Tiny data sets as files, for the tests of what reads them."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from thriftnet.data.dataset import ArrayImages


def arrays(count: int = 50, size: int = 12, classes: int = 5, channels: int = 3) -> ArrayImages:
    """Random images in memory."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, channels, size, size), generator=random, dtype=torch.uint8)
    return ArrayImages(pixels, torch.arange(count) % classes)


def picture(number: int, width: int = 12, height: int = 12) -> Image.Image:
    """A random RGB image."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8))


def png(number: int, width: int = 12, height: int = 12) -> bytes:
    """A random image as the content of a file."""
    buffer = io.BytesIO()
    picture(number, width, height).save(buffer, "png")
    return buffer.getvalue()


def class_folders(root: Path, per_class: int = 5, names: tuple[str, ...] = ("cat", "dog")) -> Path:
    """One folder per class; the images are numbered through."""
    for label, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for i in range(per_class):
            (root / name / f"{i}.png").write_bytes(png(label * per_class + i))
    return root


def parquet_files(
    root: Path, counts: dict[str, int], names: list[str] | None = None, rows: int = 3, *, checksums: bool = False
) -> Path:
    """Tables in the layout of Hugging Face; labels alternate; row groups of ``rows``; pages with checksums, or without."""
    import pyarrow
    from pyarrow import parquet

    root.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        images = [{"bytes": png(i), "path": None} for i in range(count)]
        table = pyarrow.table({"image": images, "label": [i % 2 for i in range(count)]})
        if names is not None:
            features = {"label": {"names": names, "_type": "ClassLabel"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        path = root / f"{split}-00000-of-00001.parquet"
        parquet.write_table(table, path, row_group_size=rows, write_page_checksum=checksums)
    return root


def cifar_files(root: Path, kind: str, patch: Callable[[Any, str, Any], object] = setattr) -> Path:
    """A few images in the layout of CIFAR; torchvision's md5 sums are changed to match."""
    from torchvision import datasets

    ten = kind == "cifar10"
    made = datasets.CIFAR10 if ten else datasets.CIFAR100
    folder = root / made.base_folder
    folder.mkdir()
    for number, (name, _) in enumerate(made.train_list + made.test_list):
        data = np.random.default_rng(number).integers(0, 256, (3, 3072), dtype=np.uint8)
        (folder / name).write_bytes(pickle.dumps({"data": data, "labels" if ten else "fine_labels": [0, 1, 2]}))
    (folder / made.meta["filename"]).write_bytes(pickle.dumps({made.meta["key"]: ["a", "b", "c"]}))
    sums = {path.name: hashlib.md5(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    patch(made, "train_list", [[name, sums[name]] for name, _ in made.train_list])
    patch(made, "test_list", [[name, sums[name]] for name, _ in made.test_list])
    patch(made, "meta", {**made.meta, "md5": sums[made.meta["filename"]]})
    return folder
