"""Networks that hold shapes only, and their filling with stored tensors.

To load, the network is built and converted on the meta device: that allocates nothing, draws nothing and fits nothing, and
tells which tensors of which shapes it takes before one byte of them is given to it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from thriftnet.core.tied import Tied, first_names

Slots = dict[str, Tensor | None]

# In place, so that the shape stays.
DRAWN = {
    getattr(Tensor, name) for name in ("normal_", "uniform_", "fill_", "zero_", "copy_", "erfinv_", "clamp_", "mul_", "add_")
}
INITIALISERS = {getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
ELEMENTWISE = {
    getattr(Tensor, name) for name in ("add", "sub", "mul", "div", "sqrt", "rsqrt", "square", "neg", "abs", "sign", "flip")
}


def _broadcast(shapes: Sequence[torch.Size]) -> list[int]:
    sizes = zip_longest(*(reversed(shape) for shape in shapes), fillvalue=1)
    return [max(size) if min(size) else 0 for size in sizes][::-1]


def _svd(a: Tensor, full_matrices: bool = True) -> Any:
    rows, columns, rank = a.shape[-2], a.shape[-1], min(a.shape[-2:])
    left, right = (rows, columns) if full_matrices else (rank, rank)
    shapes = ((rows, left), (rank,), (right, columns))
    return torch.return_types.linalg_svd([a.new_empty(*a.shape[:-2], *shape) for shape in shapes])  # type: ignore[attr-defined]


def _qr(a: Tensor, mode: str = "reduced") -> Any:
    rows, columns = a.shape[-2:]
    rank = rows if mode == "complete" else min(rows, columns)
    shapes = ((rows, rank), (rank, columns))
    return torch.return_types.linalg_qr([a.new_empty(*a.shape[:-2], *shape) for shape in shapes])  # type: ignore[attr-defined]


def _eigh(a: Tensor, *_: Any) -> Any:
    return torch.return_types.linalg_eigh([a.new_empty(a.shape[:-1]), a.new_empty(a.shape)])  # type: ignore[attr-defined]


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty(len(tensors), *tensors[0].shape)


def _cat(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].new_empty(sum(len(tensor) for tensor in tensors), *tensors[0].shape[1:])


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    batch = _broadcast([a.shape[:-2], b.shape[:-2]])
    return a.new_empty(*batch, *(a.shape[-2:-1] if a.ndim > 1 else ()), *(b.shape[-1:] if b.ndim > 1 else ()))


def _mean(tensor: Tensor, dim: int) -> Tensor:
    return tensor.new_empty(tensor.shape[:dim] + tensor.shape[dim + 1 :] if dim >= 0 else tensor.mean(dim).shape)


FITTED: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.linalg.svd: _svd,
    torch.linalg.qr: _qr,
    torch.linalg.eigh: _eigh,
    torch.linalg.pinv: lambda a: a.new_empty(a.mT.shape),
    torch.stack: _stack,
    torch.cat: _cat,
    torch.empty_like: lambda a, device: a.new_empty(a.shape, device=device),
    Tensor.matmul: _matmul,
    Tensor.mean: _mean,
    Tensor.__setitem__: lambda *_: None,
}


class _Undrawn(TorchFunctionMode):
    """Gives the shapes of what building and fitting compute. For what is not listed torch finds them, at first use by
    importing its compiler, which takes a second."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in INITIALISERS:
            return args[0] if args else (kwargs or {})["tensor"]
        first = args[0][0] if args and isinstance(args[0], list | tuple) and args[0] else args[0] if args else None
        if not isinstance(first, Tensor) or not first.is_meta:
            return func(*args, **(kwargs or {}))
        if func in DRAWN:
            return first
        if func in ELEMENTWISE and not kwargs:
            return first.new_empty(_broadcast([arg.shape for arg in args if isinstance(arg, Tensor)]))
        if func in FITTED and _takes(FITTED[func], args, kwargs or {}):
            return FITTED[func](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _takes(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


@contextmanager
def shapes_only() -> Iterator[None]:
    """What is built in here holds shapes and no values, and the random state stays as it is."""
    with torch.device("meta"), _Undrawn(), torch.no_grad():
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
            module.to_empty(device="cpu", recurse=False)  # our layers compute anew what no state dict has


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
