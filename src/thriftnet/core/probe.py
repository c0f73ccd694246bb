"""Running a network on the meta device: shapes only, no computation."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from thriftnet.core.provenance import input_size_of, stated_input_size
from thriftnet.core.sites import ends
from thriftnet.errors import ConfigError, IncompatibleModelError, first_line

SIDES = (32, 224, 64, 28, 96, 8, 320)  # image sizes to try for networks without a stated input size

Size: TypeAlias = tuple[int, int, int]  # channels, height and width of an image


class Inputs(NamedTuple):
    """What a network reads: the arguments of its forward."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def on(self, device: torch.device | str) -> Inputs:
        """The same with all tensors on a device; zeros where one on the meta device has no values."""
        return tree_map(lambda value: _on(value, device), self)  # type: ignore[no-any-return]

    def to_text(self) -> str:
        """Types and shapes of the tensors, and everything else, as JSON.

        Raises:
            ConfigError: It holds something else than tensors, numbers, text, lists and dicts.
        """
        try:
            return json.dumps([list(self.args), dict(self.kwargs)], default=_shape_and_type)
        except TypeError as error:
            raise ConfigError(f"the example cannot be kept: {error}. Give tensors, numbers, text, lists and dicts") from None

    @classmethod
    def from_text(cls, text: str) -> Inputs:
        """What `to_text` gave, with tensors on the meta device.

        Raises:
            ConfigError: It is something else.
        """
        try:
            args, kwargs = json.loads(text, object_hook=_empty_tensor)
            return cls(tuple(args), dict(kwargs))
        except (ValueError, TypeError, AttributeError, RuntimeError):
            raise ConfigError(
                f"example={text!r} is no description of inputs: leave it out, convert(example=...) fills it"
            ) from None


def _on(value: Any, device: torch.device | str) -> Any:
    if not isinstance(value, Tensor):
        return value
    return torch.zeros_like(value, device=device) if value.is_meta else value.detach().to(device)


def _shape_and_type(value: object) -> object:
    if not isinstance(value, Tensor):
        raise TypeError(f"it holds a {type(value).__name__}")
    return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}


def _empty_tensor(held: dict[str, Any]) -> Any:
    if held.keys() != {"shape", "dtype"}:
        return held
    return torch.empty(held["shape"], dtype=getattr(torch, held["dtype"]), device="meta")


class Call(NamedTuple):
    """One forward of a module."""

    name: str  # the first in the network
    inputs: tuple[Any, ...]  # by position, on the meta device
    output: Any  # on the meta device


class IgnoreOuterModes(TorchFunctionMode):
    """Hides calls from enclosing TorchFunctionModes, such as those that build networks on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunction():
            if getattr(func, "__name__", "") in RECURRENT and args[0].is_meta:
                return _recurrent(func, args)
            return func(*args, **(kwargs or {}))


RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


def _recurrent(func: Any, args: Sequence[Any]) -> Any:
    """What a recurrent layer gives: on the meta device, torch takes milliseconds for each of its time steps."""
    x, hidden, weights, *_, bidirectional, _ = args
    if isinstance(weights, Tensor) or isinstance(hidden, Tensor) is (func.__name__ == "lstm"):
        return func(*args)  # a packed sequence
    states = [hidden] if isinstance(hidden, Tensor) else hidden
    out = x.new_empty(*x.shape[:-1], (1 + bidirectional) * states[0].shape[-1])
    return (out, *(torch.empty_like(state) for state in states))


def on_meta(model: nn.Module, others: Iterable[Tensor] = (), memo: dict[int, Any] | None = None) -> nn.Module:
    """A copy of ``model`` in eval mode on the meta device, without hooks; what cannot be copied, such as a lock, is the same object.

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
    known = dict(memo)
    try:
        ghost = copy.deepcopy(model, memo)
    except Exception:  # whatever a network holds
        memo.clear()
        memo |= known | _not_copied(model, known)
        ghost = copy.deepcopy(model, memo)
    ghost.eval()
    for module in ghost.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return ghost


def _not_copied(model: nn.Module, memo: dict[int, Any]) -> dict[int, Any]:
    """Attributes of modules that cannot be copied, by their ids."""
    found: dict[int, Any] = {}
    for value in (value for module in model.modules() for key, value in vars(module).items() if key != "_modules"):
        try:
            copy.deepcopy(value, dict(memo))
        except Exception:
            found[id(value)] = value
    return found


def hookable(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of a network without those that are scripted, which take no hooks."""
    return ((name, module) for name, module in model.named_modules() if not isinstance(module, torch.jit.ScriptModule))


def tensors(given: object) -> list[Tensor]:
    """All tensors that are given to a network or come from it, in lists, dicts and dataclasses as well."""
    found: list[Tensor] = []
    for leaf in tree_leaves(given):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors([getattr(leaf, each.name) for each in dataclasses.fields(leaf)])
        elif isinstance(leaf, Mapping):
            found += tensors(dict(leaf))
    return found


def run(ghost: nn.Module, size: Size) -> None:
    """Run a network on the meta device on two images of this size, of its own type."""
    feed(ghost, Inputs((images(ghost, size),), {}))


def feed(ghost: nn.Module, inputs: Inputs) -> None:
    """Run a network on the meta device on these inputs."""
    args, kwargs = inputs.on("meta")
    ghost(*args, **kwargs)


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


def training_size(model: nn.Module, given: Sequence[int] | None = None) -> Size:
    """`input_size`; where that runs in eval mode only, as with heads that only training runs, one that runs in training mode, too."""
    size = input_size(model, given)
    ghost = on_meta(model).train()
    return next((each for each in (size, *sizes_to_try(model, given)) if failure(ghost, each) is None), size)


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
