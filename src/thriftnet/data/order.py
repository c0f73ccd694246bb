"""The order of images in an epoch, and the share of each process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from thriftnet.data.transforms import generator
from thriftnet.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Order:
    """Which image is at each position 0, 1, ... of an epoch, and which positions are this process's.

    In training, the processes split each batch of ``world_size * batch_size`` consecutive positions; the parts of a smaller
    last batch differ by one image at most (fewer images than processes are dropped). In evaluation, each process has one
    consecutive part of all positions.

    Raises:
        ConfigError: An invalid number.
        DataError: In training, fewer images than one batch.
    """

    images: int
    batch_size: int  # images per step and process
    train: bool  # whether all processes need the same number of batches
    shuffle: bool  # whether to permute the images in each epoch
    drop_last: bool  # whether to drop a smaller last batch
    seed: int  # of the permutations
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.seed < 0 or not 0 <= self.rank < self.world_size:
            raise ConfigError(
                f"batch_size={self.batch_size}, seed={self.seed}, rank={self.rank}, world_size={self.world_size}: expected "
                "batch_size >= 1, seed >= 0 and 0 <= rank < world_size"
            )
        if self.train and not self.spans():
            needed = self.batch_size * self.world_size if self.drop_last else self.world_size
            raise DataError(f"{self.images} training images are fewer than one batch of {needed}: use a smaller batch")

    @property
    def global_batch(self) -> int:
        """Images per step over all processes."""
        return self.batch_size * self.world_size

    def spans(self) -> list[tuple[int, int]]:
        """First and last + 1 position of each batch of this process."""
        rank, world, size = self.rank, self.world_size, self.batch_size
        if not self.train:
            start, stop = self.images * rank // world, self.images * (rank + 1) // world
            stop -= (stop - start) % size if self.drop_last else 0
            return [(low, min(low + size, stop)) for low in range(start, stop, size)]
        batch = self.global_batch
        rest = self.images % batch
        last = self.images - rest
        spans = [(low + rank * size, low + (rank + 1) * size) for low in range(0, last, batch)]
        if rest >= world and not self.drop_last:
            spans.append((last + rest * rank // world, last + rest * (rank + 1) // world))
        return spans

    def indices(self, epoch: int) -> Tensor:
        """Image at each position."""
        if not self.shuffle:
            return torch.arange(self.images)
        return torch.randperm(self.images, generator=generator(self.seed, epoch, 0))
