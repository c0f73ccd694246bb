"""What a stored file holds: its tensors by name, and what it says of itself.

Authors write state dicts, dicts around state dicts, and whole pickled networks. The latter arrive as inert stand-ins, whose
parameters are collected by walking them as data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.importing.unpickle import StandIn

WEIGHTS = ("state_dict", "net_state_dict", "model_state", "model_state_dict", "net", "model")  # in this order
AVERAGED = "state_dict_ema"
TRAINING = ("optim", "sched", "scaler", "recorder")  # in names of entries that continue a training
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile and training frameworks
MODULE_PARTS = 100_000  # modules in a pickled network; more is a trap
DEPTH = 100  # of nested metadata and modules


@dataclass
class Contents:
    """Tensors and metadata of a file.

    Args:
        tensors: By the authors' names, without the prefix of wrappers.
        metadata: Everything plain beside them, JSON-ready.
        notes: What was chosen or left out, a sentence each.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def contents(stored: Any, hints: Mapping[str, Any]) -> Contents:
    """Find the tensors in what a file holds.

    Args:
        stored: What was read: a state dict, a dict around one, or a stand-in for a pickled network.
        hints: The user's: ``ema`` chooses between weights and their moving average.

    Raises:
        CheckpointError: There are no weights in it.
    """
    if _is_module(stored):
        found = Contents(module_tensors(stored), {"net": _facts(stored)})
    elif isinstance(stored, Mapping) and (_is_state_dict(stored) or _place(stored, hints)):
        found = Contents(_tensors(stored)) if _is_state_dict(stored) else _around(stored, hints)
    else:
        raise CheckpointError(
            f"it holds no weights: {_seen(stored)}. Possible are state dicts, alone or in a dict, and networks"
        )
    found.tensors = _without_prefix(found.tensors, found.notes)
    return found


def _place(stored: Mapping[Any, Any], hints: Mapping[str, Any]) -> str | None:
    """The entry that holds the weights."""
    ema = hints.get("ema")
    if ema not in (None, True, False):
        raise ConfigError(f"ema={ema!r}: possible are True and False")
    if ema and AVERAGED not in stored:
        raise ConfigError(f"ema=True: the file has no {AVERAGED}, only {', '.join(map(str, stored))}")
    holds = [name for name in WEIGHTS if _is_state_dict(stored.get(name)) or _is_module(stored.get(name))]
    if AVERAGED in stored and _is_state_dict(stored[AVERAGED]) and (ema or ema is None or not holds):
        return AVERAGED
    return holds[0] if holds else None


def _around(stored: Mapping[Any, Any], hints: Mapping[str, Any]) -> Contents:
    """A dict with the weights in one of its entries."""
    name = str(_place(stored, hints))
    weights = stored[name]
    found = Contents(module_tensors(weights) if _is_module(weights) else _tensors(weights))
    if name == AVERAGED:
        found.notes.append(
            f"The moving average of the weights ({AVERAGED}) was taken, which the authors evaluate; ema=False takes the others."
        )
    elif AVERAGED in stored:
        found.notes.append(f"The weights as trained were taken, not their moving average ({AVERAGED}).")
    left_out = []
    for key, value in stored.items():
        if key in (*WEIGHTS, AVERAGED) and (_is_state_dict(value) or _is_module(value)):
            if _is_module(value):
                found.metadata[str(key)] = _facts(value)
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


def _is_state_dict(value: object) -> bool:
    """Whether it is a dict of tensors by name."""
    if not isinstance(value, Mapping) or not value:
        return False
    return all(isinstance(key, str) and _as_tensor(tensor) is not None for key, tensor in value.items())


def _is_module(value: object) -> bool:
    return isinstance(value, StandIn) and isinstance(value.state, Mapping) and "_modules" in value.state


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: tensor for key, value in state.items() if (tensor := _as_tensor(value)) is not None}


def _as_tensor(value: object) -> Tensor | None:
    """A tensor; a parameter of an old torch may be a stand-in around one."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, StandIn) and value.origin.rpartition(".")[2] in ("Parameter", "Variable"):
        inner = next((part for part in value.args if isinstance(part, Tensor)), None)
        return None if inner is None else inner.detach()
    return None


def module_tensors(network: StandIn) -> dict[str, Tensor]:
    """Parameters and buffers of a pickled network under the names of its state dict.

    Raises:
        CheckpointError: Modules that hold themselves, or more than any network has.
    """
    found: dict[str, Tensor] = {}
    waiting: list[tuple[str, StandIn, int]] = [("", network, 0)]
    seen = 0
    while waiting:
        prefix, module, depth = waiting.pop()
        seen += 1
        if seen > MODULE_PARTS or depth > DEPTH:
            raise CheckpointError("the pickled network nests modules without end: it is damaged, or made to do harm")
        state = module.state if isinstance(module.state, Mapping) else {}
        skipped = state.get("_non_persistent_buffers_set") or ()
        for part in ("_parameters", "_buffers"):
            for name, value in _entries(state.get(part)):
                tensor = _as_tensor(value)
                if tensor is not None and not (part == "_buffers" and name in _names(skipped)):
                    found[f"{prefix}{name}"] = tensor
        inside = [
            (f"{prefix}{name}.", child, depth + 1) for name, child in _entries(state.get("_modules")) if _is_module(child)
        ]
        waiting.extend(reversed(inside))
    if not found:
        raise CheckpointError("the pickled network has no parameters")
    return found


def _entries(table: object) -> list[tuple[str, Any]]:
    """The items of a dict, or of a stand-in for one."""
    if isinstance(table, StandIn):
        table = table.items
    return [(str(name), value) for name, value in table.items()] if isinstance(table, Mapping) else []


def _names(values: object) -> set[str]:
    if isinstance(values, StandIn):
        values = [
            *values.elements,
            *(value for part in values.args if isinstance(part, list | tuple | set) for value in part),
        ]
    return {str(value) for value in values} if isinstance(values, list | tuple | set | frozenset) else set()


def _facts(network: StandIn) -> dict[str, Any]:
    """Class and plain attributes of a pickled network."""
    facts: dict[str, Any] = {"class": network.origin}
    state = network.state if isinstance(network.state, Mapping) else {}
    for name, value in state.items():
        plain = jsonable(value) if not str(name).startswith("_") and name != "training" else None
        if plain is not None:
            facts[str(name)] = plain
    return facts


def _without_prefix(tensors: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Names without what wrappers put before all of them."""
    for prefix in PREFIXES * 3:
        if tensors and all(key.startswith(prefix) for key in tensors):
            tensors = {key[len(prefix) :]: tensor for key, tensor in tensors.items()}
            notes.append(f"All keys began with {prefix!r}, of a wrapper: it was removed.")
    return tensors


def jsonable(value: Any, depth: int = 0) -> Any:
    """The value as JSON has it; None for what is not plain: tensors of more than one number, and objects but namespaces."""
    if depth > DEPTH:
        return None
    if isinstance(value, bool | int | str):
        return value
    if isinstance(value, Tensor):
        return jsonable(value.item()) if value.numel() == 1 and not value.is_complex() else None
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return jsonable(value.item(), depth + 1)
    if isinstance(value, StandIn) and value.origin == "argparse.Namespace":
        return jsonable(value.state or {}, depth + 1)
    if isinstance(value, Mapping):
        parts = {str(key): jsonable(part, depth + 1) for key, part in value.items()}
        plain = {
            key: new
            for (key, new), old in zip(parts.items(), value.values(), strict=False)
            if new is not None or old is None
        }
        return plain if plain or not value else None
    if isinstance(value, list | tuple):
        items = [jsonable(part, depth + 1) for part in value]
        return None if any(new is None and old is not None for new, old in zip(items, value, strict=True)) else items
    return None


def _seen(stored: object) -> str:
    """What was found instead of weights."""
    if isinstance(stored, Mapping):
        names = [str(name) for name in stored]
        return f"a dict with {', '.join(names[:8]) or 'nothing in it'}{', ...' if len(names) > 8 else ''}"
    if isinstance(stored, StandIn):
        return f"a {stored.origin}"
    if isinstance(stored, torch.Tensor):
        return f"one tensor of shape {tuple(stored.shape)}"
    return f"a {type(stored).__name__}"
