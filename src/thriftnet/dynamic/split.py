"""A network in two: the front, up to the end of a named module, and the tail after it.

The network's code is not analysed. The front is the network, stopped at the end of the named module. The tail is also the network:
that module returns the output of the front, and the layers before it are removed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from thriftnet.core.fold_norms import ACTIVATIONS
from thriftnet.core.probe import Call, Size, failure, image_calls, on_meta
from thriftnet.core.sites import replace
from thriftnet.errors import IncompatibleModelError, unknown_name

FEATURES = 3  # batch size of the front's outputs in the trial of a tail; everything else has 2


@dataclass(frozen=True)
class Split:
    """Where a network is divided, by names of modules."""

    front: tuple[str, ...]  # those that have run when the front ends, outermost only
    cuts: tuple[str, ...]  # those whose outputs the tail reads; the front ends after the last of them
    channels: tuple[int, ...] = ()  # of these outputs
    both: tuple[str, ...] = ()  # those without parameters that run on both sides, such as activations

    @property
    def after(self) -> str:
        """The module that ends the front."""
        return self.cuts[-1]


def split_at(model: nn.Module, after: str, size: Size) -> Split:
    """How ``model`` is divided at the end of the module ``after``.

    If the tail needs one more output from before it, as where a shortcut bypasses the module, it becomes a second cut.

    Raises:
        ConfigError: No such module.
        IncompatibleModelError: It does not run exactly once, a layer runs on both sides, or the tail needs more than two outputs.
    """
    ran = image_calls(model, size)
    end = _end(model, after, ran)
    before, later = [call.name for call in ran[: end + 1]], {call.name for call in ran[end + 1 :]}
    for name in sorted(later.intersection(before)):
        if any(True for _ in model.get_submodule(name).parameters()):
            raise IncompatibleModelError(
                f"layer {name!r} runs before and after {after!r}: the front and the tails cannot share it. End the front elsewhere"
            )
    front = _outermost([name for name in before if name not in later])
    both = tuple(dict.fromkeys(name for name in before if name in later))
    outputs = {call.name: call.output for call in ran[: end + 1]}
    bypassing = [name for name in reversed(front) if name != after and isinstance(outputs[name], Tensor)]
    for cuts in ([after], *([name, after] for name in bypassing)):
        if _suffices(model, front, [outputs[name] for name in cuts], cuts, size):
            return Split(front, tuple(cuts), tuple(outputs[name].shape[1] for name in cuts), both)
    raise IncompatibleModelError(
        f"{type(model).__name__} cannot be divided after {after!r}: the rest reads more than one other output from before it. "
        "Name a module whose output is the only input of the rest, such as the end of a stage"
    )


def _end(model: nn.Module, after: str, ran: list[Call]) -> int:
    """Index of the call that ends the front."""
    names = {name for name, _ in model.named_modules()} - {""}
    if after not in names:
        raise unknown_name("module to end the front", after, names)
    found = [index for index, call in enumerate(ran) if call.name == after]
    if len(found) != 1:
        raise IncompatibleModelError(f"module {after!r} runs {len(found)} times: the front must end at one that runs once")
    output = ran[found[0]].output
    if not isinstance(output, Tensor) or output.ndim != 4:
        given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise IncompatibleModelError(
            f"module {after!r} outputs {given}: the front must end at one that outputs feature maps (N, C, H, W)"
        )
    return found[0]


def _outermost(names: list[str]) -> tuple[str, ...]:
    """Names in order, without those inside another."""
    present = set(names)
    return tuple(dict.fromkeys(name for name in names if not is_within(name.rpartition(".")[0], present)))


def is_within(name: str, outer: Sequence[str] | set[str]) -> bool:
    """Whether a module is one of ``outer`` or lies inside one."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in outer for count in range(1, len(parts) + 1))


def _suffices(model: nn.Module, front: tuple[str, ...], outputs: list[Tensor], cuts: list[str], size: Size) -> bool:
    """Whether the tail needs no other output of the front: only then its own output has their batch size."""
    tail = Tail(on_meta(model), Split(front, tuple(cuts)))
    sizes: list[int] = []
    tail.network.register_forward_hook(
        lambda _, args, output: sizes.append(len(output) if isinstance(output, Tensor) else -1)
    )
    for replay, output in zip(tail.replays, outputs, strict=True):
        replay.value = output.new_empty(FEATURES, *output.shape[1:])
    return failure(tail.network, size) is None and sizes == [FEATURES]


class Stop(Exception):  # noqa: N818  # not an error
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
        self.value = out.detach()  # counts as a reader, so that no activation overwrites it
        if self.last:
            raise Stop
        return out


class Replay(nn.Module):
    """Returns an output of the front, whatever its input.

    Shape: anything -> that of ``value``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.value: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.value is None:
            raise IncompatibleModelError("a tail cannot run alone: it needs the outputs of its front")
        return self.value


class PassThrough(nn.Module):
    """An activation that runs on both sides: in the tail it skips the placeholders of the front, which are on the meta device.

    Shape: as ``body``, which keeps shapes.
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x if x.is_meta else self.body(x)


class Front(nn.Module):
    """A network up to where it is divided. It takes ownership of the network, and removes later layers from it.

    Shape: (N, ...) images -> the outputs of the modules named in ``keep``, in that order.
    """

    def __init__(self, network: nn.Module, split: Split, keep: tuple[str, ...]) -> None:
        super().__init__()
        recorders = {
            name: Recorder(network.get_submodule(name), name == split.after) for name in dict.fromkeys((*keep, split.after))
        }
        needed = {*split.front, *split.both}
        holders = {".".join(name.split(".")[:count]) for name in needed for count in range(name.count(".") + 1)}
        running = {id(m) for name, m in network.named_modules() if name in holders or is_within(name, needed)}
        table: dict[int, nn.Module] = {id(m): nn.Identity() for m in network.modules() if id(m) not in running}
        table |= {id(recorder.body): recorder for recorder in recorders.values()}
        self.network, self.kept, self.recorders = replace(network, table), keep, recorders

    def forward(self, images: Tensor) -> list[Tensor]:
        with contextlib.suppress(Stop):
            self.network(images)
        outputs = [self.recorders[name].value for name in self.kept]
        for recorder in self.recorders.values():
            recorder.value = None
        return [output for output in outputs if output is not None]


class Tail(nn.Module):
    """A network after where it is divided. It takes ownership of the network.

    Shape: outputs of the front, each (N, ...), and the shape of an image -> as the network.
    """

    def __init__(self, network: nn.Module, split: Split) -> None:
        super().__init__()
        replays = {name: Replay() for name in split.cuts}
        later = {id(m) for name, m in network.named_modules() if name and not is_within(name, split.front)}
        removed = {**{name: nn.Identity() for name in split.front}, **replays}
        table: dict[int, nn.Module] = {id(network.get_submodule(name)): new for name, new in removed.items()}
        table = {key: new for key, new in table.items() if key not in later}
        shared = [network.get_submodule(name) for name in split.both]
        table |= {id(module): PassThrough(module) for module in shared if isinstance(module, ACTIVATIONS)}
        self.network = replace(network, table)
        self.replays = list(replays.values())

    def forward(self, features: list[Tensor], shape: tuple[int, ...]) -> Tensor:
        """The input of the removed layers is on the meta device: nothing is computed there."""
        for replay, value in zip(self.replays, features, strict=True):
            replay.value = value
        out: Tensor = self.network(torch.empty(len(features[0]), *shape, device="meta", dtype=features[0].dtype))
        for replay in self.replays:
            replay.value = None
        return out
