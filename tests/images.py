"""Tiny data sets as files, for the tests of what reads them."""

from __future__ import annotations

import io
import json
from pathlib import Path

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


def parquet_files(root: Path, counts: dict[str, int], names: list[str] | None = None, rows: int = 3) -> Path:
    """Tables in the layout of Hugging Face; labels alternate; row groups of ``rows``."""
    import pyarrow
    from pyarrow import parquet

    root.mkdir(parents=True, exist_ok=True)
    for split, count in counts.items():
        images = [{"bytes": png(i), "path": None} for i in range(count)]
        table = pyarrow.table({"image": images, "label": [i % 2 for i in range(count)]})
        if names is not None:
            features = {"label": {"names": names, "_type": "ClassLabel"}}
            table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        parquet.write_table(table, root / f"{split}-00000-of-00001.parquet", row_group_size=rows)
    return root
