"""The interface of image data sets, and those of arrays in memory and of torch data sets."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from thriftnet.core.probe import Size
from thriftnet.errors import ConfigError, DataError

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageDataset(Protocol):
    """One split of a data set, as stored: neither normalised nor augmented.

    Args:
        labels: Class of each image, int64 (N,).
        input_size: Size of all images; None if they differ in size, or are too many to check.
    """

    labels: Tensor
    input_size: Size | None

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image:
        """One decoded image, in mode RGB (or L for grey arrays).

        Raises:
            DataError: It cannot be decoded; the message names the file or row.
        """

    def resident(self, indices: Tensor | None = None) -> Tensor:
        """Images as one uint8 tensor (N, C, H, W): those of ``indices``, in this order, or all.

        Raises:
            DataError: They differ in size, or one cannot be decoded.
        """
        import numpy as np

        chosen = range(len(self)) if indices is None else indices.tolist()
        images = torch.empty((0, *(self.input_size or (3, 1, 1))), dtype=torch.uint8)
        for row, index in enumerate(chosen):
            pixels = torch.from_numpy(np.array(self.image(index)))
            pixels = pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)
            if row == 0:
                images = torch.empty((len(chosen), *pixels.shape), dtype=torch.uint8)
            if pixels.shape != images.shape[1:]:
                raise DataError(
                    f"the images differ in size: {tuple(images.shape[1:])} and {tuple(pixels.shape)} (image {index}), so they "
                    "cannot be kept as one array. Use resident=False and an image_size"
                )
            images[row] = pixels
        return images


@dataclass(frozen=True)
class DataSource:
    """A data set with its splits.

    Args:
        spec: The name that opened it, as ``folder:flowers``.
        classes: Name of each class, in the order of the labels.
        splits: Name -> images: ``train`` and ``test``, or ``val`` where the data has no test split.
        mean: Of each channel, in [0, 1], with which inputs of this data are usually normalised.
        std: Of each channel, likewise.
        skipped: One line for each image that was skipped because it cannot be decoded.
    """

    spec: str
    classes: tuple[str, ...]
    splits: dict[str, ImageDataset]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[str, ...] = ()

    @property
    def input_size(self) -> Size | None:
        """Size of the training images; None if they differ in size, or are too many to check."""
        return next(iter(self.splits.values())).input_size

    def split(self, name: str) -> ImageDataset:
        """The images of one split; ``test`` is ``val`` where the data has no test split.

        Raises:
            ConfigError: There is no such split.
        """
        if name == "test" and "test" not in self.splits and "val" in self.splits:
            name = "val"
        if name not in self.splits:
            raise ConfigError(f"{self.spec} has no split {name!r}: expected {', '.join(self.splits)}")
        return self.splits[name]


class ArrayImages(ImageDataset):
    """Images in memory.

    Args:
        images: uint8 (N, C, H, W); one channel is grey, three are RGB.
        labels: int64 (N,).
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels
        _, channels, height, width = images.shape
        self.input_size = channels, height, width

    def image(self, index: int) -> Image:
        from PIL import Image

        pixels = self.images[index].permute(1, 2, 0).contiguous().numpy()
        return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)

    def resident(self, indices: Tensor | None = None) -> Tensor:
        return self.images if indices is None else self.images[indices]


class Subset(ImageDataset):
    """Some images of a data set.

    Args:
        base: The data set.
        indices: Which of its images, int64, in this order.
    """

    def __init__(self, base: ImageDataset, indices: Tensor) -> None:
        self.base = base
        self.indices = indices
        self.labels = base.labels[indices]

    @property
    def input_size(self) -> Size | None:  # type: ignore[override]
        return self.base.input_size

    def image(self, index: int) -> Image:
        return self.base.image(int(self.indices[index]))

    def resident(self, indices: Tensor | None = None) -> Tensor:
        return self.base.resident(self.indices if indices is None else self.indices[indices])


class TorchImages(ImageDataset):
    """A map-style torch data set of ``(PIL image, label)`` pairs, such as torchvision's without a transform.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        labels: Class of each image; by default ``dataset.targets``.
        input_size: Size of all images; None if they differ.

    Raises:
        ConfigError: No labels, or not one per image.
    """

    def __init__(self, dataset: object, labels: Sequence[int] | None = None, input_size: Size | None = None) -> None:
        known = labels if labels is not None else getattr(dataset, "targets", None)
        if known is None or len(known) != len(dataset):  # type: ignore[arg-type]
            raise ConfigError(f"{type(dataset).__name__} has no `targets` for its images: give labels=[...], one per image")
        self.dataset = dataset
        self.labels = torch.as_tensor(known, dtype=torch.int64)
        self.input_size = input_size

    def image(self, index: int) -> Image:
        from PIL import Image

        image = self.dataset[index][0]  # type: ignore[index]
        if not isinstance(image, Image.Image):
            raise DataError(
                f"image {index} of {type(self.dataset).__name__} is a {type(image).__name__}, not a PIL image: remove its "
                "transform, thriftnet augments by itself"
            )
        return image if image.mode == "L" else image.convert("RGB")
