"""The bundled digits: 1,797 real 8 x 8 images of handwritten digits, 10 classes.

Source: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI, as shipped with scikit-learn.
"""

from __future__ import annotations

import torch

from thriftnet.data.dataset import ArrayImages, DataSource
from thriftnet.errors import DataError

STEP = 15  # of the 8 bits of an image, for each of the 16 levels of grey
TEST_FRACTION = 0.25
CLASSES = tuple("0123456789")


def digits_source() -> DataSource:
    """The digits, split with equal class shares; mean and std are those of the training images."""
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise DataError("the digits come with scikit-learn, which is missing: pip install 'thriftnet[train]'") from None
    pixels, labels = load_digits(return_X_y=True)
    pieces = train_test_split(pixels, labels, test_size=TEST_FRACTION, random_state=0, stratify=labels)
    train_x, test_x, train_y, test_y = map(torch.from_numpy, pieces)
    splits = {
        name: ArrayImages((x * STEP).to(torch.uint8).view(-1, 1, 8, 8), y.long())
        for name, x, y in (("train", train_x, train_y), ("test", test_x, test_y))
    }
    mean, std = float(train_x.mean()) * STEP / 255, float(train_x.std()) * STEP / 255
    return DataSource("digits", CLASSES, dict(splits), (mean,), (std,))
