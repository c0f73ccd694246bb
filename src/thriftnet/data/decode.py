"""Image files as RGB, and a one-line error for each that cannot be decoded."""

from __future__ import annotations

import io
import os
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from thriftnet.core.probe import Size
from thriftnet.data.dataset import ImageDataset, not_usable
from thriftnet.errors import DataError
from thriftnet.files import open_regular
from thriftnet.text import shortened

if TYPE_CHECKING:
    from PIL.Image import Image

CHECKED_HEADERS = 100_000  # of larger data sets, only some headers are read, and no common size is looked for
SAMPLED = 64
LARGEST_FILE = 1 << 30  # bytes; some of pillow's readers read the whole file first
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # pillow runs other programs for some of the others


class EncodedImages(ImageDataset):
    """Images that are decoded on access."""

    @abstractmethod
    def encoded(self, index: int) -> tuple[str | os.PathLike[str] | bytes, str]:
        """The file of an image, or its content; and its name in error messages."""

    @property
    def input_size(self) -> Size | None:  # type: ignore[override]
        """Size of all images by their headers; those that cannot be read are named when they are decoded."""
        return self._headers[0]

    @cached_property
    def _headers(self) -> tuple[Size | None, dict[int, str]]:
        """The common size, and why images cannot be read; of `SAMPLED` images only where there are too many to check all."""
        count, common, differ = len(self), None, len(self) > CHECKED_HEADERS
        problems: dict[int, str] = {}
        for index in (place * count // SAMPLED for place in range(SAMPLED)) if differ else range(count):
            try:
                with opened(*self.encoded(index)) as image:
                    size = 3, image.height, image.width
            except DataError as error:
                problems[index] = str(error)
                continue
            differ = differ or common not in (None, size)
            common = size
        return None if differ else common, problems

    def look_over(self, indices: Tensor | None = None) -> None:
        """The headers, then three images."""
        problems = self._headers[1]
        own = problems.keys() if indices is None else problems.keys() & set(indices.tolist())
        if own:
            first = problems[min(own)]
            raise DataError(first if len(own) == 1 else f"{len(own)} images cannot be read, the first: {first}")
        super().look_over(indices)

    def image(self, index: int) -> Image:
        """In mode RGB, whatever is stored; EXIF orientation is ignored, as by torchvision."""
        with opened(*self.encoded(index)) as image:
            rgb: Image = image.convert("RGB")
            return rgb


@contextmanager
def opened(source: str | os.PathLike[str] | bytes, name: str) -> Iterator[Image]:
    """An image whose header is read; errors in the block, which decodes it, are raised as `DataError`, too."""
    from PIL import Image, UnidentifiedImageError

    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open_regular(source) as file:
            if not isinstance(source, bytes) and os.fstat(file.fileno()).st_size > LARGEST_FILE:
                raise ValueError(f"it has more than {LARGEST_FILE >> 30} GiB")
            with Image.open(file, formats=FORMATS) as image:
                if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                    raise ValueError(f"it states {image.width} x {image.height} pixels, more than pillow deems safe")
                if problem := not_usable(image):
                    raise ValueError(problem)
                yield image
    except Exception as error:  # pillow's readers raise anything: KeyError, AssertionError, struct.error, ...
        unknown = isinstance(error, UnidentifiedImageError)
        reason = "not an image that pillow can read" if unknown else getattr(error, "strerror", None) or str(error)
        reason = shortened(" ".join(reason.split()), 200) or type(error).__name__
        raise DataError(
            f"{name} cannot be decoded: {reason}. Repair or remove it, or skip broken images with on_corrupt='skip'"
        ) from None
