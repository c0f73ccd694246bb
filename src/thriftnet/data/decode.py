"""Image files as RGB, and a one-line error for each that cannot be decoded."""

from __future__ import annotations

import io
import os
import struct
import zlib
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from thriftnet.core.probe import Size
from thriftnet.data.dataset import ImageDataset
from thriftnet.errors import DataError
from thriftnet.files import open_regular

if TYPE_CHECKING:
    from PIL.Image import Image

CHECKED_HEADERS = 100_000  # larger data sets are not checked for a common size


class EncodedImages(ImageDataset):
    """Images that are decoded on access."""

    @abstractmethod
    def encoded(self, index: int) -> tuple[str | os.PathLike[str] | bytes, str]:
        """The file of an image, or its content; and its name in error messages."""

    @cached_property
    def input_size(self) -> Size | None:  # type: ignore[override]
        """Size of all images by their headers; those that cannot be read are named when they are decoded."""
        common = None
        for index in range(len(self) if len(self) <= CHECKED_HEADERS else 0):
            try:
                with opened(*self.encoded(index)) as image:
                    size = 3, image.height, image.width
            except DataError:
                continue
            if common not in (None, size):
                return None
            common = size
        return common

    def image(self, index: int) -> Image:
        """In mode RGB, whatever is stored; EXIF orientation is ignored, as by torchvision."""
        with opened(*self.encoded(index)) as image:
            rgb: Image = image.convert("RGB")
            return rgb


@contextmanager
def opened(source: str | os.PathLike[str] | bytes, name: str) -> Iterator[Image]:
    """An image whose header is read; decoding errors in the block are raised as `DataError`."""
    from PIL import Image

    refusals = (OSError, SyntaxError, ValueError, OverflowError, EOFError, struct.error, zlib.error)
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file, Image.open(file) as image:
            yield image
    except (*refusals, Image.DecompressionBombError) as error:
        reason = "not an image that pillow can read" if "cannot identify" in str(error) else str(error)
        reason = (isinstance(error, OSError) and error.strerror) or reason
        raise DataError(
            f"{name} cannot be decoded: {reason}. Repair or remove it, or skip broken images with on_corrupt='skip'"
        ) from None
