"""Batches for training and evaluation: from a data set kept on the device, or decoded image by image.

Epochs of both loaders are the same after any interruption and on any number of processes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import islice
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from thriftnet.arguments import BatchSize, Count, Natural, Seed, Workers, checked
from thriftnet.data.augmentation import Augmentation
from thriftnet.data.batched import crop_and_flip, cut_out, draw, normalise, pad
from thriftnet.data.dataset import ImageDataset
from thriftnet.data.order import Order
from thriftnet.data.transforms import Transform, eval_transform, preserve_random_state, seed_random_state, train_transform
from thriftnet.errors import ConfigError, DataError
from thriftnet.memory import needs

RESIDENT_BYTES = 2 << 30  # larger data sets are kept on the device only with resident=True
BATCHES_AT_ONCE = 16  # augmented together on accelerators, to launch fewer kernels

Batch = tuple[Tensor, Tensor]


class Loader(ABC):
    """Batches of ``(images, labels)`` on the device: float32 (B, C, H, W) and int64 (B,)."""

    def __init__(self, dataset: ImageDataset, augmentation: Augmentation, order: Order, device: str | torch.device) -> None:
        self.dataset = dataset
        self.augmentation = augmentation
        self.order = order
        self.device = torch.device(device)
        self.epoch = 0
        self._spans = order.spans()
        self._next = 0  # first batch of the next pass
        self._given = 0  # batches of this epoch given so far

    def __len__(self) -> int:
        """Batches in an epoch."""
        return len(self._spans)

    @property
    def images_per_epoch(self) -> int:
        """Images of an epoch on this process."""
        return sum(stop - start for start, stop in self._spans)

    def weight(self, batch: int) -> float:
        """Weight of this process's batch mean in the mean over processes: 1, except for an uneven last batch."""
        start, stop = self._spans[batch]
        whole = min(self.order.global_batch, self.order.images - batch * self.order.global_batch)
        return (stop - start) * self.order.world_size / whole

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; a change starts it at its first batch."""
        if epoch != self.epoch:
            self.epoch, self._next, self._given = epoch, 0, 0

    def __iter__(self) -> Iterator[Batch]:
        start, self._next = self._next, 0
        self._given = start
        for batch in self._batches(self._spans[start:]):
            self._given += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, and how many of its batches were given."""
        return {"epoch": self.epoch, "step": self._given, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume from another loader's state: the next pass gives the remaining batches of its epoch."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise ConfigError(
                    f"the sampler's state has {name}={state.get(name)}, this loader {value}: resume with the data, seed and "
                    "batch size (times processes) of the original run"
                )
        self.epoch, self._next, self._given = state["epoch"], state["step"], state["step"]

    def _identity(self) -> dict[str, int]:
        """Settings that determine an epoch."""
        return {"images": self.order.images, "global_batch": self.order.global_batch, "seed": self.order.seed}

    @abstractmethod
    def _batches(self, spans: list[tuple[int, int]]) -> Iterator[Batch]:
        """The batches at these spans of the current epoch."""


class ResidentLoader(Loader):
    """A whole data set of images of one size, as uint8 on the device, augmented in batches."""

    def __init__(self, dataset: ImageDataset, augmentation: Augmentation, order: Order, device: str | torch.device) -> None:
        super().__init__(dataset, augmentation, order, device)
        own = None if order.shuffle or not self._spans else torch.arange(self._spans[0][0], self._spans[-1][1])
        self._first = 0 if own is None else int(own[0])  # images of other processes are not kept here
        stored = dataset.resident(own)
        self.height, self.width = stored.shape[-2:]
        self._images = pad(stored, augmentation.crop_padding if order.train else 0).to(self.device)
        self._labels = (dataset.labels if own is None else dataset.labels[own]).to(self.device)
        _check_channels(augmentation, stored.shape[1])
        mean, std = (torch.tensor(values).view(-1, 1, 1) for values in augmentation.normalisation())
        self._mean, self._std = mean.to(self.device), std.to(self.device)

    def _batches(self, spans: list[tuple[int, int]]) -> Iterator[Batch]:
        order = self.order
        indices = (order.indices(self.epoch) - self._first).to(self.device)
        augmentation = self.augmentation if order.train else Augmentation()
        size = self.height, self.width
        draws = draw(augmentation, order.images, *size, order.seed, self.epoch).map(lambda drawn: drawn.to(self.device))
        rest = iter(spans)
        while chunk := list(islice(rest, 1 if self.device.type == "cpu" else BATCHES_AT_ONCE)):
            positions = torch.cat([torch.arange(start, stop, device=self.device) for start, stop in chunk])
            picked, drawn = indices[positions], draws.map(itemgetter(positions))
            images = normalise(crop_and_flip(self._images, picked, drawn, *size), self._mean, self._std)
            if drawn.cutout is not None:
                cut_out(images, drawn.cutout, augmentation.cutout)
            lengths = [stop - start for start, stop in chunk]
            yield from zip(torch.split(images, lengths), torch.split(self._labels[picked], lengths), strict=True)


class ImageLoader(Loader):
    """Images decoded and augmented one by one, in torch's DataLoader with so many worker processes (0: in this one)."""

    def __init__(
        self,
        dataset: ImageDataset,
        augmentation: Augmentation,
        order: Order,
        device: str | torch.device,
        workers: int = 0,
    ) -> None:
        super().__init__(dataset, augmentation, order, device)
        if len(dataset):
            _check_channels(augmentation, len(dataset.image(0).getbands()))
        transform = train_transform(augmentation) if order.train else eval_transform(augmentation)
        samples = _Samples(dataset, transform, order.seed if order.train else None)
        self._plan: list[list[tuple[int, int]]] = []
        self._loader = torch.utils.data.DataLoader(
            samples,
            batch_sampler=self._plan,
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator(),  # its own: the global one stays as a resumed run needs it
        )

    def _batches(self, spans: list[tuple[int, int]]) -> Iterator[Batch]:
        indices = self.order.indices(self.epoch)
        self._plan[:] = [[(self.epoch, index) for index in indices[start:stop].tolist()] for start, stop in spans]
        loaded_batches = iter(self._loader)
        for _ in spans:
            with preserve_random_state():  # without workers, images are augmented in this process
                loaded = next(loaded_batches)
            if isinstance(loaded, DataError):
                raise loaded
            images, labels = loaded
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class _Samples(torch.utils.data.Dataset[Any]):
    """Augmented images with labels, by epoch and index, so that persistent workers know the epoch; no seed: nothing is random."""

    def __init__(self, dataset: ImageDataset, transform: Transform, seed: int | None) -> None:
        self.dataset = dataset
        self.transform = transform
        self.seed = seed
        self.labels = dataset.labels

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, Tensor] | DataError:
        epoch, index = key
        try:
            image = self.dataset.image(index)
        except DataError as error:
            return error  # torch would wrap it in the worker's traceback
        if self.seed is not None:
            seed_random_state(self.seed, epoch, index)
        return self.transform(image), self.labels[index]


def _collate(samples: list[Any]) -> Batch | DataError:
    for sample in samples:
        if isinstance(sample, DataError):
            return sample
    images, labels = zip(*samples, strict=True)
    sizes = sorted({tuple(image.shape) for image in images})
    if len(sizes) > 1:
        return DataError(f"images of one batch differ in size, as {sizes[0]} and {sizes[1]}: set an image_size")
    return torch.stack(images), torch.stack(labels)


@checked
def make_loader(
    dataset: ImageDataset,
    batch_size: BatchSize,
    *,
    augmentation: Augmentation,
    train: bool,
    seed: Seed = 0,
    device: str | torch.device = "cpu",
    rank: Natural = 0,
    world_size: Count = 1,
    workers: Workers = 0,
    resident: bool | None = None,
    shuffle: bool | None = None,
    drop_last: bool = False,
) -> Loader:
    """A `ResidentLoader` where the data allows it, else an `ImageLoader`.

    Args:
        dataset: The images.
        batch_size: Images per step and process.
        augmentation: `Augmentation.for_source` sets mean and std.
        train: Whether to augment, shuffle, and give all processes the same number of batches. In evaluation each image
            is read once over all processes.
        seed: Of order and augmentation.
        device: Of the batches.
        rank, world_size: Of this process, and the number of processes.
        workers: Processes that decode, for an `ImageLoader`.
        resident: Whether to keep the whole data set on the device; default: if all images have one size, need at most
            `RESIDENT_BYTES`, and the augmentation can be applied to batches.
        shuffle: Default: in training only.
        drop_last: Whether to drop a smaller last batch.

    Raises:
        ConfigError: Invalid numbers, or ``resident=True`` with an augmentation that cannot be applied to batches.
        DataError: Fewer training images than one batch, or (resident) an image that cannot be decoded.
    """
    _check_memory(dataset, batch_size, augmentation, train=train)
    order = Order(
        images=len(dataset),
        batch_size=batch_size,
        train=train,
        shuffle=train if shuffle is None else shuffle,
        drop_last=drop_last,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )
    if _is_resident(dataset, augmentation, train, resident):
        return ResidentLoader(dataset, augmentation, order, device)
    return ImageLoader(dataset, augmentation, order, device, workers)


def _check_memory(dataset: ImageDataset, batch_size: int, augmentation: Augmentation, *, train: bool) -> None:
    """Refuse a batch, or an image while it is cropped, that does not fit into memory."""
    channels = len(augmentation.normalisation()[0])
    stored = dataset.input_size[1:] if dataset.input_size else (1, 1)
    sides = (augmentation.image_size, augmentation.image_size) if augmentation.image_size else stored
    batch = min(batch_size, len(dataset)) * channels * sides[0] * sides[1]
    needs(4 * batch, f"a batch of {min(batch_size, len(dataset)):,} images of {sides[0]} x {sides[1]}")
    padding = augmentation.crop_padding if train else 0
    image = channels * (sides[0] + 2 * padding) * (sides[1] + 2 * padding)
    needs(image, f"an image of {sides[0]} x {sides[1]} with crop_padding={padding}")


def _is_resident(dataset: ImageDataset, augmentation: Augmentation, train: bool, wanted: bool | None) -> bool:
    """Whether to keep the whole data set on the device."""
    if wanted is False:
        return False  # without reading the headers of image files
    size, padding = dataset.input_size, augmentation.crop_padding if train else 0
    is_batched = augmentation.is_batched(dataset, train=train)
    if wanted is None and size is not None:
        return is_batched and len(dataset) * size[0] * (size[1] + 2 * padding) * (size[2] + 2 * padding) <= RESIDENT_BYTES
    if wanted and not is_batched:
        raise ConfigError(
            "resident=True needs images of one size, and augmentation by crop_padding, flip and cutout only: random_resized_crop, "
            "rand_augment, color_jitter, random_erasing and resizing need resident=False"
        )
    return bool(wanted)


def _check_channels(augmentation: Augmentation, channels: int) -> None:
    values = len(augmentation.normalisation()[0])
    if values != channels:
        raise ConfigError(f"mean and std have {values} values, the images {channels} channels: give one value per channel")
