"""The bundled digits: 1,797 real 8 x 8 images of handwritten digits, 10 classes.

Source: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI, as shipped with scikit-learn.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thriftnet.errors import DataError


@dataclass(frozen=True)
class Split:
    """Images (N, C, H, W), normalised, and labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Digits:
    """Train and test split; mean and std are those of the training images."""

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
    try:
        from sklearn.datasets import load_digits as bundled
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise DataError("the digits come with scikit-learn, which is missing: pip install 'thriftnet[train]'") from None
    images, labels = bundled(return_X_y=True)
    pieces = train_test_split(images, labels, test_size=test_fraction, random_state=seed, stratify=labels)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, pieces)
    mean, std = float(train_x.mean()), float(train_x.std())

    def split(x: Tensor, y: Tensor) -> Split:
        return Split(((x - mean) / std).float().view(-1, 1, 8, 8), y.long())

    return Digits(split(train_x, train_y), split(test_x, test_y), mean, std)
