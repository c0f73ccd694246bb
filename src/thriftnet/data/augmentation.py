"""The fields of augmentation and preprocessing. This file loads no torch, since recipes hold them.

Annotations are evaluated: for postponed ones jsonargparse would run the imports below, which load torch.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from thriftnet.arguments import Deviations, Jitter, Means, Padding, PositiveShare, PositiveWeight, Share, Side, checked
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from thriftnet.data.dataset import DataSource, ImageDataset

RAND_AUGMENT = re.compile(r"rand(-([a-z]+[0-9.]+|t[a-z]+))*")  # timm silently ignores other sections
Interpolation = Literal["nearest", "bilinear", "bicubic"]


@checked
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

    image_size: Side | None = None
    random_resized_crop: tuple[PositiveShare, PositiveShare] | None = None
    crop_ratio: tuple[PositiveWeight, PositiveWeight] = (3 / 4, 4 / 3)
    interpolation: Literal["nearest", "bilinear", "bicubic", "random"] = "bilinear"
    crop_padding: Padding = 0
    flip: bool = False
    color_jitter: Jitter = 0.0
    rand_augment: str | None = None
    mean: Means | None = None
    std: Deviations | None = None
    cutout: Padding = 0
    random_erasing: Share = 0.0
    resize: Side | None = None
    crop_pct: PositiveShare = 1.0
    eval_interpolation: Interpolation = "bilinear"

    def __post_init__(self) -> None:
        for name, holds, expected in self._conditions():
            if not holds:
                raise ConfigError(f"augmentation {name}={getattr(self, name)!r}: expected {expected}")
        for name in ("random_resized_crop", "resize"):
            if getattr(self, name) is not None and self.image_size is None:
                raise ConfigError(f"augmentation {name} needs an image_size, as image_size=224")

    def _conditions(self) -> Iterator[tuple[str, bool, str]]:
        """Field, whether its value fits the other fields, and the expected value."""
        crop, mean, std = self.random_resized_crop, self.mean, self.std
        yield "random_resized_crop", crop is None or crop[0] <= crop[1], "a range in (0, 1], as (0.08, 1.0)"
        yield "crop_ratio", self.crop_ratio[0] <= self.crop_ratio[1], "a range of ratios, as (0.75, 1.33)"
        yield "mean", None in (mean, std) or len(mean or ()) == len(std or ()), "as many numbers as for std, one per channel"
        yield "resize", (self.resize or self.image_size or 0) >= (self.image_size or 0), "a number >= image_size"

    def for_source(self, source: "DataSource") -> "Augmentation":
        """A copy with the mean and std of the data source where none are set."""
        return replace(self, mean=self.mean or source.mean, std=self.std or source.std)

    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std; a `ConfigError` if they are not set."""
        if self.mean is None or self.std is None:
            raise ConfigError("the augmentation has no mean and std: set both, or take the data's with for_source(source)")
        return self.mean, self.std

    def facts(self) -> dict[str, Any]:
        """What a network has to know of it, as fields of `thriftnet.core.provenance.DataFacts`."""
        mean, std = self.normalisation()
        facts: dict[str, Any] = {name: getattr(self, name) for name in ("resize", "crop_pct", "eval_interpolation")}
        size = {} if self.image_size is None else {"input_size": (len(mean), self.image_size, self.image_size)}
        return {**facts, **size, "normalisation": {"mean": mean, "std": std}}

    def is_batched(self, dataset: "ImageDataset", *, train: bool) -> bool:
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
