"""The transforms of torchvision and timm that implement the fields of `Augmentation`.

The random state of an image is a function of the seed, the epoch and its index, so that its augmentation depends neither on
resuming nor on the number of workers or processes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from thriftnet.data.augmentation import RAND_AUGMENT, Augmentation
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]


def train_transform(augmentation: Augmentation) -> Transform:
    """PIL image -> float tensor (C, H, W), augmented.

    Raises:
        ConfigError: Mean and std are not set, or a rand_augment that timm does not know.
    """
    from torchvision import transforms

    mean, std = augmentation.normalisation()
    steps: list[Any] = [*_resizing(augmentation)]
    if augmentation.crop_padding:
        steps.append(partial(padded_crop, padding=augmentation.crop_padding))
    if augmentation.flip:
        steps.append(transforms.RandomHorizontalFlip())
    if augmentation.color_jitter:
        steps.append(transforms.ColorJitter(*(augmentation.color_jitter,) * 3))
    if augmentation.rand_augment:
        steps.append(_rand_augment(augmentation, mean))
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    if augmentation.cutout:
        steps.append(partial(cutout, length=augmentation.cutout))
    if augmentation.random_erasing:
        from timm.data.random_erasing import RandomErasing

        erasing: Any = RandomErasing
        steps.append(erasing(augmentation.random_erasing, mode="pixel", max_count=1, device="cpu"))
    return transforms.Compose(steps)  # type: ignore[no-any-return]


def eval_transform(augmentation: Augmentation) -> Transform:
    """PIL image -> float tensor (C, H, W): resize, centre crop and normalise."""
    from torchvision import transforms

    mean, std = augmentation.normalisation()
    steps: list[Any] = []
    if augmentation.image_size is not None:
        mode = transforms.InterpolationMode(augmentation.eval_interpolation)
        steps = [transforms.Resize(augmentation._shorter_side(), mode), transforms.CenterCrop(augmentation.image_size)]
    return transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(mean, std)])  # type: ignore[no-any-return]


def _resizing(augmentation: Augmentation) -> Iterator[Any]:
    """The transform that brings training images to image_size."""
    size = augmentation.image_size
    if size is None:
        return
    from torchvision import transforms

    if augmentation.random_resized_crop is not None:
        from timm.data.transforms import RandomResizedCropAndInterpolation

        crop: Any = RandomResizedCropAndInterpolation
        yield crop(size, augmentation.random_resized_crop, augmentation.crop_ratio, augmentation.interpolation)
    else:
        mode = "bilinear" if augmentation.interpolation == "random" else augmentation.interpolation
        yield transforms.Resize((size, size), transforms.InterpolationMode(mode))


def _rand_augment(augmentation: Augmentation, mean: tuple[float, ...]) -> Any:
    from timm.data.auto_augment import rand_augment_transform

    grey = tuple(min(255, round(255 * value)) for value in mean)
    hints: dict[str, Any] = {
        "translate_const": int((augmentation.image_size or 32) * 0.45),
        "img_mean": grey if len(grey) > 1 else grey[0],
    }
    if augmentation.interpolation != "random":
        from PIL.Image import Resampling

        hints["interpolation"] = Resampling[augmentation.interpolation.upper()]
    text = augmentation.rand_augment or ""
    try:
        if not RAND_AUGMENT.fullmatch(text):
            raise ValueError("expected rand, then sections of letters and a number")
        transform: Any = rand_augment_transform(text, hints)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(f"timm knows no rand_augment {text!r} ({error}). Write it as 'rand-m9-mstd0.5-inc1'") from None
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return transform


def posterize(image: Image, bits: int, **_: object) -> Image:
    """Keep the upper bits of each pixel; at the highest magnitude timm asks for 0 bits, which new pillow refuses."""
    from PIL import ImageOps

    return ImageOps.posterize(image, bits) if bits > 0 else image.point(lambda _: 0)


def padded_crop(image: Image, padding: int) -> Image:
    """A random crop of the image's own size out of the image with a black border of ``padding`` pixels."""
    from torchvision.transforms import RandomCrop

    return RandomCrop((image.height, image.width), padding)(image)  # type: ignore[no-any-return]


def cutout(image: Tensor, length: int) -> Tensor:
    """Set a square of side ``length`` to 0; its centre is anywhere in the image, so it may extend beyond the border."""
    height, width = image.shape[-2:]
    row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
    half = length // 2
    image[..., max(0, row - half) : row + half, max(0, column - half) : column + half] = 0
    return image


def seed_random_state(*key: int) -> None:
    """Seed Python, numpy and torch (on the CPU) from ``key``."""
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would change the accelerators' states, too


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore the random states of Python, numpy and torch (on the CPU) on exit."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def generator(*key: int) -> torch.Generator:
    """A generator seeded from ``key``."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1)
