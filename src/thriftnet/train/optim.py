"""Optimizers from recipes, and which parameters get no weight decay."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from thriftnet.core.penalty import param_groups
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from thriftnet.train.recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """torch's SGD or AdamW, or one of timm's by name, over the trainable parameters.

    Raises:
        ConfigError: No optimizer of that name, or nothing to train.
    """
    groups = decay_groups(model, recipe.weight_decay, recipe.no_decay)
    if not groups:
        raise ConfigError("there is nothing to train: no parameter of the network requires a gradient")
    if recipe.optimizer == "sgd":
        nesterov = recipe.nesterov and recipe.momentum > 0
        return torch.optim.SGD(groups, recipe.lr, momentum=recipe.momentum, nesterov=nesterov)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, recipe.lr)
    from timm import optim

    timm_names = [str(name) for name in optim.list_optimizers()]  # type: ignore[attr-defined]
    if recipe.optimizer not in timm_names:
        raise ConfigError(f"optimizer={recipe.optimizer!r}: possible are sgd, adamw, and timm's: {', '.join(timm_names)}")
    made: torch.optim.Optimizer = optim.create_optimizer_v2(  # type: ignore[attr-defined]
        groups, opt=recipe.optimizer, lr=recipe.lr, momentum=recipe.momentum
    )
    return made


def decay_groups(model: nn.Module, weight_decay: float, no_decay: tuple[str, ...]) -> list[dict[str, Any]]:
    """Parameter groups: ``no_decay`` names who is spared, see `Recipe`; each parameter once, frozen ones not at all."""
    spared = {id(p) for p in _spared(model, no_decay)}
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in parameters if id(p) not in spared], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _spared(model: nn.Module, no_decay: tuple[str, ...]) -> list[nn.Parameter]:
    spared: list[nn.Parameter] = []
    if "technique" in no_decay:
        spared += [p for group in param_groups(model, 1.0) if not group["weight_decay"] for p in group["params"]]
    if "norm" in no_decay:
        norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
        spared += [p for module in model.modules() if isinstance(module, norms) for p in module.parameters(recurse=False)]
    if "bias" in no_decay:
        spared += [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    return spared
