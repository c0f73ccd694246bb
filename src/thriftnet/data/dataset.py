"""The interface of image data sets, and those of arrays in memory and of torch data sets."""

from __future__ import annotations

import unicodedata
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from thriftnet.core.probe import Size
from thriftnet.errors import ConfigError, DataError, first_line

if TYPE_CHECKING:
    from PIL.Image import Image


MOST_RATIO = 1000  # of an image's sides: resizing the shorter one would fill the memory
EIGHT_BIT = ("1", "L", "P", "LA", "PA", "La", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "LAB", "HSV")


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

    def look_over(self, indices: Tensor | None = None) -> None:
        """Before a long use, read as much of the images (of all, or of ``indices``) as takes little time: here three of them.

        Raises:
            DataError: One cannot be decoded.
        """
        chosen = range(len(self)) if indices is None else indices.tolist()
        for index in sorted({chosen[0], chosen[len(chosen) // 2], chosen[-1]}):
            self.image(index)

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
        labelled: Whether the labels mean anything; otherwise they are 0, and there are no classes.

    Raises:
        DataError: No images, labels that are not the number of a class, or classes whose names cannot be told apart.
    """

    spec: str
    classes: tuple[str, ...]
    splits: dict[str, ImageDataset]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    skipped: tuple[str, ...] = ()
    labelled: bool = True

    def __post_init__(self) -> None:
        check_names(self.classes, self.spec)
        if not self.splits:
            raise DataError(f"{self.spec} has no splits: expected train and test")
        for split, images in self.splits.items():
            _check_labels(images, len(self.classes) if self.labelled else 1, f"{self.spec}, {split} split")

    @property
    def input_size(self) -> Size | None:
        """Size of the training images; None if they differ in size, or are too many to check."""
        return next(iter(self.splits.values())).input_size

    def require_labels(self, user: str) -> None:
        """Refuse images without labels for who needs them.

        Raises:
            DataError: It has none.
        """
        if not self.labelled:
            raise DataError(
                f"{self.spec} has no labels, and {user} needs them: a folder for each class, or an integer column named label. Without, "
                "`plan`, `recalibrate` and `train --teacher F --distill-weight 1` work"
            )

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


def check_names(classes: Sequence[str], name: str) -> None:
    """Refuse classes whose names are no text, or cannot be told apart: results are listed by name."""
    seen: set[str] = set()
    for each in classes:
        try:
            each.encode()
        except (AttributeError, UnicodeEncodeError):
            raise DataError(f"{name} has a class named {each!a}, which is not text in UTF-8: rename it") from None
        if normal_name(each) in seen:
            raise DataError(f"{name} has two classes named {each!r}: results are listed by name, rename one")
        seen.add(normal_name(each))


def normal_name(name: str) -> str:
    """A name that is equal for names that look the same: an accent may be a character of its own."""
    return unicodedata.normalize("NFC", name)


def _check_labels(images: ImageDataset, classes: int, name: str) -> None:
    labels = images.labels
    if not isinstance(labels, Tensor) or labels.dtype is not torch.int64 or labels.shape != (len(images),):
        got = f"{labels.dtype} {tuple(labels.shape)}" if isinstance(labels, Tensor) else f"a {type(labels).__name__}"
        raise DataError(f"{name}: the labels of {len(images)} images are {got}; expected one int64 for each")
    if not len(labels):
        raise DataError(f"{name}: it has no images")
    lowest, highest = (int(value) for value in labels.aminmax())
    if lowest < 0 or highest >= classes:
        wrong = lowest if lowest < 0 else highest
        raise DataError(f"{name}: an image has the label {wrong}; with {classes} classes, labels are 0 to {classes - 1}")


def not_usable(image: Image) -> str:
    """Why an image whose header is read cannot be used; "" if it can."""
    if image.mode not in EIGHT_BIT:  # pillow would clip 16 bits to white, and fractions to black
        return f"its pixels are {image.mode}: no conversion to 8 bits is right for all such images. Convert it"
    shorter, longer = sorted(image.size)
    if shorter * MOST_RATIO < longer:
        return f"its sides are {image.width} x {image.height}, more than 1 : {MOST_RATIO}"
    return ""


class ArrayImages(ImageDataset):
    """Images in memory.

    Args:
        images: uint8 (N, C, H, W); one channel is grey, three are RGB.
        labels: int64 (N,).

    Raises:
        ConfigError: Tensors that are none of that.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        for name, value in (("images", images), ("labels", labels)):
            if not isinstance(value, Tensor):
                raise ConfigError(f"{name} are a {type(value).__name__}: expected a tensor")
        shape = tuple(images.shape)
        if images.dtype is not torch.uint8 or len(shape) != 4 or shape[1] not in (1, 3) or 0 in shape[2:]:
            raise ConfigError(f"images are {images.dtype} {shape}: expected torch.uint8 (N, 1 or 3, H, W)")
        if labels.dtype is not torch.int64 or labels.shape != shape[:1]:
            raise ConfigError(f"labels are {labels.dtype} {tuple(labels.shape)}: expected torch.int64 ({shape[0]},)")
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

    def look_over(self, indices: Tensor | None = None) -> None:
        self.base.look_over(self.indices if indices is None else self.indices[indices])

    def resident(self, indices: Tensor | None = None) -> Tensor:
        return self.base.resident(self.indices if indices is None else self.indices[indices])


class TorchImages(ImageDataset):
    """A map-style torch data set of ``(PIL image, label)`` pairs, such as torchvision's without a transform.

    Args:
        dataset: With ``__len__`` and ``__getitem__``.
        labels: Class of each image; by default ``dataset.targets``.
        input_size: Size of all images; None if they differ.

    Raises:
        ConfigError: No labels, not one per image, or none that are integers.
    """

    def __init__(self, dataset: object, labels: Sequence[int] | None = None, input_size: Size | None = None) -> None:
        known = labels if labels is not None else getattr(dataset, "targets", None)
        if known is None or len(known) != len(dataset):  # type: ignore[arg-type]
            raise ConfigError(f"{type(dataset).__name__} has no `targets` for its images: give labels=[...], one per image")
        self.dataset = dataset
        try:
            found = torch.as_tensor(known)
        except (TypeError, ValueError, RuntimeError):
            found = torch.empty(0)
        if found.dim() != 1 or found.is_floating_point() or found.is_complex():
            raise ConfigError(f"the labels of {type(dataset).__name__} are not integers, one per image")
        self.labels = found.to(torch.int64)
        self.input_size = input_size

    def image(self, index: int) -> Image:
        from PIL import Image

        name = f"image {index} of {type(self.dataset).__name__}"
        try:
            image = self.dataset[index][0]  # type: ignore[index]
        except Exception as error:  # the data set's own, which would end as a traceback of a worker
            raise DataError(f"{name} cannot be read: {type(error).__name__}: {first_line(error)}") from error
        if not isinstance(image, Image.Image):
            raise DataError(
                f"{name} is a {type(image).__name__}, not a PIL image: remove its transform, thriftnet augments by itself"
            )
        if problem := not_usable(image):
            raise DataError(f"{name}: {problem}")
        return image if image.mode == "L" else image.convert("RGB")
