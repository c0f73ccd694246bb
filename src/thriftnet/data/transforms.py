"""How an image becomes the input of a network: what to do in training and in evaluation, and the per-image form of it.

The transforms are torchvision's and timm's. Every image gets its own random state, made from the seed, the epoch and its
index, so that neither resuming nor the number of workers or processes changes what an image looks like.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from thriftnet.data.dataset import DataSource, ImageDataset
from thriftnet.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from PIL.Image import Image

Transform = Callable[["Image"], Tensor]

RAND_AUGMENT = re.compile(r"rand(-([a-z]+[0-9.]+|t[a-z]+))*")  # timm passes over other sections in silence
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "random")


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to images, in the order of the fields; what is left out is not done.

    Args:
        image_size: Height and width that the network is given; None: as stored.
        random_resized_crop: Share of the area that a random crop keeps, as (0.08, 1.0), before it is resized to image_size.
        crop_ratio: Least and greatest ratio of width to height of that crop.
        interpolation: nearest, bilinear, bicubic, or random (bilinear or bicubic), of the training images.
        crop_padding: Pixels of black on each side before a random crop of the image's own size.
        flip: Mirror every second image, by chance.
        color_jitter: Brightness, contrast and saturation change by up to this share.
        rand_augment: In timm's words, as "rand-m9-mstd0.5-inc1".
        mean: Of each channel, in [0, 1], subtracted; None: the data source's.
        std: Of each channel, in [0, 1], divided by; None: the data source's.
        cutout: Side of a square set to 0 after that, its centre anywhere in the image.
        random_erasing: Probability of a rectangle of noise after that.
        resize: In evaluation, the shorter side before the centre crop; None: image_size / crop_pct.
        crop_pct: In evaluation, the share of the resized image that the centre crop keeps.
        eval_interpolation: nearest, bilinear or bicubic, in evaluation.

    Raises:
        ConfigError: A value that is not possible.

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
        self._check_names()
        self._check_numbers()

    def _check_names(self) -> None:
        for name, possible in (("interpolation", INTERPOLATIONS), ("eval_interpolation", INTERPOLATIONS[:3])):
            if getattr(self, name) not in possible:
                raise unknown_name(name, str(getattr(self, name)), possible)

    def _check_numbers(self) -> None:
        needs_size = [name for name in ("random_resized_crop", "resize") if getattr(self, name) is not None]
        wrong = {
            "image_size": self.image_size is not None and self.image_size < 1,
            "random_resized_crop": self.random_resized_crop is not None and not _is_range(self.random_resized_crop, 1.0),
            "crop_ratio": not _is_range(self.crop_ratio, float("inf")),
            "crop_padding": self.crop_padding < 0,
            "cutout": self.cutout < 0,
            "color_jitter": self.color_jitter < 0,
            "random_erasing": not 0 <= self.random_erasing <= 1,
            "std": self.std is not None and not all(value > 0 for value in self.std),
            "mean": self.mean is not None and self.std is not None and len(self.mean) != len(self.std),
            "resize": self.resize is not None and self.image_size is not None and self.resize < self.image_size,
            "crop_pct": not 0 < self.crop_pct <= 1,
        }
        for name in (name for name, is_wrong in wrong.items() if is_wrong):
            raise ConfigError(f"augmentation {name}={getattr(self, name)!r} is not possible; {_possible(name)}")
        if needs_size and self.image_size is None:
            raise ConfigError(f"augmentation {needs_size[0]} needs an image_size, as image_size=224")

    def for_source(self, source: DataSource) -> Augmentation:
        """The same with the mean and std of the data source where none are set."""
        return replace(self, mean=self.mean or source.mean, std=self.std or source.std)

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std.

        Raises:
            ConfigError: They are not set.
        """
        if self.mean is None or self.std is None:
            raise ConfigError("the augmentation has no mean and std: set both, or take the data's with for_source(source)")
        return self.mean, self.std

    def is_batched(self, dataset: ImageDataset, *, train: bool) -> bool:
        """Whether all of it can be done to a batch of stored images at once, as `ResidentLoader` does."""
        size = dataset.input_size
        if size is None or (self.image_size is not None and size[1:] != (self.image_size, self.image_size)):
            return False
        if not train:
            return self._shorter_side() == self.image_size
        per_image = (self.random_resized_crop, self.rand_augment, self.color_jitter, self.random_erasing)
        return not any(per_image)

    def _shorter_side(self) -> int | None:
        """To which images are resized in evaluation."""
        if self.image_size is None:
            return None
        return self.resize or int(self.image_size / self.crop_pct)


def _is_range(pair: tuple[float, float], highest: float) -> bool:
    return len(pair) == 2 and 0 < pair[0] <= pair[1] <= highest


def _possible(name: str) -> str:
    """What the values of a field can be."""
    return {
        "random_resized_crop": "give the least and greatest share of the area, as (0.08, 1.0)",
        "crop_ratio": "give the least and greatest ratio, as (0.75, 1.33)",
        "random_erasing": "give a probability in [0, 1]",
        "std": "give numbers above 0, one per channel",
        "mean": "give as many numbers as for std, one per channel",
        "resize": "give at least image_size",
        "crop_pct": "give a share in (0, 1], as 0.875",
    }.get(name, "give 0 or more" if name != "image_size" else "give pixels, as 224")


def train_transform(augmentation: Augmentation) -> Transform:
    """PIL image -> float tensor (C, H, W), by chance.

    Raises:
        ConfigError: Mean and std are not set, or a rand_augment that timm does not know.
    """
    from torchvision import transforms

    mean, std = augmentation.normalisation()
    steps: list[Any] = [*_resizing(augmentation)]
    if augmentation.crop_padding:
        steps.append(PaddedCrop(augmentation.crop_padding))
    if augmentation.flip:
        steps.append(transforms.RandomHorizontalFlip())
    if augmentation.color_jitter:
        steps.append(transforms.ColorJitter(*(augmentation.color_jitter,) * 3))
    if augmentation.rand_augment:
        steps.append(_rand_augment(augmentation, mean))
    steps += [transforms.ToTensor(), transforms.Normalize(mean, std)]
    if augmentation.cutout:
        steps.append(Cutout(augmentation.cutout))
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
    """What brings training images to image_size."""
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
            raise ValueError("rand, then sections of letters and a number")
        transform: Any = rand_augment_transform(text, hints)
    except (AssertionError, KeyError, ValueError) as error:
        raise ConfigError(f"timm knows no rand_augment {text!r} ({error}). Write it as 'rand-m9-mstd0.5-inc1'") from None
    for operation in transform.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return transform


def posterize(image: Image, bits: int, **_: object) -> Image:
    """Keep the upper bits of each pixel; timm asks for none at the highest magnitude, which new pillow refuses."""
    from PIL import ImageOps

    return ImageOps.posterize(image, bits) if bits > 0 else image.point(lambda _: 0)


class PaddedCrop:
    """A random crop of an image's own size out of the image with a black border.

    Args:
        padding: Pixels of the border, on each side.
    """

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, image: Image) -> Image:
        from torchvision.transforms import RandomCrop

        cropped: Image = RandomCrop((image.height, image.width), self.padding)(image)
        return cropped


class Cutout:
    """One square set to 0, its centre anywhere in the image, so that it may reach beyond the border.

    Args:
        length: Side of the square.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        row, column = int(torch.randint(height, ())), int(torch.randint(width, ()))
        half = self.length // 2
        image[..., max(0, row - half) : row + half, max(0, column - half) : column + half] = 0
        return image


def seed_random_state(*key: int) -> None:
    """Make the random numbers of Python, numpy and torch (on the CPU) depend on ``key`` only."""
    seeds = np.random.SeedSequence(key).generate_state(3).tolist()
    random.seed(seeds[0])
    np.random.seed(seeds[1])
    torch.default_generator.manual_seed(seeds[2])  # torch.manual_seed would change the accelerators' states, too


@contextmanager
def random_state_kept() -> Iterator[None]:
    """The random states of Python, numpy and torch (on the CPU) are as before afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def generator(*key: int) -> torch.Generator:
    """Random numbers that depend on ``key`` only."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]) >> 1)
