"""Image files as RGB, and what to say of broken ones."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from thriftnet.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

HEADERS = 100_000  # more images than that are not looked at to see whether they have one size


def decode(source: str | os.PathLike[str] | bytes, name: str) -> Image:
    """An image in mode RGB, whatever it is stored as; rotation notes of cameras are ignored, as torchvision does.

    Args:
        source: A file, or the content of one.
        name: What to call it when it is broken.

    Raises:
        DataError: It cannot be read or is no image.
    """
    from PIL import Image

    try:
        with Image.open(_stream(source)) as opened:
            image: Image.Image = opened.convert("RGB")
            return image
    except _broken() as error:
        raise DataError(_complaint(name, error)) from None


def stored_size(source: str | os.PathLike[str] | bytes, name: str) -> tuple[int, int, int]:
    """3, height and width of an image, from its header only.

    Raises:
        DataError: It cannot be read or is no image.
    """
    from PIL import Image

    try:
        with Image.open(_stream(source)) as opened:
            return 3, opened.height, opened.width
    except _broken() as error:
        raise DataError(_complaint(name, error)) from None


def common_size(count: int, size_of: Callable[[int], tuple[int, int, int]]) -> tuple[int, int, int] | None:
    """The size that all of ``count`` images have by their headers; None where they differ or are too many to look at.

    Headers that cannot be read are passed over: such an image is named when it is decoded.
    """
    common = None
    for index in range(count if count <= HEADERS else 0):
        try:
            size = size_of(index)
        except DataError:
            continue
        if common not in (None, size):
            return None
        common = size
    return common


def _stream(source: str | os.PathLike[str] | bytes) -> str | os.PathLike[str] | io.BytesIO:
    return io.BytesIO(source) if isinstance(source, bytes) else source


def _broken() -> tuple[type[Exception], ...]:
    """What pillow raises for files that are missing, truncated or no images."""
    from PIL import Image

    refused = (OSError, SyntaxError, ValueError, OverflowError, EOFError, struct.error, zlib.error)
    return (*refused, Image.DecompressionBombError)


def _complaint(name: str, error: Exception) -> str:
    reason = "it is no image that pillow can read" if "cannot identify" in str(error) else str(error)
    if isinstance(error, OSError) and error.strerror:
        reason = error.strerror
    return f"{name} cannot be decoded: {reason}. Repair or remove it, or leave broken images out with on_corrupt='skip'"
