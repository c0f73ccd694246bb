"""What a stored file holds: its tensors by name, and what it says of itself.

Authors write state dicts, dicts around state dicts, and whole pickled networks, which arrive as inert stand-ins. The reader has
bounded how much there is and how deep it goes, and what it gives is a tree: a walk over it comes to an end.
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
MAX_NAME = 1000  # of a module, which is repeated in front of the name of every tensor in it


@dataclass
class Contents:
    """Tensors of a file by the authors' names, without the prefixes of wrappers; plain metadata, and notes for the user."""

    tensors: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def contents(stored: Any, hints: Mapping[str, Any]) -> Contents:
    """Find the tensors in what `read_file <thriftnet.importing.files.read_file>` gives.

    Raises:
        CheckpointError: There are no weights in it.
        ConfigError: The hint ``ema`` is no boolean, or asks for an average that the file lacks.
    """
    if _has_weights(stored):
        found = Contents(_tensors(stored), _attributes(stored, "net"))
    elif isinstance(stored, dict) and (name := _choose(stored, hints)):
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


def _choose(stored: dict[str, Any], hints: Mapping[str, Any]) -> str | None:
    """The entry that holds the weights."""
    ema = hints.get("ema")
    if ema not in (None, True, False):
        raise ConfigError(f"ema={ema!r}: expected True or False")
    if ema and AVERAGED not in stored:
        raise ConfigError(f"ema=True: the file has no {AVERAGED}, only {', '.join(stored)}")
    names = [*WEIGHTS, AVERAGED] if ema is False else [AVERAGED, *WEIGHTS]
    return next((name for name in names if _has_weights(stored.get(name))), None)


def _around(stored: dict[str, Any], chosen: str) -> Contents:
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
            found.metadata |= _attributes(value, key)
            continue
        training = any(word in key for word in TRAINING)
        plain = None if training else jsonable(value)
        if training or (plain is None and value is not None):
            left_out.append(key)
        else:
            found.metadata[key] = plain
    if left_out:
        found.notes.append(f"Left out, as it belongs to training: {', '.join(sorted(left_out))}.")
    return found


def _has_weights(value: object) -> bool:
    """Whether it is a dict of tensors by name, or a pickled network."""
    if isinstance(value, dict) and value:
        return all(isinstance(tensor, Tensor) for tensor in value.values())
    return _is_module(value)


def _is_module(value: object) -> bool:
    return isinstance(value, StandIn) and isinstance(value.state, dict) and "_modules" in value.state


def _tensors(weights: Any) -> dict[str, Tensor]:
    """The tensors of a state dict or pickled network."""
    found = module_tensors(weights) if isinstance(weights, StandIn) else dict(weights)
    if not found:
        raise CheckpointError("the pickled network has no parameters")
    return found


def module_tensors(module: StandIn, prefix: str = "") -> dict[str, Tensor]:
    """Parameters and buffers of a pickled network under the names of its state dict."""
    if len(prefix) > MAX_NAME:
        raise CheckpointError(f"a module in it has a name of {len(prefix)} characters: it is damaged, or made to do harm")
    skipped = module.state.get("_non_persistent_buffers_set")
    names = set(map(str, skipped)) if isinstance(skipped, list) else set()
    owned = {**_entries(module, "_parameters"), **_entries(module, "_buffers")}
    found = {f"{prefix}{name}": tensor for name, tensor in owned.items() if isinstance(tensor, Tensor) and name not in names}
    for name, child in _entries(module, "_modules").items():
        if _is_module(child):
            found |= module_tensors(child, f"{prefix}{name}.")
    return found


def _entries(module: StandIn, part: str) -> dict[str, Any]:
    """One of a module's dicts, which may be a stand-in itself."""
    table = module.state.get(part)
    table = table.items if isinstance(table, StandIn) else table
    return table if isinstance(table, dict) else {}


def _attributes(weights: StandIn | dict[str, Any], key: str) -> dict[str, Any]:
    """Class and plain attributes of a pickled network, as metadata under this key."""
    if not isinstance(weights, StandIn):
        return {}
    names = [name for name in weights.state if not name.startswith("_") and name != "training"]
    plain = {name: value for name in names if (value := jsonable(weights.state[name])) is not None}
    return {key: {"class": weights.origin, **plain}}


def jsonable(value: Any) -> Any:
    """The value as JSON has it; None for what is not plain: tensors of more than one number, and objects but namespaces."""
    if isinstance(value, int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, Tensor):
        return jsonable(value.item()) if value.numel() == 1 else None
    if isinstance(value, StandIn) and value.origin == "argparse.Namespace":
        return jsonable(value.state or {})
    if isinstance(value, dict):
        plain = {key: new for key, part in value.items() if (new := jsonable(part)) is not None or part is None}
        return plain if plain or not value else None
    if isinstance(value, list):
        items = [jsonable(part) for part in value]
        return None if any(new is None and old is not None for new, old in zip(items, value, strict=True)) else items
    return None


def _seen(stored: object) -> str:
    """What was found instead of weights."""
    if isinstance(stored, dict):
        return f"a dict with {', '.join([*stored][:8]) or 'nothing in it'}{', ...' if len(stored) > 8 else ''}"
    if isinstance(stored, StandIn):
        return f"a {stored.origin}"
    if isinstance(stored, Tensor):
        return f"one tensor of shape {tuple(stored.shape)}"
    return f"a {type(stored).__name__}"
