"""The allow-list: what a checkpoint's pickle may have rebuilt, each from checked arguments by a function of our own.

Nothing of the file's choosing is imported or called. What is not named here becomes a `StandIn`.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from thriftnet.importing.inert import ENTRY_COST, TENSOR_COST, Budget, Name, StandIn, checked_key, damaged, unsupported

MAX_DIMENSIONS, MAX_EXTENT = 32, 1 << 40

DTYPES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}
STORAGES = {
    f"{module}.{kind}Storage": dtype for module in ("torch", "torch.cuda", "torch.storage") for kind, dtype in DTYPES.items()
} | {"torch.UntypedStorage": torch.uint8, "torch.storage.UntypedStorage": torch.uint8}
CONSTANTS: dict[str, Any] = {str(dtype): dtype for dtype in DTYPES.values()}

NUMBERS = re.compile(r"[<|=]?(\?|b1|[iu][1248]|f[248])")
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:\d{1,3})?")
LATIN = ("latin1", "latin-1", "iso-8859-1")
NOT_READ = ("torch._utils._rebuild_", "torch._tensor._rebuild_")  # sparse, quantized, nested, on other devices, subclasses


def call(callee: Any, args: Any, budget: Budget) -> Any:
    """What the file wants made: rebuilt if it is on the list, else a stand-in that keeps the arguments.

    Raises:
        CheckpointError: Arguments that do not fit, or a kind of tensor that is not read.
    """
    if not isinstance(callee, StandIn) or not isinstance(args, tuple):
        raise damaged(f"it calls a {type(callee).__name__} with a {type(args).__name__}")
    if not isinstance(callee, Name):
        return StandIn(f"a call of {callee.origin}"[:600], args)
    if callee.origin in REBUILDERS:
        return REBUILDERS[callee.origin](args, budget)
    if callee.origin.startswith(NOT_READ):
        raise unsupported(f"it holds a tensor made by {callee.origin}; dense tensors of common types are read only")
    return StandIn(callee.origin, args)


def restore(target: Any, state: Any, budget: Budget) -> None:
    """Give an object the state that the file has for it.

    Stand-ins keep it. Attributes that a file hangs on dicts and tensors (versions, hooks) are dropped: nothing reads them.

    Raises:
        CheckpointError: For anything else, or a state that does not fit.
    """
    if isinstance(target, StandIn):
        _restore_stand_in(target, state, budget)
    elif isinstance(target, np.ndarray):
        _restore_array(target, state, budget)
    elif isinstance(target, np.dtype):
        match state:
            case (_, str() as order, *_) if order in ("<", "|", "="):
                return
        raise unsupported("it holds numbers of numpy in big-endian order, or of a dtype that is not read")
    elif not isinstance(target, (dict, Tensor)):
        raise damaged(f"it sets the state of a {type(target).__name__}")


def _restore_stand_in(target: StandIn, state: Any, budget: Budget) -> None:
    parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
    if not all(part is None or isinstance(part, dict) for part in parts):
        target.state = state
        return
    for part in parts:
        if part and isinstance(target.state, dict):
            budget.charge(ENTRY_COST * 2 * (len(target.state) + len(part)))
            target.state = {**target.state, **part}
        elif part is not None:
            target.state = part


# -- torch


def rebuild_tensor(args: tuple[Any, ...], budget: Budget) -> Tensor:
    """A view of a storage, which is a flat tensor here, after a check that it stays inside."""
    budget.charge(TENSOR_COST)
    match args:
        case (Tensor() as storage, offset, tuple() as size, tuple() as stride, *_):
            _check_geometry(storage, offset, size, stride)
        case _:
            raise damaged("a tensor in it is described by something else than storage, offset, size and strides")
    try:
        return torch.as_strided(storage, size, stride, int(storage.storage_offset()) + offset)
    except RuntimeError as error:
        raise damaged(f"a tensor of shape {tuple(size)} cannot be made: {error}") from None


def _check_geometry(storage: Tensor, offset: Any, size: tuple[Any, ...], stride: tuple[Any, ...]) -> None:
    held = storage.numel()
    if storage.dim() != 1 or (held > 1 and storage.stride(0) != 1):
        raise damaged("a tensor in it is built on something that is no storage")
    if len(size) != len(stride) or len(size) > MAX_DIMENSIONS:
        raise damaged(f"a tensor in it has {len(size)} dimensions and {len(stride)} strides")
    if not all(type(n) is int and 0 <= n < MAX_EXTENT for n in (offset, *size, *stride)):
        raise damaged("a tensor in it has an offset, size or stride that is negative, huge or no integer")
    count = prod(size)
    if prod(max(n, 1) for n in size) >= MAX_EXTENT:
        raise damaged(f"a tensor in it has the impossible shape {size}")
    end = offset + (1 + sum((n - 1) * step for n, step in zip(size, stride)) if count else 0)
    if end > held:
        raise damaged(
            f"a tensor of shape {size}, strides {stride} and offset {offset} leaves its storage of {held} elements"
        )
    if count > held:
        raise unsupported(f"it holds an expanded tensor: shape {size} on a storage of {held} elements")


def _rebuild_parameter(args: tuple[Any, ...], budget: Budget) -> Tensor:
    match args:
        case (Tensor() as data, *_):
            return data
    raise damaged("a parameter in it has no tensor")


def _variable(args: tuple[Any, ...], budget: Budget) -> Any:
    """A parameter as torch before 0.4 wrote it: the class, called with the tensor."""
    match args:
        case (Tensor() as data, *_):
            return data
    return StandIn("torch.nn.parameter.Parameter", args)


def _rebuild_typed(args: tuple[Any, ...], budget: Budget) -> Any:
    """A tensor of a subclass, or with attributes: the plain tensor alone."""
    match args:
        case (Name() as function, _, tuple() as inner, *_) if function.origin in PLAIN_TENSORS:
            return PLAIN_TENSORS[function.origin](inner, budget)
    raise unsupported("it holds a tensor of a subclass; dense tensors of common types are read only")


def _size(args: tuple[Any, ...], budget: Budget) -> torch.Size:
    match args:
        case ((tuple() | list()) as numbers,) if all(type(n) is int and 0 <= n < MAX_EXTENT for n in numbers):
            budget.charge(ENTRY_COST * len(numbers))
            return torch.Size(numbers)
    raise damaged("a torch.Size in it is not made of sizes")


def _device(args: tuple[Any, ...], budget: Budget) -> Any:
    match args:
        case (str() as name,) if DEVICE.fullmatch(name):
            return torch.device(name)
        case (str() as name, int() as index) if DEVICE.fullmatch(name) and ":" not in name and 0 <= index < 128:
            return torch.device(name, index)
    return StandIn("torch.device", args)


# -- Python


def _ordered_dict(args: tuple[Any, ...], budget: Budget) -> OrderedDict[Any, Any]:
    pairs = args[0] if args else ()
    if len(args) > 1 or not isinstance(pairs, (list, tuple)):
        raise damaged("an OrderedDict in it is not made of keys and values")
    budget.charge(4 * ENTRY_COST * len(pairs))
    result: OrderedDict[Any, Any] = OrderedDict()
    for pair in pairs:
        if not isinstance(pair, (list, tuple)) or len(pair) != 2:
            raise damaged("an OrderedDict in it is not made of keys and values")
        result[checked_key(pair[0], budget)] = pair[1]
    return result


def _default_dict(args: tuple[Any, ...], budget: Budget) -> dict[Any, Any]:
    return {}


def _elements(args: tuple[Any, ...], budget: Budget) -> list[Any]:
    match args:
        case ():
            return []
        case ((list() | tuple()) as elements,):
            budget.charge(2 * ENTRY_COST * len(elements))
            return [checked_key(element, budget) for element in elements]
    raise damaged("a set in it is not made of a list")


def _set(args: tuple[Any, ...], budget: Budget) -> set[Any]:
    return set(_elements(args, budget))


def _frozenset(args: tuple[Any, ...], budget: Budget) -> frozenset[Any]:
    return frozenset(_elements(args, budget))


def _encode(args: tuple[Any, ...], budget: Budget) -> bytes:
    """Bytes, which protocol 2 writes as the text that encodes to them."""
    match args:
        case (str() as text, str() as encoding) if encoding in LATIN:
            return _latin(text, budget)
    raise unsupported("it encodes text by something else than latin1")


def _bytes(args: tuple[Any, ...], budget: Budget) -> Any:
    return StandIn("builtins.bytes", args) if args else b""


def _latin(data: Any, budget: Budget) -> bytes:
    """Bytes, also where Python 2 made text of them."""
    budget.charge(len(data) if isinstance(data, (str, bytes)) else 0)
    if isinstance(data, (bytes, bytearray)):
        return bytes(data)
    try:
        if isinstance(data, str):
            return data.encode("latin-1")
    except UnicodeEncodeError:
        pass
    raise damaged("bytes in it are text, or something else")


# -- numpy


def _dtype(args: tuple[Any, ...], budget: Budget) -> Any:
    match args:
        case (str() as name, *_) if NUMBERS.fullmatch(name):
            return np.dtype(name)
    return StandIn("numpy.dtype", args)


def _scalar(args: tuple[Any, ...], budget: Budget) -> Any:
    match args:
        case (np.dtype() as dtype, data):
            return _numbers(dtype, data, 1, budget)[0]
    return StandIn("numpy.core.multiarray.scalar", args)


def _empty_array(args: tuple[Any, ...], budget: Budget) -> Any:
    match args:
        case (Name(origin="numpy.ndarray"), *_):
            return np.empty(0)
    return StandIn("numpy.core.multiarray._reconstruct", args)


def _array_of_buffer(args: tuple[Any, ...], budget: Budget) -> Any:
    match args:
        case (data, np.dtype() as dtype, tuple() as shape, str() as order) if order in ("C", "F"):
            return _numbers(dtype, data, _count(shape), budget).reshape(shape, order="C" if order == "C" else "F")
    raise unsupported("it holds an array of numpy that is not made of numbers")


def _restore_array(target: Any, state: Any, budget: Budget) -> None:
    match state:
        case (_, tuple() as shape, np.dtype() as dtype, bool() | int() as is_fortran, data):
            raw = _numbers(dtype, data, _count(shape), budget).tobytes()
            target.__setstate__((1, shape, dtype, bool(is_fortran), raw))
        case _:
            raise unsupported("it holds an array of numpy that is not made of numbers")


def _count(shape: tuple[Any, ...]) -> int:
    if len(shape) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n < MAX_EXTENT for n in shape):
        raise damaged("an array in it has a size that is negative, huge or no integer")
    if prod(max(n, 1) for n in shape) >= MAX_EXTENT:
        raise damaged(f"an array in it has the impossible shape {shape}")
    return prod(shape)


def _numbers(dtype: np.dtype[Any], data: Any, count: int, budget: Budget) -> np.ndarray[Any, Any]:
    raw = _latin(data, budget)
    budget.charge(TENSOR_COST + 2 * len(raw))
    if len(raw) != count * dtype.itemsize:
        raise damaged(f"{count} numbers of numpy's {dtype} have {len(raw)} bytes")
    if dtype.kind == "b":
        return np.frombuffer(raw, np.uint8).astype(np.bool_)  # other bytes than 0 and 1 are no truth values
    return np.array(np.frombuffer(raw, dtype))


Rebuilder = Callable[[tuple[Any, ...], Budget], Any]

PLAIN_TENSORS: dict[str, Rebuilder] = {
    "torch._utils._rebuild_tensor": rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
}
REBUILDERS: dict[str, Rebuilder] = {
    **PLAIN_TENSORS,
    "torch._tensor._rebuild_from_type_v2": _rebuild_typed,
    "torch.nn.parameter.Parameter": _variable,
    "torch.autograd.variable.Variable": _variable,
    "torch.Size": _size,
    "torch.device": _device,
    "collections.OrderedDict": _ordered_dict,
    "collections.defaultdict": _default_dict,
    **{f"{module}.set": _set for module in ("builtins", "__builtin__")},
    **{f"{module}.frozenset": _frozenset for module in ("builtins", "__builtin__")},
    **{f"{module}.bytes": _bytes for module in ("builtins", "__builtin__")},
    "_codecs.encode": _encode,
    "numpy.dtype": _dtype,
    **{f"numpy.{core}.multiarray.scalar": _scalar for core in ("core", "_core")},
    **{f"numpy.{core}.multiarray._reconstruct": _empty_array for core in ("core", "_core")},
    **{f"numpy.{core}.numeric._frombuffer": _array_of_buffer for core in ("core", "_core")},
}
