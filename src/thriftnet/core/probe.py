"""Running a network without computing anything: on the meta device, where tensors have shapes and no values."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from thriftnet.core.sites import ends
from thriftnet.errors import ConfigError, IncompatibleModelError

SIDES = (32, 224, 64, 28, 96, 8)  # heights and widths that networks without a stated input size are tried with

Size = Sequence[int]


@dataclass(frozen=True)
class Call:
    """A module that ran.

    Args:
        name: Its first name in the network.
        output: What it gave, on the meta device.
    """

    name: str
    output: Any


class IgnoreOuterModes(TorchFunctionMode):
    """What runs in here is not seen by modes that the caller runs in, such as those that build networks without values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            return func(*args, **(kwargs or {}))


def on_meta(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in eval mode whose tensors have no memory; hooks are left out."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    ghost = copy.deepcopy(model, memo).eval()
    for module in ghost.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return ghost


def images(size: Size, batch: int = 2) -> Tensor:
    """A batch of images without values."""
    return torch.empty(batch, *size, device="meta")


@torch.no_grad()
def failure(ghost: nn.Module, size: Size) -> Exception | None:
    """Why a network on the meta device does not run on images of this size; None where it does."""
    dtype = next((t.dtype for t in ghost.parameters() if t.is_floating_point()), torch.float32)
    try:
        with IgnoreOuterModes():
            ghost(images(size).to(dtype))
    except Exception as error:  # what a network's own code may raise is not known
        return error
    return None


def input_size(model: nn.Module, given: Size | None = None) -> tuple[int, int, int]:
    """Channels, height and width of images that ``model`` runs on: as given, as it says itself, or found by trying.

    Raises:
        ConfigError: It does not run on what was given.
        IncompatibleModelError: It runs on nothing that was tried.
    """
    ghost = on_meta(model)
    if given is not None:
        error = failure(ghost, tuple(given))
        if error is not None:
            raise ConfigError(f"{type(model).__name__} does not run on input_size={tuple(given)}: {_first_line(error)}")
        return _three(given)
    tried: list[Exception] = []
    for size in _candidates(model):
        error = failure(ghost, size)
        if error is None:
            return size
        tried.append(error)
    raise IncompatibleModelError(
        f"{type(model).__name__} runs on no images that were tried: {_first_line(tried[0])}. "
        "Give the size it is made for: input_size=(C, H, W)"
    )


def calls(model: nn.Module, size: Size) -> list[Call]:
    """Every module that runs, in the order in which they end, as often as they run."""
    ghost = on_meta(model)
    done: list[Call] = []
    for name, module in ghost.named_modules():
        module.register_forward_hook(lambda _, args, output, name=name: done.append(Call(name, output)))
    error = failure(ghost, size)
    if error is not None:
        raise IncompatibleModelError(
            f"{type(model).__name__} does not run on input_size={tuple(size)}: {_first_line(error)}"
        )
    return done


def _candidates(model: nn.Module) -> list[tuple[int, int, int]]:
    stated = getattr(model, "default_cfg", None)
    if isinstance(stated, dict) and "input_size" in stated:
        return [_three(stated["input_size"])]
    stem = ends(model)[0]
    channels = int(getattr(stem, "in_channels", 3))
    return [(channels, side, side) for side in SIDES]


def _three(size: Size) -> tuple[int, int, int]:
    channels, height, width = size
    return int(channels), int(height), int(width)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
