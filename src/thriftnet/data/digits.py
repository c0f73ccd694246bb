"""The bundled digits: 1,797 real 8 x 8 images of handwritten digits, 10 classes.

Source: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI, as shipped with scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thriftnet.data.dataset import ArrayImages, DataSource
from thriftnet.errors import DataError

STEP = 15  # of the 8 bits of an image, for each of the 16 levels of grey


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W), normalised, and labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """Train and test split; mean and std are those of the training images, stored as `digits_source` stores them, in [0, 1]."""

    train: Split
    test: Split
    mean: float
    std: float
    classes: tuple[str, ...] = tuple("0123456789")
    input_size: tuple[int, int, int] = (1, 8, 8)


def load_digits(seed: int = 0, test_fraction: float = 0.25) -> Digits:
    """The digits, split with equal class shares.

    Raises:
        DataError: scikit-learn, which brings the images, is not installed.
    """
    train_x, test_x, train_y, test_y = _pieces(seed, test_fraction)
    mean, std = float(train_x.mean()), float(train_x.std())

    def split(x: Tensor, y: Tensor) -> Split:
        return Split(((x - mean) / std).float().view(-1, 1, 8, 8), y.long())

    return Digits(split(train_x, train_y), split(test_x, test_y), mean * STEP / 255, std * STEP / 255)


def digits_source() -> DataSource:
    """The same images as a `DataSource`, with 8 bits for each pixel.

    Raises:
        DataError: scikit-learn, which brings the images, is not installed.
    """
    train_x, test_x, train_y, test_y = _pieces(seed=0, test_fraction=0.25)
    facts = load_digits()

    def images(x: Tensor, y: Tensor) -> ArrayImages:
        return ArrayImages((x * STEP).to(torch.uint8).view(-1, 1, 8, 8), y.long())

    splits = {"train": images(train_x, train_y), "test": images(test_x, test_y)}
    return DataSource("digits", facts.classes, dict(splits), (facts.mean,), (facts.std,))


def _pieces(seed: int, test_fraction: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images, test images, training labels, test labels; pixels from 0 to 16."""
    try:
        from sklearn.datasets import load_digits as bundled
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise DataError("the digits come with scikit-learn, which is missing: pip install 'thriftnet[train]'") from None
    images, labels = bundled(return_X_y=True)
    pieces = train_test_split(images, labels, test_size=test_fraction, random_state=seed, stratify=labels)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, pieces)
    return train_x, test_x, train_y, test_y
