"""Learning rates over the training: each schedule is a function from epochs passed to a factor on the learning rate."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from typing import TYPE_CHECKING

from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LambdaLR

    from thriftnet.train.recipe import Recipe


def make_schedule(optimizer: Optimizer, recipe: Recipe, steps_per_epoch: int, epochs: float) -> LambdaLR:
    """torch's scheduler, to be stepped after each optimizer step.

    Args:
        optimizer: Its learning rates are those at factor 1.
        recipe: Names the schedule.
        steps_per_epoch: Optimizer steps.
        epochs: Length of the training.

    Raises:
        ConfigError: A cool-down longer than the training.
    """
    from torch.optim.lr_scheduler import LambdaLR

    shape = SHAPES[recipe.schedule](recipe, epochs)

    def factor(step: int) -> float:
        return shape(float(step // steps_per_epoch) if recipe.schedule_per == "epoch" else step / steps_per_epoch)

    return LambdaLR(optimizer, factor)


def _constant(recipe: Recipe, epochs: float) -> Callable[[float], float]:
    return lambda epoch: 1.0


def _multistep(recipe: Recipe, epochs: float) -> Callable[[float], float]:
    """Factors multiply from their epochs on."""
    return lambda epoch: math.prod(factor for start, factor in recipe.milestones.items() if epoch >= start)


def _piecewise(recipe: Recipe, epochs: float) -> Callable[[float], float]:
    """Straight lines between points; constant after the last.

    Source: the "onecycle" of SPIN's recipes (PySlowFast).
    """
    points = sorted(recipe.points.items())
    places = [place for place, _ in points]

    def shape(epoch: float) -> float:
        after = bisect_right(places, epoch)
        if after in (0, len(points)):
            return points[max(after - 1, 0)][1]
        (x0, y0), (x1, y1) = points[after - 1], points[after]
        return y0 + (y1 - y0) * (epoch - x0) / (x1 - x0)

    return shape


def _cosine(recipe: Recipe, epochs: float) -> Callable[[float], float]:
    """Half a cosine from 1 to ``min_lr``; the warm-up replaces its beginning, the cool-down comes after its end.

    A training of a few steps, shorter than the warm-up, is all warm-up.

    Source: Loshchilov & Hutter, SGDR, ICLR 2017; the form of timm's `CosineLRScheduler`.
    """
    low, start = recipe.min_lr / recipe.lr, recipe.warmup_lr / recipe.lr
    length = epochs - recipe.cooldown_epochs
    if length <= 0:
        raise ConfigError(
            f"cooldown_epochs={recipe.cooldown_epochs:g} leaves nothing of {epochs:g} epochs: give more epochs, or a shorter one"
        )

    def shape(epoch: float) -> float:
        if epoch < recipe.warmup_epochs:
            return start + (1.0 - start) * epoch / recipe.warmup_epochs
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * min(epoch / length, 1.0)))

    return shape


SHAPES: dict[str, Callable[[Recipe, float], Callable[[float], float]]] = {
    "constant": _constant,
    "multistep": _multistep,
    "piecewise": _piecewise,
    "cosine": _cosine,
}
