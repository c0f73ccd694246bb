"""What every source of images gives: the same few things, whatever the files look like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


class ImageDataset(Protocol):
    """One split of a data set, as stored: nothing is normalised or augmented yet."""

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 (N,)."""

    def __len__(self) -> int: ...

    def image(self, index: int) -> Image:
        """One image, decoded, in mode RGB (or L for the digits).

        Raises:
            DataError: It cannot be decoded; the message names the file or row.
        """

    def resident(self) -> Tensor:
        """All images as one uint8 tensor (N, C, H, W).

        Raises:
            DataError: They are not all of one size, or one cannot be decoded.
        """


@dataclass(frozen=True)
class DataSource:
    """A data set with its splits.

    Args:
        spec: As the user wrote it: ``digits``, ``cifar10:DIR``, ``cifar100:DIR``, ``folder:DIR`` or ``parquet:DIR``.
        classes: Name of each class, in the order of the labels.
        splits: Name -> images, at least ``train`` and ``test`` (``val`` where the data has no test split of its own).
        mean: Of each channel, in [0, 1]: how networks for this data are usually fed.
        std: Of each channel, in [0, 1].
        input_size: Channels, height, width; None where the images differ in size.
    """

    spec: str
    classes: tuple[str, ...]
    splits: dict[str, ImageDataset]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: tuple[int, int, int] | None
