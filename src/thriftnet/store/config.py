"""The config of a model file: its fields, how they are checked, and what it says of a network."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from thriftnet import __version__
from thriftnet.core.history import history
from thriftnet.core.provenance import CHECKS, FACTS, data_facts, stated_input_size
from thriftnet.core.tied import count_params, extra_state
from thriftnet.core.width import width, widths
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.models.table import IDENTITY

MODEL, CONFIG, CARD = FILES = ("model.safetensors", "config.json", "README.md")
FORMAT = 1
NO_CHECKSUM = "0" * 64  # while it is computed
MOST_STEPS = 1000

Config = dict[str, Any]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _is_object(value: object) -> bool:
    return isinstance(value, dict)  # JSON's keys are text


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(map(_is_text, value))


def _is_identity(value: object) -> bool:
    return isinstance(value, dict) and _is_text(value.get("name")) and _is_object(value.get("kwargs"))


def _is_width(value: Any) -> bool:
    return _is_text(value) or (_is_number(value) and math.isfinite(value))


# What steps need, by their verb. Others need nothing; one that is not known is refused when it is repeated.
STEPS: dict[str, Callable[[dict[str, Any]], bool]] = {
    "convert": lambda step: _is_object(step.get("plan")) and _is_object(step["plan"].get("technique")),
    "freeze": lambda step: set(step) <= {"verb", "width", "index", "fold_norms", "input_size"},
    "add_gate": lambda step: _is_text(step.get("after")),
    "replace_head": lambda step: type(step.get("num_classes")) is int and step["num_classes"] >= 1,
    "tie": lambda step: isinstance(step.get("groups"), list) and all(map(_is_names, step["groups"])),
    "pack": lambda step: CHECKS["input_size"][0](step.get("input_size")),
}


def _is_step(value: object) -> bool:
    if not (isinstance(value, dict) and _is_text(value.get("verb"))):
        return False
    return value["verb"] not in STEPS or STEPS[value["verb"]](value)


def _is_history(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MOST_STEPS and all(map(_is_step, value))


def _is_metrics(value: Any) -> bool:
    return _is_object(value) and all(entry is None or _is_number(entry) for entry in value.values())


def _or_null(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


# Each field: its check, and what the message says is expected.
FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "thriftnet_version": (_is_text, "text"),
    "model": (_or_null(_is_identity), "null or {name: text, kwargs: object}"),
    "class": (_is_text, "text"),
    "history": (_is_history, f"a list of at most {MOST_STEPS} steps, each an object with a verb and what it needs"),
    "width": (_or_null(_is_width), "null, a number or text"),
    "params": (lambda value: type(value) is int and value >= 0, "an integer >= 0"),
    **{name: (_or_null(holds), f"null or {expected}") for name, (holds, expected) in CHECKS.items()},
    "metrics": (_or_null(_is_metrics), "null or an object of numbers and nulls"),
    "metadata": (_is_object, "an object"),
    "extra_state": (_is_object, "an object"),
}


def describe(model: nn.Module, metadata: Mapping[str, Any], identity: Config | None) -> Config:
    """What the file says of a network: how its plain form is built, what was done to it, and the facts.

    The user's facts in ``metadata`` override what the network itself `tells <thriftnet.core.provenance.data_facts>`.

    Raises:
        ConfigError: Metadata that is not JSON, or a checked fact of another type.
        CheckpointError: The state dict holds something that is neither a tensor nor JSON.
    """
    try:  # JSON has no NaN: what a failed training measured becomes null
        facts = json.loads(json.dumps(dict(metadata)), parse_constant=lambda _: None)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"metadata must be plain values that JSON can hold: {error}") from None
    known = data_facts(model).to_dict() | {name: facts.pop(name) for name in FACTS if facts.get(name) is not None}
    if known["input_size"] is None and (size := stated_input_size(model)) is not None:
        known["input_size"] = list(size)
    checked = {**known, "metrics": facts.pop("metrics", None)}
    for key, value in checked.items():
        if not FIELDS[key][0](value):
            raise ConfigError(f"metadata: {key}={value!r}; expected {FIELDS[key][1]}")
    return {
        "sha256": NO_CHECKSUM,
        "thriftnet_format": FORMAT,
        "thriftnet_version": __version__,
        "model": identity,
        "class": type(model).__name__,
        "history": history(model),
        "width": width(model) if widths(model) else None,
        "params": count_params(model),
        **checked,
        "metadata": {key: value for key, value in facts.items() if key not in FACTS},
        "extra_state": {name: _as_json(name, value) for name, value in extra_state(model).items()},
    }


def _as_json(name: str, value: object) -> object:
    """What a module keeps besides its tensors, if JSON can hold it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        kind = type(value).__name__
        raise CheckpointError(
            f"the state dict's entry {name!r} is a {kind}: a model file holds parameters, buffers, and JSON. Make it a buffer"
        ) from None


def identity_of(model: nn.Module) -> Config | None:
    """How the plain form of a network is built, where it was made by name and JSON can say it."""
    try:
        identity = json.loads(json.dumps(getattr(model, IDENTITY, None)))
    except (TypeError, ValueError, RecursionError):
        return None  # an argument is an object, as a layer class
    return identity if _is_identity(identity) else None


def parse_config(text: str, path: Path) -> Config:
    """The config in a file, every field checked.

    Raises:
        CheckpointError: It is damaged, or of a newer format.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its config cannot be read: {error}") from None
    version = config.get("thriftnet_format") if isinstance(config, dict) else None
    if type(version) is not int or version < 1:
        raise CheckpointError(f"{path} is not of thriftnet: its config has no thriftnet_format")
    if version > FORMAT:
        made_by = config.get("thriftnet_version", "a newer version")
        raise CheckpointError(
            f"{path} has format {version}, this version reads up to {FORMAT}: install thriftnet {str(made_by)[:40]}"
        )
    for field, (check, expected) in FIELDS.items():
        if field not in config or not check(config[field]):
            got = repr(config[field]) if field in config else "missing"
            raise CheckpointError(f"{path}: {field} is {got[:80]}; expected {expected}. Copy the file again")
    return dict(config)


def check_sizes(config: Config, stored: int, path: Path) -> None:
    """Raise where an argument is out of all proportion to the numbers stored, before anything is built with it."""
    limit = max(10_000, stored)
    asked: list[tuple[str, Any]] = [] if config["model"] is None else [("kwargs", config["model"]["kwargs"])]
    asked += [("technique", step["plan"]["technique"]) for step in config["history"] if step["verb"] == "convert"]
    asked += [("num_classes", step["num_classes"]) for step in config["history"] if step["verb"] == "replace_head"]
    while asked:
        name, value = asked.pop()
        if isinstance(value, dict):
            asked += value.items()
        elif isinstance(value, list):
            asked += [(name, entry) for entry in value]
        elif name not in ("seed", "lambda_r") and _is_number(value) and not abs(value) <= limit:
            raise CheckpointError(
                f"{path}: {name}={value} does not fit the {stored:,} numbers that it holds. Copy the file again"
            )
