"""Augmentation and preprocessing: their fields, and the transforms of torchvision and timm that implement them.

The random state of an image is a function of the seed, the epoch and its index, so that its augmentation depends neither on
resuming nor on the number of workers or processes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from thriftnet.data.dataset import DataSource, ImageDataset
from thriftnet.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]

RAND_AUGMENT = re.compile(r"rand(-([a-z]+[0-9.]+|t[a-z]+))*")  # timm silently ignores other sections
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "random")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Augmentation and preprocessing of images, applied in the order of the fields; the defaults apply nothing.

    Args:
        image_size: Height and width of the network's input; None: as stored.
        random_resized_crop: Range of the share of the area that a random crop keeps before resizing, as (0.08, 1.0).
        crop_ratio: Range of width / height of that crop.
        interpolation: In training: nearest, bilinear, bicubic or random (bilinear or bicubic).
        crop_padding: Black pixels on each side before a random crop of the image's own size.
        flip: Mirror images with probability 1/2.
        color_jitter: Largest relative change of brightness, contrast and saturation.
        rand_augment: RandAugment in timm's notation, as "rand-m9-mstd0.5-inc1".
        mean, std: Of each channel, in [0, 1], for normalisation; None: the data source's.
        cutout: Side of a square set to 0 after normalisation, centred anywhere in the image.
        random_erasing: Probability of erasing a rectangle with noise after normalisation.
        resize: In evaluation: the shorter side before the centre crop; None: image_size / crop_pct.
        crop_pct: In evaluation: image_size as a share of the resized shorter side.
        eval_interpolation: In evaluation: nearest, bilinear or bicubic.

    Raises:
        ConfigError: An invalid value.

    Sources: DeVries & Taylor, Improved Regularization of Convolutional Neural Networks with Cutout, 2017; Cubuk et al.,
    RandAugment, 2019; Zhong et al., Random Erasing Data Augmentation, 2017.
    """

    image_size: int | None = None
    random_resized_crop: tuple[float, float] | None = None
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    interpolation: str = "bilinear"
    crop_padding: int = 0
    flip: bool = False
    color_jitter: float = 0.0
    rand_augment: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    cutout: int = 0
    random_erasing: float = 0.0
    resize: int | None = None
    crop_pct: float = 1.0
    eval_interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # YAML has no tuples
                object.__setattr__(self, field.name, tuple(value))
        for name, known in (("interpolation", INTERPOLATIONS), ("eval_interpolation", INTERPOLATIONS[:3])):
            if getattr(self, name) not in known:
                raise unknown_name(name, str(getattr(self, name)), known)
        for name, holds, expected in self._conditions():
            if not holds:
                raise ConfigError(f"augmentation {name}={getattr(self, name)!r}: expected {expected}")
        for name in ("random_resized_crop", "resize"):
            if getattr(self, name) is not None and self.image_size is None:
                raise ConfigError(f"augmentation {name} needs an image_size, as image_size=224")

    def _conditions(self) -> Iterator[tuple[str, bool, str]]:
        """Field, whether its value is valid, and the expected value."""
        crop, size, mean, std = self.random_resized_crop, self.image_size, self.mean, self.std
        yield "image_size", size is None or size >= 1, "pixels, as 224"
        yield "random_resized_crop", crop is None or _is_range(crop, 1.0), "a range in (0, 1], as (0.08, 1.0)"
        yield "crop_ratio", _is_range(self.crop_ratio, float("inf")), "a range of ratios, as (0.75, 1.33)"
        for name in ("crop_padding", "cutout", "color_jitter"):
            yield name, getattr(self, name) >= 0, "a number >= 0"
        yield "random_erasing", 0 <= self.random_erasing <= 1, "a probability in [0, 1]"
        yield "std", std is None or all(value > 0 for value in std), "numbers > 0, one per channel"
        yield "mean", None in (mean, std) or len(mean or ()) == len(std or ()), "as many numbers as for std, one per channel"
        yield "resize", None in (self.resize, size) or (self.resize or 0) >= (size or 0), "a number >= image_size"
        yield "crop_pct", 0 < self.crop_pct <= 1, "a share in (0, 1], as 0.875"

    def for_source(self, source: DataSource) -> Augmentation:
        """A copy with the mean and std of the data source where none are set."""
        return replace(self, mean=self.mean or source.mean, std=self.std or source.std)

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std; a `ConfigError` if they are not set."""
        if self.mean is None or self.std is None:
            raise ConfigError("the augmentation has no mean and std: set both, or take the data's with for_source(source)")
        return self.mean, self.std

    def is_batched(self, dataset: ImageDataset, *, train: bool) -> bool:
        """Whether it can be applied to whole batches of stored images, as by `ResidentLoader`."""
        size = dataset.input_size
        if size is None or (self.image_size is not None and size[1:] != (self.image_size, self.image_size)):
            return False
        if not train:
            return self._shorter_side() == self.image_size
        per_image = (self.random_resized_crop, self.rand_augment, self.color_jitter, self.random_erasing)
        return not any(per_image)

    def _shorter_side(self) -> int | None:
        """Shorter side to which images are resized in evaluation."""
        return None if self.image_size is None else self.resize or int(self.image_size / self.crop_pct)


def _is_range(pair: tuple[float, float], highest: float) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1] <= highest


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
    """PIL image -> float tensor (C, H, W): resize, centre crop and normalise.

    Raises:
        ConfigError: Mean and std are not set.
    """
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
