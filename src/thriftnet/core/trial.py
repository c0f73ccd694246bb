"""Running a converted network beside the plain one, once each: what was replaced runs where it did, and outputs keep their shapes.

The runs are on the meta device, where nothing is computed; a network that does not run there runs for real.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from thriftnet.core import probe
from thriftnet.core.probe import Inputs
from thriftnet.core.untouched import untouched
from thriftnet.core.width import format_width, select_width, widths
from thriftnet.errors import ConfigError, first_line

Replaced = tuple[str, nn.Module, nn.Module]  # the old layer's name, it, and the new one


class MismatchError(Exception):
    """A converted network does not do what the plain one does; ``layer`` is the name of one that is to blame, if known."""

    def __init__(self, text: str, layer: str | None = None) -> None:
        super().__init__(text)
        self.layer = layer


@dataclass
class Observed:
    """What happened in one run of a network."""

    outputs: list[tuple[Any, ...]] = field(default_factory=list)  # shape and type of each tensor
    runs: Counter[str] = field(default_factory=Counter)  # forwards of each module, by its first name
    running: list[str] = field(
        default_factory=list
    )  # modules that have not ended: the last one is where an error was raised
    used: set[int] = field(default_factory=set)  # ids of those of the watched tensors that were read


class Trial:
    """A run of the plain network, with which that of the converted one is compared.

    Args:
        model: The plain network, before anything is replaced.
        input_size: Channels, height and width of its images, if it reads images. Default: what it states, or one it runs on.
        example: What it reads otherwise: a tensor, a tuple of arguments, or a dict of arguments by name.

    Attributes:
        input_size: Channels, height and width of the images that were given; None if none were.
        example: The inputs that were given otherwise; None if none were.
        not_checked: Why it could not run, else empty.

    Raises:
        ConfigError: It does not run on what is given.
    """

    def __init__(self, model: nn.Module, input_size: Sequence[int] | None = None, example: Any = None) -> None:
        self.not_checked = ""
        self.input_size = _image_size(input_size, example)
        self.example: Inputs | None = None
        errors = []
        for self.on_meta in (True, False):
            for self.inputs in _inputs_to_try(model, input_size, example):
                self.before = Observed()
                try:
                    self._run(model, self.before, watched=list(model.parameters()))
                    self.example = self.inputs if example is not None and self.input_size is None else None
                    return
                except Exception as error:  # a network's own code may raise anything, and some cannot be copied
                    errors.append(first_line(error))
        kind = type(model).__name__
        if example is not None or input_size is not None:
            given = f"input_size={input_size}" if example is None else "the given example"
            raise ConfigError(f"{kind} does not run on {given}: {errors[-1]}")
        self.not_checked = (
            f"{kind} runs on none of the image sizes tried ({errors[-1]}). Say what it reads: input_size=(C, H, W), "
            "or example=..., a tensor, a tuple, or a dict of arguments"
        )

    def compare(self, model: nn.Module, replaced: Sequence[Replaced]) -> str:
        """Run the converted network, at each of its widths; gives what could not be checked.

        Args:
            model: The converted network.
            replaced: What was replaced.

        Raises:
            MismatchError: It does not run, a new layer does not run where the old one did, or an output has another shape.
        """
        if self.not_checked:
            return self.not_checked
        registered = {id(tensor) for tensor in _tensors(model)}
        old = {
            id(tensor): (tensor, name)
            for name, layer, _ in replaced
            for tensor in _tensors(layer)
            if id(tensor) not in registered
        }
        idle = [(name, new) for name, layer, new in replaced if not self.before.runs[name]]
        read = {name for name, layer, _ in replaced if any(id(tensor) in self.before.used for tensor in layer.parameters())}
        watched = [*(tensor for tensor, _ in old.values()), *(tensor for _, new in idle for tensor in new.parameters())]
        available = widths(model)
        for index in reversed(range(max(1, len(available)))):  # the widest first: only there all has its full size
            where = f" at width {format_width(available[index])}" if available else ""
            after = Observed()
            try:
                self._run(model, after, index if available else None, watched)
            except Exception as error:
                inside = f" in {after.running[-1]!r}" if after.running and after.running[-1] else ""
                raise MismatchError(
                    f"it does not run any more{where}: {type(error).__name__} {first_line(error)}{inside}"
                ) from error
            for name in (name for tensor, (_, name) in old.items() if tensor in after.used):
                raise MismatchError(
                    f"the old layer {name!r} goes on running, as the network also holds it outside of its modules "
                    "(in a list, a dict, a bound method), where no state dict has it. Use nn.ModuleList or nn.ModuleDict",
                    name,
                )
            for name, new in idle:
                if name in read and not any(id(tensor) in after.used for tensor in new.parameters()):
                    raise MismatchError(f"the new layer {name!r} is not read{where}, as the old one was", name)
            self._check_runs(model, replaced, after, where)
            self._check_outputs(after, where)
        unused = [name for name, _ in idle if name not in read]
        return f"layers that do not run in eval mode: {', '.join(map(repr, unused))}" if unused else ""

    def _check_runs(self, model: nn.Module, replaced: Sequence[Replaced], after: Observed, where: str) -> None:
        first = {id(module): name for name, module in model.named_modules()}
        expected: Counter[str] = Counter()
        for name, _, new in replaced:
            expected[first[id(new)]] += self.before.runs[name]
        for name, count in expected.items():
            if after.runs[name] != count:
                raise MismatchError(
                    f"the new layer {name!r} runs {after.runs[name]} times{where}, the old one {count}: "
                    "the network chooses what to run by the class or an attribute of its layers",
                    name,
                )

    def _check_outputs(self, after: Observed, where: str) -> None:
        before, now = self.before.outputs, after.outputs
        if len(before) != len(now):
            raise MismatchError(f"its output holds {len(now)} tensors{where}, and held {len(before)}")
        for old, new in zip(before, now, strict=True):
            if old != new:
                raise MismatchError(
                    f"its output {old} becomes {new}{where}: the network fixes numbers of channels outside of its layers"
                )

    def _run(self, model: nn.Module, seen: Observed, index: int | None = None, watched: Collection[Tensor] = ()) -> None:
        """Run a network once and note what happens."""
        memo: dict[int, Any] = {}
        network = probe.on_meta(model, watched, memo) if self.on_meta else model
        ids = {id(memo.get(id(tensor), tensor)): id(tensor) for tensor in watched}
        like = next((tensor for tensor in _tensors(model) if tensor.is_floating_point()), torch.empty(0))
        args, kwargs = self.inputs.on("meta" if self.on_meta else like.device)
        with ExitStack() as stack:
            stack.enter_context(untouched(network))
            stack.enter_context(probe.IgnoreOuterModes())
            for name, module in probe.hookable(network):
                stack.callback(module.register_forward_pre_hook(_entering(name, seen)).remove)
                stack.callback(module.register_forward_hook(_leaving(name, seen)).remove)
            if index is not None:
                select_width(network, index)
            stack.enter_context(_Uses(ids, seen.used) if ids else nullcontext())
            seen.outputs = [(*tensor.shape, tensor.dtype) for tensor in probe.tensors(network(*args, **kwargs))]


def _entering(name: str, seen: Observed) -> Any:
    return lambda *_: seen.running.append(name)


def _leaving(name: str, seen: Observed) -> Any:
    def leave(*_: Any) -> None:
        seen.running.pop()
        seen.runs[name] += 1

    return leave


class _Uses(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which of some tensors are read."""

    supports_higher_order_operators = True

    def __init__(self, watched: Mapping[int, int], used: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.watched, self.used = watched, used

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.used.update(self.watched[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.watched)
        return func(*args, **(kwargs or {}))


def _image_size(input_size: Sequence[int] | None, example: Any) -> tuple[int, ...] | None:
    """Channels, height and width of the images that were given, if images were."""
    if isinstance(example, Tensor) and example.ndim == 4:
        return tuple(example.shape[1:])
    return None if input_size is None else tuple(input_size)


def _inputs_to_try(model: nn.Module, input_size: Sequence[int] | None, example: Any) -> list[Inputs]:
    """Inputs of a batch of two images, on the meta device; or the example."""
    if example is None:
        return [Inputs((probe.images(model, size),), {}) for size in probe.sizes_to_try(model, input_size)]
    if isinstance(example, Tensor):
        return [Inputs((example,), {})]
    if isinstance(example, Mapping):
        return [Inputs((), dict(example))]
    if isinstance(example, tuple | list):
        return [Inputs(tuple(example), {})]
    raise ConfigError(f"example={example!r}: expected a tensor, a tuple of arguments, or a dict of arguments by name")


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
