"""Layers of classes derived from those of `torch.nn`: weight-standardised convolutions, others that pad by themselves, ...

A new layer inherits from the class of the layer that it replaces, whose `forward` then runs with the new weight. No class is named
here: whatever a class makes of its weight, it makes of the new one.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, overload

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from thriftnet.errors import IncompatibleModelError

OWN = ("weight", "bias")
ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


TORCH: tuple[type[nn.Module], ...] = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Kind(nn.Module):
    """A layer that runs as the class of the layer it replaces does, and keeps the attributes that were added to it."""

    kind: ClassVar[type[nn.Module] | None] = None  # the class whose forward runs; None for those of torch.nn
    ours: ClassVar[type[nn.Module]]  # our class, of a class that inherits from both
    replaceable: ClassVar[bool] = False  # whether it has a weight of its own, so that a technique may replace it

    extras: tuple[str, ...] = ()  # attributes, parameters and buffers that layers of torch.nn do not have

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.kind is None:
            return super().__reduce_ex__(protocol)
        return _empty, (self.ours, self.kind), self.__getstate__()  # type: ignore[no-untyped-call]  # that of Tied

    def adopt_kind(self, like: nn.Module) -> None:
        """Inherit from the class of ``like``, and copy what it has beyond weight, bias and geometry."""
        self.extras = extras(like)
        inherit(self, like)


def inherit(layer: nn.Module, like: nn.Module) -> None:
    """Give a layer the class of ``like``, and what it has beyond a layer of `torch.nn`."""
    kind = kind_of(like)
    if kind is not None:
        layer.__class__ = _with_kind(type(layer), kind) if isinstance(layer, Kind) else kind  # type: ignore[arg-type]  # a class is hashable
    for name in extras(like):
        value = getattr(like, name)
        if isinstance(value, nn.Parameter):
            value = nn.Parameter(value.detach().clone(), value.requires_grad)
        elif name in like._buffers:
            layer.register_buffer(name, value.clone(), persistent=name not in like._non_persistent_buffers_set)
            continue
        setattr(layer, name, value)


def kind_of(layer: nn.Module) -> type[nn.Module] | None:
    """The class whose forward the layer runs, or None for those of `torch.nn`."""
    if isinstance(layer, Kind):
        return layer.kind
    return None if type(layer) in TORCH else type(layer)


def torch_class(layer: nn.Module) -> type[nn.Module]:
    """The class of `torch.nn` that a layer is of."""
    return next(each for each in TORCH if isinstance(layer, each))


def extras(layer: nn.Module) -> tuple[str, ...]:
    """Names of what a layer has beyond a layer of `torch.nn`."""
    if isinstance(layer, Kind):
        return layer.extras
    return tuple(
        name
        for held in (vars(layer), layer._parameters, layer._buffers)
        for name in held
        if name not in OWN and name not in _usual(torch_class(layer))  # type: ignore[arg-type]  # a class is hashable
    )


def has_own_weight(module: nn.Module) -> bool:
    """Whether a layer's weight is a real parameter of its own, which its class's forward reads."""
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or not weight.is_floating_point() or module._modules or "forward" in vars(module):
        return False
    return module.replaceable if isinstance(module, Kind) else not hasattr(type(module), "fold")


@overload
def executed(layer: nn.Conv2d) -> nn.Conv2d | None: ...


@overload
def executed(layer: nn.Linear) -> nn.Linear | None: ...


@torch.no_grad()
def executed(layer: nn.Conv2d | nn.Linear) -> nn.Conv2d | nn.Linear | None:
    """A layer of the same function whose weight is the one that runs; None if there is none.

    That is the layer itself, unless its class computes another weight, as weight standardisation does. A class that
    also pads by a rule of its own, or changes the output, has none.
    """
    if kind_of(layer) is None:
        return layer
    weight = layer.weight
    if isinstance(layer, nn.Conv2d):
        side = [1 + d * (k - 1) + s for k, s, d in zip(layer.kernel_size, layer.stride, layer.dilation)]
        sizes = [(layer.in_channels, *(length + more for length in side)) for more in range(max(layer.stride))]
    else:
        sizes = [(layer.in_features,)]
    mode, calls = layer.training, []
    runs = [(True, sizes[0]), *((False, size) for size in (*sizes, sizes[0]))]  # some pad at certain sizes only
    for layer.training, size in runs:
        x = weight.new_ones(1, *size)
        with _Calls() as recorder:
            out = layer(x)
        if len(recorder.calls) == 1 and recorder.calls[0]["out"] is out:
            calls.append({**recorder.calls[0], "is_input": recorder.calls[0]["input"] is x})
    layer.training = mode
    if len(calls) != len(runs):
        return None
    call = calls[-1]
    if all(each["weight"] is weight and each["bias"] is layer.bias for each in calls):
        return layer
    if not all(each["is_input"] and _equal(each, call) for each in calls):
        return None
    made: nn.Conv2d | nn.Linear
    options: dict[str, Any] = {"bias": call["bias"] is not None, "device": "meta"}
    if isinstance(layer, nn.Conv2d):
        options |= {name: call[name] for name in ("stride", "padding", "dilation", "groups") if name in call}
        made = nn.Conv2d(layer.in_channels, layer.out_channels, layer.kernel_size, **options)  # type: ignore[arg-type]
    else:
        made = nn.Linear(layer.in_features, layer.out_features, **options)
    for name in (name for name in OWN if call[name] is not None):
        setattr(made, name, nn.Parameter(call[name].clone()))
    return made.train(mode)


def _equal(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two calls have the same weight and bias."""
    pairs = [(one[name], other[name]) for name in OWN]
    return all(a is b or a.is_meta or torch.equal(a, b) for a, b in pairs)


class _Calls(TorchFunctionMode):
    """Records the convolutions and linear layers that run within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[dict[str, Any]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (F.conv2d, F.linear):
            self.calls.append({"bias": None, **dict(zip(ARGUMENTS, args)), **(kwargs or {}), "out": out})
        return out


@functools.cache
def _usual(plain: type[nn.Module]) -> frozenset[str]:
    """Attributes that every layer of this class has."""
    return frozenset(vars(plain(1, 1, device="meta") if plain is nn.Linear else plain(1, 1, 1, device="meta")))


@functools.cache
def _with_kind(ours: Any, kind: Any) -> Any:
    """The class that is ours, with the forward of ``kind``."""
    names = {"kind": kind, "ours": ours, "__module__": ours.__module__, "__doc__": ours.__doc__}
    try:
        return type(f"{ours.__name__}As{kind.__name__}", (ours, kind), names)
    except TypeError as error:  # a metaclass, or slots
        raise IncompatibleModelError(
            f"{kind.__name__} cannot be inherited from ({error}): leave its layers out with select"
        ) from None


def _empty(ours: type[nn.Module], kind: type[nn.Module]) -> nn.Module:
    """A layer of both classes, whose state a copy or file brings."""
    made = _with_kind(ours, kind)  # type: ignore[arg-type]  # a class is hashable
    layer: nn.Module = made.__new__(made)
    return layer
