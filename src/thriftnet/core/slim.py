"""Making the layers of a network narrow, whatever their class.

Layers of `torch.nn` become the `Plain*` layers. Every other module that holds channels stays the object it is and gets a class derived
from its own, `Slim`: at a narrower width its parameters read as their first channels, and its attributes as smaller numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn

from thriftnet.core.channels import ChannelTrace, running
from thriftnet.core.conv import PlainConv2d
from thriftnet.core.linear import PlainLinear
from thriftnet.core.norm import (
    STATISTICS,
    PlainBatchNorm2d,
    PlainGroupNorm,
    PlainLayerNorm,
    add_statistics,
    statistics_suffix,
)
from thriftnet.core.probe import Inputs, feed, on_meta
from thriftnet.core.sites import replace
from thriftnet.core.spaces import Axis, Space, count, is_whole, keep_whole, reasons, runs
from thriftnet.core.tied import Tied
from thriftnet.core.width import Runs, WidthAware, WidthSpec, format_width, select_width, take
from thriftnet.errors import IncompatibleModelError, first_line

PLAIN: dict[type[nn.Module], tuple[type[WidthAware], str, str]] = {
    nn.Conv2d: (PlainConv2d, "in_channels", "out_channels"),
    nn.BatchNorm2d: (PlainBatchNorm2d, "num_features", "num_features"),
    nn.Linear: (PlainLinear, "in_features", "out_features"),
    nn.GroupNorm: (PlainGroupNorm, "num_channels", "num_channels"),
    nn.LayerNorm: (PlainLayerNorm, "normalized_shape", "normalized_shape"),
}

READERS = (nn.TransformerEncoderLayer,)  # their fused forward reads the weights of their layers, which do not run

Cuts = tuple[Runs | None, ...]  # along each axis of a tensor; None where it is whole


class Slim(Tied, WidthAware):
    """A module of any class at several widths.

    Attributes:
        cuts: For each parameter or buffer that is narrowed, what each width uses.
        sizes: For each attribute that counts channels, its value at each width, and at last the original one.
    """

    original: ClassVar[type[nn.Module]]

    def __getattr__(self, name: str) -> Any:
        held = self.__dict__.get("_slim")
        if held is None:
            return super().__getattr__(name)
        cuts, _ = held
        if name in STATISTICS and isinstance(self, nn.modules.batchnorm._BatchNorm):
            return self._statistic(name)
        value = super().__getattr__(name)
        return value if name not in cuts or not isinstance(value, Tensor) else _cut(value, cuts[name][self.width_index])

    def _statistic(self, name: str) -> Tensor | None:
        spec = self.width_spec
        values: Tensor | None = self._buffers[name + statistics_suffix(spec, self.width_index)]
        return values if values is None or spec is None or not values.ndim else values[: spec.outs[self.width_index]]

    def set_width_index(self, index: int) -> None:
        super().set_width_index(index)
        for name, values in self._slim[1].items():
            setattr(self, name, values[:-1][index])

    def set_width_spec(self, width_spec: WidthSpec | None) -> None:
        """None makes it what it was; otherwise see `make_slim`."""
        super().set_width_spec(width_spec)
        if width_spec is None:
            for name, values in self._slim[1].items():
                setattr(self, name, values[-1])
            for name in ("_slim", "width_spec", "width_index"):
                del self.__dict__[name]
            self.__class__ = cast(Any, type(self).original)
            if isinstance(self, nn.modules.batchnorm._BatchNorm):
                add_statistics(self, None)

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """A module of its original class, at the selected width."""
        kind = type(self).original
        plain = kind.__new__(kind)
        plain.__dict__ = {
            k: v for k, v in self.__dict__.items() if k not in ("_slim", "width_spec", "width_index", *self.transient)
        }
        plain._modules = dict(self._modules)
        narrower = isinstance(self, nn.modules.batchnorm._BatchNorm)
        names = [name for name in self._buffers if name in STATISTICS or not (narrower and name.startswith(STATISTICS))]
        plain._buffers = {name: _copy(getattr(self, name)) for name in names}
        plain._parameters = {name: self._own(name, value) for name, value in self._parameters.items()}
        return plain

    def _own(self, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        """A parameter at the selected width; one that is whole is the same object, so that ties are kept."""
        taken = value if value is None else getattr(self, name)
        return value if value is None or taken is value else nn.Parameter(_copy(taken), value.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_slim, (type(self).original,), self.__getstate__()


def _copy(value: Any) -> Any:
    return value.detach().clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value


def _cut(tensor: Tensor, cuts: Cuts) -> Tensor:
    for dim, kept in enumerate(cuts):
        if kept is not None:
            tensor = take(tensor, dim, kept)
    return tensor


_classes: dict[type[nn.Module], type[Slim]] = {}


def _slim_class(kind: type[nn.Module]) -> type[Slim]:
    """The class of modules of this class that are narrowed."""
    if kind not in _classes:
        _classes[kind] = type(f"Slim{kind.__name__}", (Slim, kind), {"original": kind, "__module__": kind.__module__})
    return _classes[kind]


def _new_slim(kind: type[nn.Module]) -> Slim:
    made = _slim_class(kind)
    return made.__new__(made)


class Blocker(NamedTuple):
    """Why a narrower network does not run."""

    kind: type[nn.Module]  # of the module whose own code is the cause
    why: str


class Narrowing:
    """How a network is narrowed; found by running it, and checked by running it at every width.

    Args:
        model: The network, whose layers have one width each.
        widths: Ratios, ascending.
        inputs: What it reads.
        front: Tells of a module's name whether it runs before the gate.
        cut: Name of the module that ends the front.

    Raises:
        IncompatibleModelError: A narrower network does not run, whatever is kept whole.
    """

    def __init__(
        self,
        model: nn.Module,
        widths: Sequence[float],
        inputs: Inputs,
        front: Callable[[str], bool] = lambda _: False,
        cut: str | None = None,
    ) -> None:
        self.widths, self.inputs = tuple(widths), inputs
        self.trace = ChannelTrace(on_meta(model), front, cut)
        self.trace.run(inputs)
        tried: dict[type[nn.Module], int] = {}
        while (blocker := self._blocker(model)) is not None:
            tried[blocker.kind] = level = tried.get(blocker.kind, 0) + 1
            if not self._keep_whole(blocker, level):
                raise IncompatibleModelError(f"{type(model).__name__} cannot be narrowed: {blocker.why}")

    def __bool__(self) -> bool:
        """Whether anything is narrowed."""
        params = (axis for (name, _), axes in self.trace.params.items() for axis in axes if not self.trace.front(name))
        return not all(map(is_whole, (*params, *self.trace.counts.values())))

    def layers(self, network: nn.Module) -> Iterator[tuple[str, nn.Module, nn.Module]]:
        """Name, old and new module of each that is narrowed; those of the network's own classes are changed in place."""
        for name, module in list(network.named_modules()):
            if self.narrows(name, module):
                yield name, module, self._narrow(name, module)

    def narrows(self, name: str, module: nn.Module) -> bool:
        """Whether a module has something to narrow, statistics of its own for each width, or a place before the gate."""
        if self.trace.front(name):
            return type(module) in PLAIN
        if isinstance(module, WidthAware):
            return (name, "ins") in self.trace.counts
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            return (name, "running_mean") in self.trace.params
        return not all(is_whole(axis) for _, axis in self._axes(name))

    def why_whole(self, name: str) -> str:
        """Why a module has nothing to narrow."""
        axes = self._axes(name)
        found = list(dict.fromkeys(reason for _, axis in axes for reason in reasons(axis)))
        return "; ".join(found) or "it does not run"

    def _axes(self, name: str) -> list[tuple[str, Axis]]:
        of_params = [(key, axis) for (owner, key), axes in self.trace.params.items() if owner == name for axis in axes]
        return of_params + [(key, axis) for (owner, key), axis in self.trace.counts.items() if owner == name]

    def shares(self, axis: Axis) -> tuple[int, ...]:
        """Length of an axis at each width."""
        return tuple(count(axis or (), width) for width in self.widths)

    def _spec(self, ins: Axis, outs: Axis) -> WidthSpec:
        used = [tuple(runs(axis or (), width) for width in self.widths) for axis in (ins, outs)]
        lengths = [self.shares(axis) for axis in (ins, outs)]
        unordered = [
            every if any(each != ((0, own),) for each, own in zip(every, length, strict=True)) else ()
            for every, length in zip(used, lengths, strict=True)
        ]
        return WidthSpec(self.widths, lengths[0], lengths[1], in_runs=unordered[0], out_runs=unordered[1])

    def _narrow(self, name: str, module: nn.Module) -> nn.Module:
        layer, ins, outs = PLAIN.get(type(module), (None, "ins", "outs"))
        if isinstance(self.trace.ghost.get_submodule(name.rpartition(".")[0]), READERS):
            return self._slim(name, module)
        axes = [self._counted(name, key, module) for key in (ins, outs)]
        if all(axes):
            new = module if layer is None else layer(module)
            if isinstance(new, WidthAware):
                new.set_width_spec(None if self.trace.front(name) else self._spec(*axes))
                return new
        return self._slim(name, module)

    def _counted(self, name: str, key: str, module: nn.Module) -> Axis:
        """The channels that an attribute counts; a single one, as of grey images, is no axis of its own in the trace."""
        single: Axis = [(Space(1), 1)] if getattr(module, key, None) == 1 else None
        return self.trace.counts.get((name, key), single)

    def _slim(self, name: str, module: nn.Module) -> nn.Module:
        cuts = {
            key: tuple(tuple(None if is_whole(axis) else runs(axis or (), width) for axis in axes) for width in self.widths)
            for (owner, key), axes in self.trace.params.items()
            if owner == name and not all(map(is_whole, axes))
        }
        sizes = {}
        for (owner, key), axis in self.trace.counts.items():
            if owner == name and not is_whole(axis):
                now = vars(module)[key]
                sizes[key] = (*((each,) if isinstance(now, tuple) else each for each in self.shares(axis)), now)
        statistics = self.trace.params.get((name, "running_mean"))
        norm = statistics is not None and isinstance(module, nn.modules.batchnorm._BatchNorm)
        slim = cast(Slim, module)
        slim.__class__ = _slim_class(type(module))
        slim.width_spec = self._spec(statistics[0], statistics[0]) if norm and statistics else WidthSpec(self.widths, (), ())
        if isinstance(slim, nn.modules.batchnorm._BatchNorm):
            add_statistics(slim, slim.width_spec if norm else None)
        slim.__dict__["_slim"] = cuts, sizes
        slim.set_width_index(-1)
        return slim

    def _blocker(self, model: nn.Module) -> Blocker | None:
        """What differs from expectation when the narrowed network runs at each width, on the meta device."""
        ghost = on_meta(model)
        ghost = replace(ghost, {id(old): new for _, old, new in self.layers(ghost)})
        check = _Check(self)
        if self.trace.cut is not None:
            ends = self.shares(self.trace.cut_axis)
            ghost.get_submodule(self.trace.cut).register_forward_hook(lambda _, a, out: out[:, : ends[check.index]])
        for training in self.trace.modes:
            ghost.train(training)  # once: what a network remembers of one width must not be used at the next
            for check.index in range(len(self.widths)):
                select_width(ghost, check.index)
                blocker = check.run(ghost, training)
                if blocker is not None:
                    return blocker
        return None

    def _keep_whole(self, blocker: Blocker, level: int) -> bool:
        """Keep more channels that pass through modules of a class whole; False if there are none left."""
        why = f"the code of {blocker.kind.__name__} fixes their number"
        trace = self.trace
        axes = trace.own[blocker.kind, True] + (trace.own[blocker.kind, False] if level > 1 else [])
        names = [name for name, module in trace.ghost.named_modules() if type(module) is blocker.kind]
        if level > 2:
            axes += [axis for step in trace.steps if step.name in names for shape in step.shapes for _, axis in shape]
        if level > 3:
            inside = tuple(f"{name}." if name else "" for name in names)
            axes += [axis for (owner, _), held in trace.params.items() if f"{owner}.".startswith(inside) for axis in held]
        for axis in axes:
            keep_whole(axis, why)
        return level <= 4


class _Unexpected(Exception):  # noqa: N818  # tells where, not what
    pass


class _Check:
    """Compares a run of a narrowed network with what its trace says of this width."""

    def __init__(self, narrowing: Narrowing) -> None:
        self.trace, self.widths, self.inputs, self.index = narrowing.trace, narrowing.widths, narrowing.inputs, 0
        self.known = {step.name for step in self.trace.steps}
        first = next(i for i, step in enumerate(self.trace.steps) if step.name == "" and not step.begins) + 1
        self.steps = {False: self.trace.steps[:first], True: self.trace.steps[first:]}

    def run(self, ghost: nn.Module, training: bool) -> Blocker | None:
        self.coming, self.stack = iter(self.steps[training]), [""]
        try:
            with torch.no_grad(), running(ghost, self._step, self.known):
                feed(ghost, self.inputs)
        except Exception as error:  # a network's own code may raise anything
            name, width = self.stack[-1], format_width(self.widths[self.index])
            kind = type(self.trace.ghost.get_submodule(name))
            return Blocker(kind, f"{kind.__name__} {name!r} does not run at width {width}: {first_line(error)}")
        return None

    def _step(self, name: str, begins: bool, tensors: list[Tensor]) -> None:
        width, step = self.widths[self.index], next(self.coming, None)
        shapes = [] if step is None else step.shapes
        expected = [[size if axis is None else count(axis, width) for size, axis in shape] for shape in shapes]
        got = [list(tensor.shape) for tensor in tensors]
        if step is None or (name, begins) != (step.name, step.begins) or got != expected:
            raise _Unexpected(f"{name!r} {'gets' if begins else 'gives'} {got}, expected {expected}")
        if begins:
            self.stack.append(name)
        else:
            self.stack.pop()
