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
    empty: dict[int, Any] = {id(tensor): _like(tensor, tensor.detach().to("meta")) for tensor in first_names(model).values()}
    return copy.deepcopy(model, empty)


def fill(model: nn.Module, stored: dict[str, Tensor]) -> None:
    """Give a network of shapes its tensors, by first names; ``stored`` is used up, so that nothing is held twice.

    Tensors are copied: results depend on how they are aligned, in the last bit.
    """
    _set_dtype(model, stored)
    hollow = first_names(model)
    full: dict[int, Any] = {
        id(old): _like(old, stored.pop(name).clone(memory_format=torch.contiguous_format)) for name, old in hollow.items()
    }
    for module in model.modules():
        for slots in (module._parameters, module._buffers):
            slots.update({name: full[id(old)] for name, old in slots.items() if id(old) in full})
        if isinstance(module, Tied) and any(tensor.is_meta for tensor in module.buffers(recurse=False)):
            module._apply(_on_cpu, recurse=False)  # our layers compute again what no state dict has


def _like(old: Tensor, values: Tensor) -> Tensor:
    """The values as what the other tensor is: a parameter or a buffer."""
    return nn.Parameter(values, old.requires_grad) if isinstance(old, nn.Parameter) else values


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
