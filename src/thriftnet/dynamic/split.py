"""A network in two: the front up to a named module, and the tail after it.

The network's code is not looked at. The front is the network, stopped at the end of the named module. The tail is the network,
too, in which that module gives what the front has found, and what runs before it is left out.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thriftnet.core.fold_norms import ACTIVATIONS
from thriftnet.core.probe import Call, Size, calls, failure, on_meta
from thriftnet.core.sites import replace
from thriftnet.errors import IncompatibleModelError, unknown_name

FEATURES = 3  # images that a tail is tried with, while what stands for the front's inputs has another number: 2


@dataclass(frozen=True)
class Split:
    """Where a network is divided.

    Args:
        front: The modules that have run when the front ends, outermost only.
        cuts: Those of them whose outputs the tail needs; at the last of them the front ends.
        channels: Channels of their outputs.
        both: Modules without parameters that run on both sides, as activation functions.
    """

    front: tuple[str, ...]
    cuts: tuple[str, ...]
    channels: tuple[int, ...] = ()
    both: tuple[str, ...] = ()


def split_at(model: nn.Module, cut: str, size: Size) -> Split:
    """How ``model`` is divided at the end of the module ``cut``.

    Outputs from further back are taken along when the tail needs one, as where a shortcut passes by.

    Args:
        model: Any network.
        cut: Name of a module that runs once.
        size: Channels, height and width of an image.

    Raises:
        ConfigError: No such module.
        IncompatibleModelError: It does not run once, a layer runs before and after it, or too much passes by.
    """
    ran = calls(model, size)
    end = _end(model, cut, ran)
    before, after = [call.name for call in ran[: end + 1]], {call.name for call in ran[end + 1 :]}
    _check_apart(model, cut, set(before), after)
    front = _outermost([name for name in before if name not in after])
    both = tuple(dict.fromkeys(name for name in before if name in after))
    outputs = {call.name: call.output for call in ran[: end + 1]}
    passing = [name for name in reversed(front) if name != cut and isinstance(outputs[name], Tensor)]
    for cuts in ([cut], *([name, cut] for name in passing)):
        if _suffices(model, front, [outputs[name] for name in cuts], cuts, size):
            return Split(front, tuple(cuts), tuple(outputs[name].shape[1] for name in cuts), both)
    raise IncompatibleModelError(
        f"{type(model).__name__} cannot be divided after {cut!r}: what runs later reads more from before it than one further "
        "output. Name a module whose output is all that goes on, as the end of a stage"
    )


def _end(model: nn.Module, cut: str, ran: list[Call]) -> int:
    """Which call ends the front."""
    names = {name for name, _ in model.named_modules()} - {""}
    if cut not in names:
        raise unknown_name("module to end the front", cut, names)
    places = [place for place, call in enumerate(ran) if call.name == cut]
    if len(places) != 1:
        raise IncompatibleModelError(f"module {cut!r} runs {len(places)} times: the front can end at one that runs once")
    output = ran[places[0]].output
    if not isinstance(output, Tensor) or output.ndim != 4:
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise IncompatibleModelError(f"module {cut!r} gives {given}: the front can end at one that gives maps (N, C, H, W)")
    return places[0]


def _outermost(names: list[str]) -> tuple[str, ...]:
    """Names in the order met, without those that lie inside another."""
    held = set(names)
    inside = {name for name in held for part in _parents(name) if part in held}
    return tuple(dict.fromkeys(name for name in names if name not in inside))


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _check_apart(model: nn.Module, cut: str, before: set[str], after: set[str]) -> None:
    for name in sorted(before & after):
        if any(True for _ in model.get_submodule(name).parameters()):
            raise IncompatibleModelError(
                f"layer {name!r} runs before and after {cut!r}: the front and the tails cannot share it. End the front elsewhere"
            )


def _suffices(model: nn.Module, front: tuple[str, ...], outputs: list[Tensor], cuts: list[str], size: Size) -> bool:
    """Whether the tail needs nothing of the front but the outputs at ``cuts``: then nothing else has its batch size."""
    tail = Tail(on_meta(model), Split(front, tuple(cuts)))
    features = [output.new_empty(FEATURES, *output.shape[1:]) for output in outputs]
    ends: list[int] = []
    tail.network.register_forward_hook(
        lambda _, args, output: ends.append(len(output) if isinstance(output, Tensor) else -1)
    )
    for replay, value in zip(tail.replays, features, strict=True):
        replay.value = value
    return failure(tail.network, size) is None and ends == [FEATURES]


class Stop(Exception):  # noqa: N818  # no error: the front has ended
    """Raised where the front ends."""


class Recorder(nn.Module):
    """Runs a module and keeps its output; ends the front if it is the last.

    Shape: as ``body``.
    """

    def __init__(self, body: nn.Module, last: bool) -> None:
        super().__init__()
        self.body, self.last = body, last
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        self.value = out.detach()  # counts as a reader: what is kept must not be overwritten
        if self.last:
            raise Stop
        return out


class Replay(nn.Module):
    """Gives what the front has found, whatever it is called with.

    Shape: anything -> that of ``value``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.value is None:
            raise IncompatibleModelError("a tail cannot run alone: it needs the outputs of its front")
        return self.value


class Passing(nn.Module):
    """An activation that runs on both sides: in the tail, what stands for a value of the front passes it untouched.

    Shape: as ``body``, which keeps shapes.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x if x.is_meta else self.body(x)


class Front(nn.Module):
    """A network up to where it is divided. It takes the network over.

    Shape: (N, ...) images -> the outputs at ``keeps``, in that order.

    Args:
        network: The network; what runs later is taken out of it.
        split: Where it is divided.
        keeps: The modules whose outputs are wanted; left out, those that the tail needs.
    """

    def __init__(self, network: nn.Module, split: Split, keeps: tuple[str, ...] = ()) -> None:
        super().__init__()
        keeps = keeps or split.cuts
        needed = (*split.front, *split.both)
        captures = {
            n: Recorder(network.get_submodule(n), n == split.cuts[-1]) for n in dict.fromkeys((*keeps, split.cuts[-1]))
        }
        table: dict[int, nn.Module] = {id(capture.body): capture for capture in captures.values()}
        running = {id(m) for name, m in network.named_modules() if _within(name, needed) or _holds(name, needed)}
        table |= {id(m): nn.Identity() for m in network.modules() if id(m) not in running}
        self.network, self.captures = replace(network, table), [captures[name] for name in keeps]
        self.every = list(captures.values())

    def forward(self, images: Tensor) -> list[Tensor]:
        with contextlib.suppress(Stop):
            self.network(images)
        found = [capture.value for capture in self.captures]
        for capture in self.every:
            capture.value = None
        return [value for value in found if value is not None]


class Tail(nn.Module):
    """A network after where it is divided. It takes the network over.

    Shape: outputs of the front, each (N, ...), and the shape of an image -> as the network.
    """

    def __init__(self, network: nn.Module, split: Split) -> None:
        super().__init__()
        replays = {name: Replay() for name in split.cuts}
        later = {id(m) for name, m in network.named_modules() if name and not _within(name, split.front)}
        table: dict[int, nn.Module] = {id(network.get_submodule(name)): nn.Identity() for name in split.front}
        table |= {id(network.get_submodule(name)): replay for name, replay in replays.items()}
        shared = [network.get_submodule(name) for name in split.both]
        later -= {id(module) for module in shared if isinstance(module, ACTIVATIONS)}
        table |= {id(module): Passing(module) for module in shared if isinstance(module, ACTIVATIONS)}
        self.network = replace(network, {key: new for key, new in table.items() if key not in later})
        self.replays = list(replays.values())

    def forward(self, features: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """What passes through the places of the front has a shape and no values: nothing is computed there."""
        for replay, value in zip(self.replays, features, strict=True):
            replay.value = value
        out: Tensor = self.network(torch.empty(len(features[0]), *shape, device="meta", dtype=features[0].dtype))
        for replay in self.replays:
            replay.value = None
        return out


def _within(name: str, outer: tuple[str, ...]) -> bool:
    """Whether a module is one of ``outer`` or lies inside one."""
    return any(name == part or name.startswith(f"{part}.") for part in outer)


def _holds(name: str, inner: tuple[str, ...]) -> bool:
    """Whether one of ``inner`` lies in a module, or the module is the whole network."""
    return not name or any(part.startswith(f"{name}.") for part in inner)
