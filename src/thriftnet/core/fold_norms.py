"""Batch norms folded into the convolutions before them, and activations that overwrite their input.

Both compute the same in eval mode, with one layer or one tensor fewer. Which layers follow each other is seen by running a
copy on the meta device.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from thriftnet.core.conv import plain_conv2d
from thriftnet.core.norm import scale_and_shift
from thriftnet.core.probe import IgnoreOuterModes, on_meta
from thriftnet.core.sites import replace


class _Uses(IgnoreOuterModes):
    """Counts how often each tensor is read by something that makes a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[int] = Counter()
        self.kept: list[Tensor] = []  # so that no id is used twice

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            for leaf in tree_leaves((args, kwargs or {})):
                if isinstance(leaf, Tensor):
                    self.counts[id(leaf)] += 1
                    self.kept.append(leaf)
        return out


ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish)


@torch.no_grad()
def fold_norms(model: nn.Module, run: Callable[[nn.Module], object]) -> nn.Module:
    """Fold every batch norm of ``model``, changed in place, that alone reads the output of a convolution that runs once.

    The network is one of plain layers, in eval mode; ``run`` runs a copy of it on the meta device once.
    """
    table: dict[int, nn.Module] = {}
    readers, ran = sole_readers(model, run, (nn.BatchNorm2d,))
    for name, makers in readers.items():
        norm, conv = model.get_submodule(name), model.get_submodule(makers[0])
        if len(makers) > 1 or ran[makers[0]] > 1 or type(conv) is not nn.Conv2d or type(norm) is not nn.BatchNorm2d:
            continue
        if norm.running_mean is not None:
            scale, shift = scale_and_shift(norm)
            weight = conv.weight.detach() * scale[:, None, None, None]
            bias = shift if conv.bias is None else conv.bias.detach() * scale + shift
            table |= {id(conv): plain_conv2d(conv, weight, bias, conv.groups), id(norm): nn.Identity()}
    return replace(model, table)


def make_inplace(model: nn.Module, run: Callable[[nn.Module], object]) -> None:
    """Let activations of ``model``, which needs no gradients, overwrite outputs of convolutions and norms that they alone read."""
    for name in sole_readers(model, run, ACTIVATIONS)[0]:
        setattr(model.get_submodule(name), "inplace", True)  # noqa: B010  # a Module's attributes have no known type


def sole_readers(
    model: nn.Module, run: Callable[[nn.Module], object], kinds: tuple[type[nn.Module], ...]
) -> tuple[dict[str, list[str]], Counter[str]]:
    """Layers of these kinds that read nothing but outputs of convolutions and norms which nothing else reads.

    Returns:
        The name of each, with the layer whose output it read in each of its calls; and how often each convolution and norm ran.
    """
    ghost = on_meta(model)
    made_by: dict[int, str] = {}
    reads: dict[str, list[int]] = {}

    def layer_ran(name: str, output: Tensor) -> None:
        made_by[id(output)] = name
        uses.kept.append(output)

    for name, module in ghost.named_modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(lambda _, args, name=name: reads.setdefault(name, []).append(id(args[0])))
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d):
            module.register_forward_hook(lambda _, args, output, name=name: layer_ran(name, output))
    with torch.no_grad(), _Uses() as uses:
        run(ghost)
    found = {
        name: [made_by[each] for each in given]
        for name, given in reads.items()
        if all(each in made_by and uses.counts[each] == 1 for each in given)
    }
    return found, Counter(made_by.values())
