"""Networks that hold shapes only, and their filling with stored tensors.

To load, the network is built and converted on the meta device: that allocates nothing, draws nothing and fits nothing, and
tells which tensors of which shapes it takes before one byte of them is given to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from thriftnet.core.tied import Tied, first_names

Slots = dict[str, Tensor | None]

INITIALISERS = {getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
CHANGE_SHAPE = ("requires_grad_", "detach_", "resize_", "set_", "unsqueeze_", "squeeze_", "transpose_", "t_")
ELEMENTWISE = ("add", "sub", "mul", "div", "sqrt", "rsqrt")


class _ShapesOnly(TorchFunctionMode):
    """Skips in-place operations and computes the shapes of simple ones, for which torch would import its compiler or SymPy."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        name = getattr(func, "__name__", "")
        values = args[0] if name in ("stack", "cat") and args else args
        tensors = [value for value in values if isinstance(value, Tensor)]
        if not (tensors and all(tensor.is_meta for tensor in tensors)):
            return func(*args, **kwargs)
        if name == "__setitem__" or (name.endswith("_") and not name.endswith("__") and name not in CHANGE_SHAPE):
            return tensors[0]
        shape = _shape(name, args, kwargs, [tensor.shape for tensor in tensors])
        return func(*args, **kwargs) if shape is None else tensors[0].new_empty(shape, device=kwargs.get("device"))


def _shape(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: list[torch.Size]) -> Sequence[int] | None:
    """The shape of an operation's result, None where torch is to say it."""
    first, *others = shapes
    match name, args[1:], kwargs:
        case "empty_like", (), _:
            return first
        case "stack", (), {**rest} if not rest:
            return (len(shapes), *first)
        case "cat", (), {**rest} if not rest:
            return (sum(shape[0] for shape in shapes), *first[1:])
        case "mean", (0,), _:
            return first[1:]
        case ("tensordot", _, {"dims": 1}) | ("matmul", _, _) if name == "tensordot" or len(others[0]) <= 2:
            return (*first[:-1], *others[0][1:])
        case "einsum", _, _:
            inputs, _, output = args[0].partition("->")
            sizes = dict(zip(inputs.replace(",", ""), (side for shape in shapes for side in shape), strict=True))
            return [sizes[label] for label in output]
    return np.broadcast_shapes(*shapes) if name in ELEMENTWISE else None


@contextmanager
def shapes_only() -> Iterator[None]:
    """Networks built in here have shapes and no values, and the random state stays as it is."""
    with torch.device("meta"), _ShapesOnly(), torch.no_grad():
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
            module._apply(_on_cpu, recurse=False)  # our layers compute again what no state dict has


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.new_empty(tensor.shape, device="cpu") if tensor.is_meta else tensor


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
