"""Parts of a data set: images held out for validation, and a limited number of images."""

from __future__ import annotations

import torch

from thriftnet.arguments import Count, OpenShare, Seed, checked
from thriftnet.data.dataset import ImageDataset, Subset
from thriftnet.errors import DataError


@checked
def train_validation(source: ImageDataset, fraction: OpenShare = 0.1, seed: Seed = 0) -> tuple[Subset, Subset]:
    """Split a data set in two, with the same share of every class.

    A class of two or more images is in both parts; one of a single image is in the first.

    Args:
        source: The training images.
        fraction: Share of the second part, in (0, 1).
        seed: Equal seeds hold out the same images.

    Returns:
        The images to train on and those to validate on, each in the order of the source.

    Raises:
        ConfigError: ``fraction`` is not in (0, 1).
        DataError: No class has two images.
    """
    random = torch.Generator().manual_seed(seed)
    labels = source.labels
    held_out = torch.zeros(len(labels), dtype=torch.bool)
    for label in sorted(set(labels.tolist())):
        members = (labels == label).nonzero().squeeze(1)
        count = min(max(round(fraction * len(members)), 1), len(members) - 1)
        held_out[members[torch.randperm(len(members), generator=random)[:count]]] = True
    if not held_out.any():
        raise DataError(f"none of the {len(labels)} images can be held out: no class has two. Give more images")
    return Subset(source, (~held_out).nonzero().squeeze(1)), Subset(source, held_out.nonzero().squeeze(1))


@checked
def limited(images: ImageDataset, limit: Count | None) -> ImageDataset:
    """At most ``limit`` images, evenly spread, since class folders are sorted by class; None for all."""
    if limit is None or limit >= len(images):
        return images
    return Subset(images, torch.arange(limit) * len(images) // limit)
