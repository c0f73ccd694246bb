"""The input pipeline: batches augmented on tensors, against images one by one as the papers' code has them.

The baseline is what their CIFAR training does for each image: a PIL image, torchvision's RandomCrop(32, 4), RandomHorizontalFlip,
ToTensor and Normalize, and torch's DataLoader without workers. That both give images of the same distribution is tested
in tests/test_loaders.py; here chance differs, so that no equality is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.measuring import Case, Fact, Ratio, Settings, Target
from thriftnet.data.augmentation import Augmentation
from thriftnet.data.dataset import ArrayImages
from thriftnet.data.loaders import Loader, make_loader
from thriftnet.data.transforms import cutout as cut_out

TOPIC = "data"
P6 = Target("P6", "images one by one with PIL against ResidentLoader, per image", 10.0, "at least")
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
BATCH = 128


def cases(settings: Settings) -> Iterator[Case | Fact]:
    """The topic's cases."""
    if settings.sweep:
        return
    for cutout in (0, 16):
        yield pipeline_case(256 if settings.quick else 2048, cutout)


def pipeline_case(count: int, cutout: int) -> Case:
    """One epoch over the same images."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator, dtype=torch.uint8)
    images = ArrayImages(pixels, torch.arange(count) % 10)
    variants: dict[str, Callable[[], object]] = {
        "PIL, image by image": exhausted(torch.utils.data.DataLoader(PilImages(images, cutout), BATCH, shuffle=True)),
        "ResidentLoader": epochs(loader(images, cutout, resident=True)),
        "ImageLoader": epochs(loader(images, cutout, resident=False)),
    }
    ratios = [Ratio("PIL, image by image", "ResidentLoader", P6), Ratio("PIL, image by image", "ImageLoader")]
    name = f"{count} images of 32 x 32, crop and flip{' and cutout' if cutout else ''}"
    return Case(TOPIC, name, variants, ratios, 15, apart=frozenset(variants))


class PilImages(torch.utils.data.Dataset[Any]):
    """CIFAR as torchvision keeps it: an array (N, H, W, C), made an image when it is asked for."""

    def __init__(self, images: ArrayImages, cutout: int) -> None:
        from torchvision import transforms

        self.pixels = images.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels = images.labels.tolist()
        steps: list[Any] = [transforms.RandomCrop(32, 4), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
        steps += [transforms.Normalize(MEAN, STD), *([partial(cut_out, length=cutout)] if cutout else [])]
        self.transform = transforms.Compose(steps)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Any:
        from PIL import Image

        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def loader(images: ArrayImages, cutout: int, *, resident: bool) -> Loader:
    """One of ours with the baseline's augmentation."""
    augmentation = Augmentation(crop_padding=4, flip=True, cutout=cutout, mean=MEAN, std=STD)
    return make_loader(images, BATCH, augmentation=augmentation, train=True, resident=resident)


def epochs(batches: Loader) -> Callable[[], object]:
    """A pass over the next epoch."""

    def run() -> None:
        batches.set_epoch(batches.epoch + 1)
        for _ in batches:
            pass

    return run


def exhausted(batches: Any) -> Callable[[], object]:
    """A pass over all batches."""

    def run() -> None:
        for _ in batches:
            pass

    return run
