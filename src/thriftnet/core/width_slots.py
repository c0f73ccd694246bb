"""Networks whose parts have different widths.

A *slot* is where a network has a width of its own: a layer, or several that must give equally many channels. Which widths go
together is not read off the code: the network is run without computing, each layer is given as many inputs as arrive, and
where shapes do not fit it fails.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace as changed
from itertools import groupby
from typing import TypeAlias

from torch import Tensor, nn

from thriftnet.core.conv import GeneratedConv2d, PlainConv2d
from thriftnet.core.linear import PlainLinear
from thriftnet.core.norm import PlainBatchNorm2d, PlainGroupNorm, PlainLayerNorm
from thriftnet.core.probe import Size, failure, on_meta
from thriftnet.core.width import Width, WidthAware, WidthSpec, width_index, widths
from thriftnet.dynamic.gate import SplitPoint
from thriftnet.errors import ConfigError, IncompatibleModelError

Choice: TypeAlias = Width | Sequence[Width] | Mapping[str, Width]

PLAIN = (PlainConv2d, PlainLinear, PlainBatchNorm2d, PlainGroupNorm, PlainLayerNorm, SplitPoint)
NORMS = (PlainBatchNorm2d, PlainGroupNorm, PlainLayerNorm)


def width_slots(model: nn.Module) -> dict[str, list[int]]:
    """The places of a network, and the channels they give at each width, in the order of `widths`."""
    found: dict[str, list[int]] = {}
    for name, layer in _slim(model).items():
        if layer.width_spec is not None and _chooses(layer) and len(set(layer.width_spec.outs)) > 1:
            found.setdefault(layer.width_spec.slot or name, list(layer.width_spec.outs))
    return found


def groups(model: nn.Module, size: Size) -> list[tuple[str, ...]]:
    """Places whose widths can be chosen independently of those of other groups, the coarsest there are by name.

    What has one prefix belongs together, as a stage, when it can be narrowed alone; otherwise its parts are looked at. Those that
    cannot be narrowed alone, since their outputs are added to others, are one group.
    """
    everything = list(width_slots(model))
    if not everything:
        raise IncompatibleModelError(f"{type(model).__name__} has one width only: no part of it has a width to choose")
    alone: list[tuple[str, ...]] = []
    together: list[str] = []

    def look(names: list[str], depth: int) -> None:
        if len(names) * 2 <= len(everything) and _fits(model, names, size):
            alone.append(tuple(names))
        elif len(names) == 1:
            together.extend(names)
        else:
            for _, part in groupby(names, key=lambda name: name.split(".")[: depth + 1]):
                look(list(part), depth + 1)

    look(everything, 0)
    return [group for group in (*alone, tuple(together)) if group]


def _fits(model: nn.Module, names: Sequence[str], size: Size) -> bool:
    """Whether these places can be narrow while all others are wide."""
    last = len(widths(model)) - 1
    resolved = _resolve(model, {slot: 0 if slot in names else last for slot in width_slots(model)}, size)
    return isinstance(resolved, dict)


def assign(model: nn.Module, choice: Sequence[Width] | Mapping[str, Width], size: Size) -> None:
    """Give the places of ``model`` widths; its layers have one width each afterwards, for folding.

    Args:
        model: A network of plain layers of several widths.
        choice: A width for each of `groups`; or widths by regular expressions on the names of places, the first that is found
            counts, others stay at the largest.
        size: Channels, height and width of an image.

    Raises:
        ConfigError: Widths that do not exist, do not fit together, or names that match nothing.
        IncompatibleModelError: A layer that cannot have a width of its own.
    """
    _check_plain(model)
    indices = _indices(model, choice, size)
    resolved = _resolve(model, indices, size)
    if isinstance(resolved, Exception):
        raise ConfigError(
            f"these widths do not fit together: {str(resolved).splitlines()[0]}. Layers whose outputs are added or multiplied need "
            f"one width: {'; '.join(', '.join(group) for group in groups(model, size))}"
        )
    for name, layer in _slim(model).items():
        layer.width_spec, layer.width_index = resolved[name]


def _indices(model: nn.Module, choice: Sequence[Width] | Mapping[str, Width], size: Size) -> dict[str, int]:
    """Position of the width of each place."""
    possible = widths(model)
    if isinstance(choice, Mapping):
        chosen = {pattern: width_index(width, possible) for pattern, width in choice.items()}
        there = list(width_slots(model))
        for pattern in chosen:
            if not any(re.search(pattern, slot) for slot in there):
                raise ConfigError(f"{pattern!r} matches no place with a width. There are: {', '.join(there)}")
        first = {slot: [i for pattern, i in chosen.items() if re.search(pattern, slot)] for slot in there}
        return {slot: (found or [len(possible) - 1])[0] for slot, found in first.items()}
    together = groups(model, size)
    if len(choice) != len(together):
        listed = "; ".join(f"{number}: {', '.join(group)}" for number, group in enumerate(together))
        raise ConfigError(
            f"{len(choice)} widths, but {len(together)} parts can have a width of their own. They are {listed}"
        )
    return {slot: width_index(width, possible) for group, width in zip(together, choice, strict=True) for slot in group}


def _resolve(model: nn.Module, indices: Mapping[str, int], size: Size) -> dict[str, tuple[WidthSpec, int]] | Exception:
    """Channels in and out of every layer when places have these widths: found by running; or why that fails."""
    ghost = on_meta(model)
    resolved: dict[str, tuple[WidthSpec, int]] = {}

    def enter(layer: WidthAware, name: str, given: Tensor) -> None:
        if layer.width_spec is not None:
            slot = layer.width_spec.slot or name
            channels = given.shape[-1] if isinstance(layer, PlainLinear | PlainLayerNorm) else given.shape[-3]
            layer.width_spec, layer.width_index = resolved[name] = _at(layer, channels, indices.get(slot, -1))

    for name, layer in _slim(ghost).items():
        if isinstance(layer, SplitPoint):
            layer.body.register_forward_hook(lambda _, args, out, layer=layer, name=name: enter(layer, name, out))
        else:
            layer.register_forward_pre_hook(lambda layer, args, name=name: enter(layer, name, args[0]))
    error = failure(ghost, size)
    if error is not None:
        return error
    for name, layer in _slim(model).items():
        if layer.width_spec is not None:
            resolved.setdefault(name, (layer.width_spec, layer.width_index))  # it does not run
    return resolved


def _at(layer: WidthAware, ins: int, index: int) -> tuple[WidthSpec, int]:
    """A layer's one width when it reads ``ins`` channels; which of a norm's statistics it uses is kept."""
    width_spec = layer.width_spec
    if width_spec is None:
        raise IncompatibleModelError(f"{layer} has one width only")
    if isinstance(layer, NORMS):
        fitting = [i for i, outs in enumerate(width_spec.outs) if outs == ins]
        if not fitting:
            raise ConfigError(f"{type(layer).__name__} has statistics for {sorted({*width_spec.outs})} channels, got {ins}")
        return width_spec, index if index in fitting else fitting[0]
    if isinstance(layer, SplitPoint):
        return changed(width_spec, ins=(ins,) * len(width_spec.widths)), index
    if ins not in width_spec.ins:
        raise ConfigError(f"{type(layer).__name__} reads {sorted({*width_spec.ins})} channels, got {ins}")
    outs = width_spec.outs[index]
    if isinstance(layer, GeneratedConv2d) and layer.groups > 1:
        outs = ins * layer.out_channels // layer.in_channels
    return WidthSpec(("own",), (ins,), (outs,)), 0


def _chooses(layer: WidthAware) -> bool:
    """Whether a layer's outputs are a choice, and not as many as its inputs."""
    return not isinstance(layer, NORMS) and not (isinstance(layer, GeneratedConv2d) and layer.groups > 1)


def _slim(model: nn.Module) -> dict[str, WidthAware]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, WidthAware) and module.width_spec is not None and isinstance(module, (*PLAIN, GeneratedConv2d))
    }


def _check_plain(model: nn.Module) -> None:
    for name, module in model.named_modules():
        weighted = (
            isinstance(module, WidthAware) and module.width_spec is not None and any(True for _ in module.parameters())
        )
        if weighted and not isinstance(module, PLAIN):
            raise IncompatibleModelError(
                f"layer {name!r} is {type(module).__name__}: only plain layers can have widths of their own. Give all one width"
            )
