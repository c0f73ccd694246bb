"""What a stored file holds: its tensors by name, and what it says of itself.

Authors write state dicts, dicts around state dicts, and whole pickled networks. The last arrive as inert stand-ins, whose
parameters are collected by walking them as data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.importing.inert import StandIn

WEIGHTS = ("state_dict", "net_state_dict", "model_state", "model_state_dict", "net", "model")  # in this order
AVERAGED = "state_dict_ema"
TRAINING = ("optim", "sched", "scaler", "recorder")  # in the names of training state
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile and training frameworks
MAX_MODULES = 100_000  # in a pickled network; more is a trap
MAX_DEPTH = 100  # of nested metadata and modules
MAX_PARTS = 1_000_000  # of one entry of metadata


@dataclass
class Contents:
    """Tensors and metadata of a file.

    Args:
        tensors: By the authors' names, without the prefixes of wrappers.
        metadata: Everything plain beside them, JSON-ready.
        notes: What was chosen or left out, a sentence each.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def contents(stored: Any, hints: Mapping[str, Any]) -> Contents:
    """Find the tensors in what a file holds.

    Args:
        stored: A state dict, a dict around one, or a stand-in for a pickled network.
        hints: The user's: ``ema`` chooses between weights and their moving average.

    Raises:
        CheckpointError: There are no weights in it.
        ConfigError: ``ema`` is no boolean, or asks for an average that the file lacks.
    """
    if _has_weights(stored):
        found = Contents(_tensors(stored), _attributes(stored) if isinstance(stored, StandIn) else {})
    elif isinstance(stored, Mapping) and (name := _choose(stored, hints)):
        found = _around(stored, name)
    else:
        raise CheckpointError(
            f"it holds no weights: {_seen(stored)}. Expected a state dict, alone or in a dict, or a network"
        )
    for prefix in PREFIXES * 3:
        if found.tensors and all(key.startswith(prefix) for key in found.tensors):
            found.tensors = {key.removeprefix(prefix): tensor for key, tensor in found.tensors.items()}
            found.notes.append(f"All keys began with {prefix!r}, of a wrapper: it was removed.")
    return found


def _choose(stored: Mapping[Any, Any], hints: Mapping[str, Any]) -> str | None:
    """The entry that holds the weights."""
    ema = hints.get("ema")
    if ema not in (None, True, False):
        raise ConfigError(f"ema={ema!r}: expected True or False")
    if ema and AVERAGED not in stored:
        raise ConfigError(f"ema=True: the file has no {AVERAGED}, only {', '.join(map(str, stored))}")
    names = [*WEIGHTS, AVERAGED] if ema is False else [AVERAGED, *WEIGHTS]
    return next((name for name in names if _has_weights(stored.get(name))), None)


def _around(stored: Mapping[Any, Any], chosen: str) -> Contents:
    """A dict with the weights in one of its entries."""
    found = Contents(_tensors(stored[chosen]))
    if chosen == AVERAGED:
        found.notes.append(
            f"The moving average of the weights ({AVERAGED}) was taken, which the authors evaluate; ema=False takes the others."
        )
    elif AVERAGED in stored:
        found.notes.append(f"The weights as trained were taken, not their moving average ({AVERAGED}).")
    left_out = []
    for key, value in stored.items():
        if key in (*WEIGHTS, AVERAGED) and _has_weights(value):
            found.metadata |= _attributes(value, str(key)) if isinstance(value, StandIn) else {}
            continue
        training = any(word in str(key) for word in TRAINING)
        plain = None if training else jsonable(value)
        if training or (plain is None and value is not None):
            left_out.append(str(key))
        else:
            found.metadata[str(key)] = plain
    if left_out:
        found.notes.append(f"Left out, as it belongs to training: {', '.join(sorted(left_out))}.")
    return found


def _has_weights(value: object) -> bool:
    """Whether it is a dict of tensors by name, or a pickled network."""
    if _is_module(value):
        return True
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(key, str) and _as_tensor(tensor) is not None for key, tensor in value.items())


def _is_module(value: object) -> bool:
    return isinstance(value, StandIn) and isinstance(value.state, Mapping) and "_modules" in value.state


def _tensors(weights: Any) -> dict[str, Tensor]:
    """The tensors of a state dict or pickled network."""
    if isinstance(weights, StandIn):
        return module_tensors(weights)
    return {key: tensor for key, value in weights.items() if (tensor := _as_tensor(value)) is not None}


def _as_tensor(value: object) -> Tensor | None:
    """A tensor; a parameter of an old torch may be a stand-in around one."""
    if isinstance(value, StandIn) and value.origin.rpartition(".")[2] in ("Parameter", "Variable"):
        value = next((part for part in value.args if isinstance(part, Tensor)), None)
    return value.detach() if isinstance(value, Tensor) else None


def module_tensors(network: StandIn) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled network under the names of its state dict.

    Raises:
        CheckpointError: Modules that contain themselves, or more of them than any network has.
    """
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, StandIn, int]] = [("", network, 0)]
    seen = 0
    while waiting:
        prefix, module, depth = waiting.pop()
        seen += 1
        if seen > MAX_MODULES or depth > MAX_DEPTH:
            raise CheckpointError("the pickled network nests modules without end: it is damaged, or made to do harm")
        skipped = _names(module.state.get("_non_persistent_buffers_set"))
        buffers = {name: value for name, value in _entries(module, "_buffers") if name not in skipped}
        for name, value in (*_entries(module, "_parameters"), *buffers.items()):
            tensor = _as_tensor(value)
            if tensor is not None:
                found[f"{prefix}{name}"] = tensor
        inside = [
            (f"{prefix}{name}.", child, depth + 1) for name, child in _entries(module, "_modules") if _is_module(child)
        ]
        waiting.extend(reversed(inside))
    if not found:
        raise CheckpointError("the pickled network has no parameters")
    return found


def _entries(module: StandIn, part: str) -> list[tuple[str, Any]]:
    """The items of one of a module's dicts, which may be a stand-in itself."""
    table = module.state.get(part)
    if isinstance(table, StandIn):
        table = table.items
    return [(str(name), value) for name, value in table.items()] if isinstance(table, Mapping) else []


def _names(values: object) -> set[str]:
    """The elements of a set of names, which may be a stand-in."""
    if isinstance(values, StandIn):
        values = [*values.elements, *(name for part in values.args if isinstance(part, list | tuple | set) for name in part)]
    return {str(value) for value in values} if isinstance(values, list | tuple | set | frozenset) else set()


def _attributes(network: StandIn, key: str = "net") -> dict[str, Any]:
    """Class and plain attributes of a pickled network, as metadata."""
    names = [name for name in network.state if not str(name).startswith("_") and name != "training"]
    plain = {str(name): value for name in names if (value := jsonable(network.state[name])) is not None}
    return {key: {"class": network.origin, **plain}}


def jsonable(value: Any, depth: int = 0) -> Any:
    """The value as JSON has it; None for what is not plain: tensors of more than one number, and objects but namespaces."""
    if depth > MAX_DEPTH or (depth == 0 and not _is_small(value)):
        return None
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Tensor):
        return jsonable(value.item()) if value.numel() == 1 and not value.is_complex() else None
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return jsonable(value.item(), depth + 1)
    if isinstance(value, StandIn) and value.origin == "argparse.Namespace":
        return jsonable(value.state or {}, depth + 1)
    if isinstance(value, Mapping):
        parts = [(str(key), jsonable(part, depth + 1), part) for key, part in value.items()]
        plain = {key: new for key, new, old in parts if new is not None or old is None}
        return plain if plain or not value else None
    if isinstance(value, list | tuple):
        items = [jsonable(part, depth + 1) for part in value]
        return None if any(new is None and old is not None for new, old in zip(items, value, strict=True)) else items
    return None


def _is_small(value: object) -> bool:
    """Whether it has at most `MAX_PARTS` parts: lists that hold one list twice have exponentially many."""
    waiting, seen = [value], 0
    while waiting and seen <= MAX_PARTS:
        part = waiting.pop()
        seen += 1
        if isinstance(part, StandIn):
            part = part.state
        if isinstance(part, Mapping | list | tuple):
            waiting.extend(part.values() if isinstance(part, Mapping) else part)
    return not waiting


def _seen(stored: object) -> str:
    """What was found instead of weights."""
    if isinstance(stored, Mapping):
        names = [str(name) for name in stored]
        return f"a dict with {', '.join(names[:8]) or 'nothing in it'}{', ...' if len(names) > 8 else ''}"
    if isinstance(stored, StandIn):
        return f"a {stored.origin}"
    if isinstance(stored, Tensor):
        return f"one tensor of shape {tuple(stored.shape)}"
    return f"a {type(stored).__name__}"
