"""Networks that hold shapes only, and their filling with stored tensors.

To load, the network is built and converted on the meta device: that allocates nothing, draws nothing and fits nothing, and
tells which tensors of which shapes it takes before one byte of them is given to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from thriftnet.core.tied import Tied, first_names

Slots = dict[str, Tensor | None]

KEPT = {
    "requires_grad_",
    "detach_",
    "resize_",
    "set_",
    "unsqueeze_",
    "squeeze_",
    "transpose_",
    "t_",
}  # change more than values
INITIALISERS = {getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}


class _Unfilled(TorchFunctionMode):
    """Leaves out what changes a tensor without values in place: torch would import its compiler to do nothing."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in INITIALISERS:
            return args[0] if args else (kwargs or {})["tensor"]
        name = getattr(func, "__name__", "")
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and name not in KEPT)
        if in_place and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


@contextmanager
def shapes_only() -> Iterator[None]:
    """Networks built in here have shapes and no values, and the random state stays as it is."""
    with torch.device("meta"), _Unfilled(), torch.no_grad():
        yield


def emptied(model: nn.Module) -> nn.Module:
    """A copy of a network that holds shapes only, but for buffers that no state dict has: they are copied."""
    empty: dict[int, Any] = {}
    for module in model.modules():
        for slots in _slots(module):
            for tensor in slots.values():
                if tensor is not None:
                    hollow = tensor.detach().to("meta")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    empty[id(tensor)] = nn.Parameter(hollow, tensor.requires_grad) if is_parameter else hollow
    return copy.deepcopy(model, empty)


def fill(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Give a network of shapes its tensors, by first names; ``stored`` is used up, so that nothing is held twice.

    Tensors are copied: results depend on how they are aligned, in the last bit.
    """
    _set_dtype(model, stored)
    table: dict[int, Tensor] = {}
    for name, old in first_names(model).items():
        new = stored.pop(name).clone(memory_format=torch.contiguous_format)
        table[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
    for module in model.modules():
        for slots in _slots(module):
            slots.update({name: table[id(old)] for name, old in slots.items() if old is not None})
            _write_back(module, slots)
        if isinstance(module, Tied) and any(tensor.is_meta for tensor in module.buffers(recurse=False)):
            module.to_empty(device="cpu", recurse=False)  # our layers compute again what no state dict has


def unfilled(model: nn.Module) -> list[str]:
    """Buffers that no state dict has and that still have no values."""
    return [name for name, tensor in model.named_buffers() if tensor.is_meta]


def fill_rest(model: nn.Module, source: nn.Module) -> None:
    """Take the `unfilled` buffers from a network that was built with values."""
    for name in unfilled(model):
        module, _, leaf = name.rpartition(".")
        model.get_submodule(module)._buffers[leaf] = source.get_buffer(name)


def _set_dtype(model: nn.Module, stored: Mapping[str, Tensor]) -> None:
    """Where all stored numbers are of one type, what our layers compute is of that type, too."""
    dtypes = {tensor.dtype for tensor in stored.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        for module in model.modules():
            if isinstance(module, Tied):
                module._apply(lambda t: t.to(next(iter(dtypes))) if t.is_floating_point() else t, recurse=False)


def _slots(module: nn.Module) -> Iterator[Slots]:
    """Parameters and those buffers that belong into a state dict, as dicts of the names they have in the module."""
    yield dict(module._parameters)
    yield {name: tensor for name, tensor in module._buffers.items() if name not in module._non_persistent_buffers_set}


def _write_back(module: nn.Module, slots: Slots) -> None:
    for name, tensor in slots.items():
        (module._parameters if name in module._parameters else module._buffers)[name] = tensor  # type: ignore[assignment]
