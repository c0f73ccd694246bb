"""Networks whose parts have different widths.

A *slot* is a layer, or several layers that must have equally many output channels, with a width of its own. Which slots belong
together is not read from the code: the network runs on the meta device, each layer takes as many inputs as arrive, and
incompatible shapes raise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any, TypeAlias

from torch import Tensor, nn

from thriftnet.arguments import Index
from thriftnet.core.patterns import matcher
from thriftnet.core.probe import Size, failure, on_meta
from thriftnet.core.width import Width, WidthAware, WidthSpec, width_index, widths
from thriftnet.errors import ConfigError, IncompatibleModelError

WidthChoice: TypeAlias = Width | Sequence[Width] | Mapping[str, Width]
IndexChoice: TypeAlias = Index | Sequence[Index] | Mapping[str, Index]


def width_slots(model: nn.Module) -> dict[str, list[int]]:
    """The slots of a network, and their output channels at each width, in the order of `widths`."""
    found: dict[str, list[int]] = {}
    for name, layer in _layers(model).items():
        if layer.width_spec is not None and layer.chooses_outs and len(set(layer.width_spec.outs)) > 1:
            found.setdefault(layer.width_spec.slot or name, list(layer.width_spec.outs))
    return found


def groups(model: nn.Module, size: Size) -> list[tuple[str, ...]]:
    """Slots whose widths can be chosen independently of those of other groups, as coarse as module names allow.

    Slots with a common prefix, such as a stage, form a group if they can be narrowed alone; otherwise smaller parts are tried.
    Slots that cannot be narrowed alone, since their outputs are added to others, form one group.

    Raises:
        IncompatibleModelError: The network has one width, or a layer that cannot have a width of its own.
    """
    slots = list(width_slots(model))
    if not slots:
        raise IncompatibleModelError(f"{type(model).__name__} has one width only: no part of it has a width to choose")
    alone: list[tuple[str, ...]] = []
    together: list[str] = []

    def split(names: list[str], depth: int) -> None:
        if len(names) * 2 <= len(slots) and _fits(model, names, size):
            alone.append(tuple(names))
        elif len(names) == 1:
            together.extend(names)
        else:
            for _, part in groupby(names, key=lambda name: name.split(".")[: depth + 1]):
                split(list(part), depth + 1)

    split(slots, 0)
    return [group for group in (*alone, tuple(together)) if group]


def _fits(model: nn.Module, names: Sequence[str], size: Size) -> bool:
    """Whether these slots can be narrow while all others are wide."""
    last = len(widths(model)) - 1
    resolved = _resolve(model, {slot: 0 if slot in names else last for slot in width_slots(model)}, size)
    return isinstance(resolved, dict)


def width_indices(
    available: tuple[Width, ...], width: WidthChoice | None = None, index: IndexChoice | None = None
) -> int | list[int] | dict[str, int]:
    """`width_index` of one width, or of each in a sequence or mapping."""
    given: Any = width if index is None else index
    if (width is None) != (index is None) and not isinstance(given, float | int | str):
        key = "width" if index is None else "index"
        if isinstance(given, Mapping):
            return {str(name): width_index(available, **{key: each}) for name, each in given.items()}
        if isinstance(given, Sequence):
            return [width_index(available, **{key: each}) for each in given]
    return width_index(available, width, index)  # type: ignore[arg-type]  # not a choice: one width, or an error


def assign(model: nn.Module, chosen: list[int] | dict[str, int], size: Size) -> None:
    """Give the slots of ``model`` widths, in place; its layers have one width each afterwards, for folding.

    ``chosen`` has one index for each of `groups`; or indices by regular expressions on the names of slots, where the first match
    counts and other slots stay at the largest.

    Raises:
        ConfigError: Widths that do not fit together, or names that match nothing.
        IncompatibleModelError: A layer that cannot have a width of its own.
    """
    resolved = _resolve(model, _by_slot(model, chosen, size), size)
    if isinstance(resolved, Exception):
        raise ConfigError(
            f"these widths do not fit together: {str(resolved).splitlines()[0]}. Layers whose outputs are added or multiplied need "
            f"one width: {'; '.join(', '.join(group) for group in groups(model, size))}"
        )
    for name, layer in _layers(model).items():
        layer.width_spec, layer.width_index = resolved[name]


def _by_slot(model: nn.Module, chosen: list[int] | dict[str, int], size: Size) -> dict[str, int]:
    """The chosen width of each slot."""
    if isinstance(chosen, dict):
        slots = list(width_slots(model))
        found = {pattern: matcher(pattern) for pattern in chosen}
        for pattern in chosen:
            if not any(map(found[pattern], slots)):
                raise ConfigError(
                    f"{pattern!r} matches no layer with a width of its own; expected one of {', '.join(slots)}"
                )
        last = len(widths(model)) - 1
        return {slot: next((i for pattern, i in chosen.items() if found[pattern](slot)), last) for slot in slots}
    parts = groups(model, size)
    if len(chosen) != len(parts):
        listed = "; ".join(f"{number}: {', '.join(part)}" for number, part in enumerate(parts))
        raise ConfigError(
            f"got {len(chosen)} widths, expected {len(parts)}, one for each part that can have its own: {listed}"
        )
    return {slot: index for part, index in zip(parts, chosen, strict=True) for slot in part}


def _resolve(model: nn.Module, indices: Mapping[str, int], size: Size) -> dict[str, tuple[WidthSpec, int]] | Exception:
    """Widths of every layer when the slots have these, found by running; or why it does not run."""
    ghost = on_meta(model)
    resolved: dict[str, tuple[WidthSpec, int]] = {}

    def enter(layer: WidthAware, name: str, x: Tensor) -> None:
        if name not in resolved and layer.width_spec is not None:
            layer.width_index = indices.get(layer.width_spec.slot or name, -1)
        layer.width_spec, layer.width_index = found = layer.width_for(x.shape[layer.channel_axis], layer.width_index)
        if resolved.setdefault(name, found) != found:
            raise ConfigError(f"layer {name!r} runs at two widths")

    for name, layer in _layers(ghost).items():
        layer.register_forward_pre_hook(lambda layer, args, name=name: enter(layer, name, args[0]))
    error = failure(ghost, size)
    if error is not None:
        return error
    for name, layer in _layers(model).items():
        if layer.width_spec is not None:
            resolved.setdefault(name, (layer.width_spec, layer.width_index))  # it does not run
    return resolved


def _layers(model: nn.Module) -> dict[str, WidthAware]:
    """Layers that can have a width of their own; raises if another layer with parameters has several widths."""
    found: dict[str, WidthAware] = {}
    for name, module in model.named_modules():
        if not isinstance(module, WidthAware) or module.width_spec is None:
            continue
        if module.standalone:
            found[name] = module
        elif any(True for _ in module.parameters()):
            raise IncompatibleModelError(
                f"layer {name!r} is {type(module).__name__}: only plain layers can have widths of their own. Give all one width"
            )
    return found
