"""Running a network on the meta device: shapes only, no computation."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from thriftnet.core.provenance import input_size_of, stated_input_size
from thriftnet.core.sites import ends
from thriftnet.errors import ConfigError, IncompatibleModelError, first_line

SIDES = (32, 224, 64, 28, 96, 8)  # image sizes to try for networks without a stated input size

Size: TypeAlias = tuple[int, int, int]  # channels, height and width of an image


class Call(NamedTuple):
    """One forward of a module."""

    name: str  # the first in the network
    inputs: tuple[Any, ...]  # by position, on the meta device
    output: Any  # on the meta device


class IgnoreOuterModes(TorchFunctionMode):
    """Hides calls from enclosing TorchFunctionModes, such as those that build networks on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return func(*args, **(kwargs or {}))


def on_meta(model: nn.Module, others: Iterable[Tensor] = (), memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of ``model`` in eval mode on the meta device, without hooks.

    Args:
        model: The network.
        others: Tensors that it may hold elsewhere than in its modules.
        memo: Receives each tensor's copy by the id of the tensor.
    """
    memo = {} if memo is None else memo
    kept = [leaf for module in model.modules() for leaf in tree_leaves(dict(vars(module))) if isinstance(leaf, Tensor)]
    for tensor in (*kept, *others):  # parameters, buffers, and what a network remembers beside them
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    ghost = copy.deepcopy(model, memo).eval()
    for module in ghost.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return ghost


def run(ghost: nn.Module, size: Size) -> None:
    """Run a network on the meta device on two images of this size, of its own type."""
    ghost(images(ghost, size))


def images(model: nn.Module, size: Size) -> Tensor:
    """Two images of this size and the network's own type, on the meta device."""
    dtype = next((t.dtype for t in model.parameters() if t.is_floating_point()), torch.float32)
    return torch.empty(2, *size, device="meta", dtype=dtype)


@torch.no_grad()
def failure(ghost: nn.Module, size: Size) -> Exception | None:
    """The error of a network on the meta device on images of this size; None if it runs."""
    try:
        with IgnoreOuterModes():
            run(ghost, size)
    except Exception as error:  # a network's own code may raise anything
        return error
    return None


def input_size(model: nn.Module, given: Sequence[int] | None = None) -> Size:
    """An image size that ``model`` runs on: as given, as the network states, or found by trying.

    Raises:
        ConfigError: It does not run on the given size.
        IncompatibleModelError: It runs on none of the sizes tried.
    """
    ghost = on_meta(model)
    tried: list[Exception] = []
    for size in sizes_to_try(model, given):
        error = failure(ghost, size)
        if error is None:
            return size
        tried.append(error)
    if given is not None:
        raise ConfigError(f"{type(model).__name__} does not run on input_size={size}: {first_line(tried[0])}")
    raise IncompatibleModelError(
        f"{type(model).__name__} runs on none of the image sizes tried: {first_line(tried[0])}. "
        "Give the size it was made for: input_size=(C, H, W)"
    )


@torch.no_grad()
def calls(model: nn.Module, run: Callable[[nn.Module], object]) -> list[Call]:
    """Every forward of every module, in the order in which they end, while ``run`` runs a copy on the meta device once."""
    ghost = on_meta(model)
    done: list[Call] = []
    for name, module in ghost.named_modules():
        module.register_forward_hook(lambda _, args, output, name=name: done.append(Call(name, args, output)))
    with IgnoreOuterModes():
        run(ghost)
    return done


def image_calls(model: nn.Module, size: Size) -> list[Call]:
    """`calls` on images of this size."""
    try:
        return calls(model, partial(run, size=size))
    except Exception as error:  # a network's own code may raise anything
        raise IncompatibleModelError(
            f"{type(model).__name__} does not run on input_size={size}: {first_line(error)}"
        ) from None


def sizes_to_try(model: nn.Module, given: Sequence[int] | None = None) -> list[Size]:
    """Image sizes that a network may run on: as given, as the network states, or what is usual."""
    if given is not None:
        return [input_size_of(model, given)]
    if (stated := stated_input_size(model)) is not None:
        return [stated]
    stem = ends(model)[0]
    channels = int(getattr(stem, "in_channels", 3))
    return [(channels, side, side) for side in SIDES]
