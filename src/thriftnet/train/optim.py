"""Optimizers, learning rates over the training, and the average of the weights, from recipes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from thriftnet.core.penalty import param_groups
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from thriftnet.train.recipe import OptimizerFields, Recipe

Shape = Callable[[float], float]  # epochs passed -> factor on the learning rate


def make_optimizer(model: nn.Module, fields: OptimizerFields) -> torch.optim.Optimizer:
    """torch's SGD or AdamW, or one of timm's by name, over the trainable parameters."""
    groups = decay_groups(model, fields.weight_decay, fields.no_decay)
    if not groups:
        raise ConfigError("there is nothing to train: no parameter of the network requires a gradient")
    if fields.name == "sgd":
        nesterov = fields.nesterov and fields.momentum > 0
        return torch.optim.SGD(groups, fields.lr, momentum=fields.momentum, nesterov=nesterov)
    if fields.name == "adamw":
        return torch.optim.AdamW(groups, fields.lr)
    from timm import optim

    timm_names = [str(name) for name in optim.list_optimizers()]  # type: ignore[attr-defined]
    if fields.name not in timm_names:
        raise ConfigError(f"optimizer={fields.name!r}: expected sgd, adamw, or one of timm's: {', '.join(timm_names)}")
    made: torch.optim.Optimizer = optim.create_optimizer_v2(  # type: ignore[attr-defined]
        groups, opt=fields.name, lr=fields.lr, momentum=fields.momentum
    )
    return made


def decay_groups(model: nn.Module, weight_decay: float, no_decay: Sequence[str]) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay; each parameter once, frozen ones not at all."""
    spared: list[nn.Parameter] = []
    if "technique" in no_decay:
        spared += [p for group in param_groups(model, 1.0) if not group["weight_decay"] for p in group["params"]]
    if "norm" in no_decay:
        norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
        spared += [p for module in model.modules() if isinstance(module, norms) for p in module.parameters(recurse=False)]
    if "bias" in no_decay:
        spared += [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    without = {id(p) for p in spared}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) not in without], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in without], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int, epochs: float) -> LambdaLR:
    """torch's scheduler over a number of epochs, to be stepped after each optimizer step."""
    return LambdaLR(optimizer, lr_factor(recipe, steps_per_epoch, epochs))


def lr_factor(recipe: Recipe, steps_per_epoch: float, epochs: float) -> Callable[[int], float]:
    """The factor on the learning rate by steps taken; the schedule's epochs need not be those of the data."""
    shape = SHAPES[recipe.schedule.name](recipe, epochs)

    def factor(step: int) -> float:
        return shape(float(step // steps_per_epoch) if recipe.schedule.per == "epoch" else step / steps_per_epoch)

    return factor


def _multistep(recipe: Recipe, epochs: float) -> Shape:
    """The product of the factors whose epochs have come."""
    milestones = recipe.schedule.milestones
    return lambda epoch: math.prod(factor for start, factor in milestones.items() if epoch >= start)


def _piecewise(recipe: Recipe, epochs: float) -> Shape:
    """Straight lines between points; constant before the first and after the last.

    Source: the "onecycle" of SPIN's recipes (PySlowFast).
    """
    epochs_of, factors = zip(*sorted(recipe.schedule.points.items()), strict=True)
    return lambda epoch: float(np.interp(epoch, epochs_of, factors))


def _cosine(recipe: Recipe, epochs: float) -> Shape:
    """Half a cosine from 1 to ``min_lr``; the warm-up replaces its beginning, the cool-down follows its end.

    A training shorter than the warm-up is all warm-up.

    Source: Loshchilov & Hutter, SGDR, ICLR 2017; as timm's `CosineLRScheduler`.
    """
    fields = recipe.schedule
    low, start = fields.min_lr / recipe.optimizer.lr, fields.warmup_lr / recipe.optimizer.lr
    length = epochs - fields.cooldown_epochs
    if length <= 0:
        raise ConfigError(
            f"cooldown_epochs={fields.cooldown_epochs:g} leaves nothing of {epochs:g} epochs: give more epochs, or a shorter one"
        )

    def shape(epoch: float) -> float:
        if epoch < fields.warmup_epochs:
            return start + (1.0 - start) * epoch / fields.warmup_epochs
        return low + (1.0 - low) * 0.5 * (1.0 + math.cos(math.pi * min(epoch / length, 1.0)))

    return shape


SHAPES: dict[str, Callable[[Recipe, float], Shape]] = {
    "constant": lambda recipe, epochs: lambda epoch: 1.0,
    "multistep": _multistep,
    "piecewise": _piecewise,
    "cosine": _cosine,
}


def average_of(model: nn.Module, decay: float, *, warmup: bool = False) -> AveragedModel | None:
    """An exponential average of a network over steps, with its running statistics; each tied tensor moves once."""
    if not decay:
        return None

    def update(average: Any, present: Any, count: Tensor | int) -> None:
        own = min(decay, (1 + int(count)) / (10 + int(count))) if warmup else decay
        get_ema_multi_avg_fn(own)(average, present, count)  # type: ignore[no-untyped-call]

    average = AveragedModel(model, multi_avg_fn=update, use_buffers=True)
    average.eval()
    return average
