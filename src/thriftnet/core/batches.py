"""Images for verbs that look at data: tensors of a loader's batches, without their labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from thriftnet.errors import DataError


def images_of(loader: Iterable[Any], verb: str) -> Iterator[Tensor]:
    """The images of each batch of a loader, which yields ``images`` or ``(images, ...)``.

    Args:
        loader: Read once, batch by batch.
        verb: Who asks, for messages.

    Raises:
        DataError: A batch that is or begins with no tensor.
    """
    for batch in loader:
        images = batch[0] if isinstance(batch, list | tuple) and batch else batch
        if not isinstance(images, Tensor):
            raise DataError(f"{verb} needs batches of tensors or (tensor, ...), got {type(images).__name__}")
        if len(images):
            yield images


def first_images(loader: Iterable[Any], count: int, verb: str, most_bytes: int = 1 << 28) -> Tensor:
    """The first ``count`` images of a loader, or all if it has fewer; fewer, too, where so many take more than ``most_bytes``.

    Raises:
        DataError: As `images_of`; or there are no images, or images of several sizes.
    """
    found: list[Tensor] = []
    for images in images_of(loader, verb):
        count = max(1, min(count, most_bytes // max(1, images[0].numel() * images.element_size())))
        found.append(images[: count - sum(map(len, found))])
        if images.shape[1:] != found[0].shape[1:]:
            raise DataError(
                f"{verb} needs images of one size, got {tuple(found[0].shape[1:])} and {tuple(images.shape[1:])}: resize them"
            )
        if sum(map(len, found)) >= count:
            break
    if not found:
        raise DataError(f"{verb} got data without images: give some images of the kind that the network sees")
    return torch.cat(found)
