"""What every source of images gives: the same few things, whatever the files look like."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from thriftnet.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image

Size = tuple[int, int, int]


class ImageDataset(Protocol):
    """One split of a data set, as stored: nothing is normalised or augmented yet."""

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 (N,)."""

    @property
    def input_size(self) -> Size | None:
        """Channels, height, width; None where the images differ in size, or are too many to look at."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image:
        """One image, decoded, in mode RGB (or L for the digits).

        Raises:
            DataError: It cannot be decoded; the message names the file or row.
        """

    def resident(self, indices: Tensor | None = None) -> Tensor:
        """Images as one uint8 tensor (N, C, H, W): those of ``indices``, in this order, or all.

        Raises:
            DataError: They are not all of one size, or one cannot be decoded.
        """


@dataclass(frozen=True)
class DataSource:
    """A data set with its splits.

    Args:
        spec: As the user wrote it: ``digits``, ``cifar10:DIR``, ``cifar100:DIR``, ``folder:DIR`` or ``parquet:DIR``.
        classes: Name of each class, in the order of the labels.
        splits: Name -> images: ``train`` and ``test``, or ``val`` where the data has no test split of its own.
        mean: Of each channel, in [0, 1]: how networks for this data are usually fed.
        std: Of each channel, in [0, 1].
        skipped: Images that could not be decoded and were left out, a line each; empty unless that was asked for.
    """

    spec: str
    classes: tuple[str, ...]
    splits: dict[str, ImageDataset]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[str, ...] = ()

    @property
    def input_size(self) -> Size | None:
        """Channels, height, width of the training images; None where they differ in size, or are too many to look at."""
        return next(iter(self.splits.values())).input_size

    def split(self, name: str) -> ImageDataset:
        """The images of one split; ``test`` is ``val`` where the data has no other held-out images.

        Raises:
            ConfigError: There is no such split.
        """
        if name == "test" and "test" not in self.splits and "val" in self.splits:
            name = "val"
        if name not in self.splits:
            raise ConfigError(f"{self.spec} has no split {name!r}. Possible: {', '.join(self.splits)}")
        return self.splits[name]


class ArrayImages:
    """Images that are in memory.

    Args:
        images: uint8 (N, C, H, W); one channel is grey, three are RGB.
        labels: int64 (N,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    @property
    def input_size(self) -> Size:
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image:
        from PIL import Image

        pixels = self.images[index].permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    def resident(self, indices: Tensor | None = None) -> Tensor:
        return self.images if indices is None else self.images[indices]


class Subset:
    """Some images of a data set.

    Args:
        base: Where they come from.
        indices: Which, int64, in this order.
    """

    def __init__(self, base: ImageDataset, indices: Tensor) -> None:
        self.base = base
        self.indices = indices

    @property
    def labels(self) -> Tensor:
        return self.base.labels[self.indices]

    @property
    def input_size(self) -> Size | None:
        return self.base.input_size

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> Image:
        return self.base.image(int(self.indices[index]))

    def resident(self, indices: Tensor | None = None) -> Tensor:
        return self.base.resident(self.indices if indices is None else self.indices[indices])


class TorchImages:
    """Any map-style data set of torch that gives ``(PIL image, label)`` pairs, as those of torchvision without a transform.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        labels: Class of each image; left out, ``dataset.targets``.
        input_size: Channels, height, width, if all images have it.

    Raises:
        ConfigError: The labels are not known, or not as many as the images.
    """

    def __init__(self, dataset: object, labels: Sequence[int] | None = None, input_size: Size | None = None) -> None:
        known = labels if labels is not None else getattr(dataset, "targets", None)
        if known is None or len(known) != len(dataset):  # type: ignore[arg-type]
            raise ConfigError(f"{type(dataset).__name__} has no `targets` for its images: give labels=[...], one per image")
        self.dataset = dataset
        self.labels = torch.as_tensor(known, dtype=torch.int64)
        self.input_size = input_size

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Image:
        from PIL import Image

        image = self.dataset[index][0]  # type: ignore[index]
        if not isinstance(image, Image.Image):
            raise DataError(
                f"image {index} of {type(self.dataset).__name__} is a {type(image).__name__}, not a PIL image: remove its "
                "transform, thriftnet augments by itself"
            )
        return image if image.mode == "L" else image.convert("RGB")

    def resident(self, indices: Tensor | None = None) -> Tensor:
        return stacked(self, indices)


def stacked(dataset: ImageDataset, indices: Tensor | None = None) -> Tensor:
    """Decode images, all or those of ``indices``, into one uint8 tensor (N, C, H, W).

    Raises:
        DataError: They are not all of one size, or one cannot be decoded.
    """
    import numpy as np

    wanted = range(len(dataset)) if indices is None else indices.tolist()
    images: Tensor | None = None
    for place, index in enumerate(wanted):
        pixels = torch.from_numpy(np.array(dataset.image(index)))
        pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
        if images is None:
            images = torch.empty((len(wanted), *pixels.shape), dtype=torch.uint8)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"the images differ in size: {tuple(images.shape[1:])} and {tuple(pixels.shape)} (image {index}), so they "
                "cannot be kept as one array. Use resident=False and an image_size"
            )
        images[place] = pixels
    return torch.empty((0, *(dataset.input_size or (3, 1, 1))), dtype=torch.uint8) if images is None else images
