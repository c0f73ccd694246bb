"""The training loop: one for every network, whatever was done to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.verbs import param_groups, penalty
from thriftnet.core.width import set_width, widths
from thriftnet.data.digits import Split
from thriftnet.errors import ConfigError, DataError


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        epochs: Passes over the training images.
        batch_size: Images per step.
        learning_rate: Peak of the one-cycle schedule, for SGD with Nesterov momentum 0.9.
        weight_decay: For what `param_groups` does not spare.
        label_smoothing: Share of the target spread over all classes.
        crop_padding: Pixels by which an image may move in either direction.
        seed: For order and augmentation.
    """

    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 0.1
    weight_decay: float = 5e-4
    label_smoothing: float = 0.0
    crop_padding: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or not self.learning_rate > 0 or self.crop_padding < 0:
            raise ConfigError(f"{self}: possible are epochs >= 1, batch_size >= 2, learning_rate > 0, crop_padding >= 0")


@dataclass
class Curve:
    """What happened in training, one entry per epoch."""

    loss: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)


def fit(
    model: nn.Module, train: Split, test: Split, settings: Settings, on_epoch: Callable[[Curve], None] | None = None
) -> Curve:
    """Train a network in place.

    A network of several widths is trained at all of them in every step, and tested at the widest. The techniques'
    penalty is added to the loss, once per step.

    Args:
        model: The network; in eval mode afterwards.
        train: Images to learn from.
        test: Images to report accuracy on; nothing is chosen by it.
        settings: How.
        on_epoch: Called after each epoch with the curve so far.

    Raises:
        DataError: Fewer training images than one batch.
    """
    if len(train) < settings.batch_size:
        raise DataError(
            f"{len(train)} training images are fewer than one batch of {settings.batch_size}: use a smaller batch"
        )
    random = torch.Generator().manual_seed(settings.seed)
    groups = param_groups(model, settings.weight_decay)
    optimizer = torch.optim.SGD(groups, settings.learning_rate, momentum=0.9, nesterov=True)
    steps = len(train) // settings.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=steps * settings.epochs)
    curve = Curve()
    for _ in range(settings.epochs):
        model.train()
        total = torch.zeros(())
        order = torch.randperm(len(train), generator=random)[: steps * settings.batch_size]
        for index in torch.split(order, settings.batch_size):
            images = random_crop(train.images[index], settings.crop_padding, random)
            optimizer.zero_grad()
            loss = step(model, images, train.labels[index], settings.label_smoothing)
            optimizer.step()
            schedule.step()
            total += loss
        curve.loss.append(float(total) / steps)
        curve.test_accuracy.append(accuracy(model, test))
        if on_epoch is not None:
            on_epoch(curve)
    return curve


def step(model: nn.Module, images: Tensor, labels: Tensor, label_smoothing: float) -> Tensor:
    """Add up the gradients of the loss at every width, and of the penalty; the mean loss over widths."""
    available = widths(model) or (None,)
    total = torch.zeros(())
    for width in available:
        if width is not None:
            set_width(model, width)
        loss = F.cross_entropy(model(images), labels, label_smoothing=label_smoothing) / len(available)
        loss.backward()  # type: ignore[no-untyped-call]
        total = total + loss.detach()
    extra = penalty(model, scaled=True)
    if extra.requires_grad:
        extra.backward()  # type: ignore[no-untyped-call]
    return total + extra.detach()


@torch.no_grad()
def accuracy(model: nn.Module, split: Split) -> float:
    """Share of images classified rightly, in [0, 1]; the network is in eval mode afterwards."""
    model.eval()
    batches = zip(torch.split(split.images, 512), torch.split(split.labels, 512), strict=True)
    right: list[int] = [int((model(x).argmax(1) == y).sum()) for x, y in batches]
    return sum(right) / len(split)


def random_crop(images: Tensor, padding: int, random: torch.Generator) -> Tensor:
    """Move each image by up to ``padding`` pixels in both directions, in one gather; the border is repeated."""
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4, mode="replicate") if padding else images
    rows = torch.randint(2 * padding + 1, (count, 1), generator=random) + torch.arange(height)
    columns = torch.randint(2 * padding + 1, (count, 1), generator=random) + torch.arange(width)
    picked = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.permute(0, 3, 1, 2).contiguous()
