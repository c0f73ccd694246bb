"""The config of a model file: its fields, how they are checked, and what it says of a network."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

from torch import nn

from thriftnet import __version__
from thriftnet.arguments import Classes, InputSize, Range, check, fits
from thriftnet.core.history import history
from thriftnet.core.provenance import FACTS, DataFacts, data_facts, stated_input_size
from thriftnet.core.tied import count_params, extra_state
from thriftnet.core.width import width, widths
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.models.table import IDENTITY
from thriftnet.store.sealed import NO_CHECKSUM, SEAL

MODEL, CONFIG, CARD = FILES = ("model.safetensors", "config.json", "README.md")
FORMAT = 1
MOST_STEPS = 1000

Config = dict[str, Any]


# how a plain network is built; a class would keep its types as text, which is evaluated in each check
Identity = TypedDict("Identity", {"name": str, "kwargs": dict[str, Any]})  # noqa: UP013


# What steps need, by their verb. Others need nothing; one that is not known is refused when it is repeated.
STEPS: dict[str, dict[str, Any]] = {
    "convert": {"plan": dict[str, Any]},
    "freeze": {},
    "add_gate": {"after": str},
    "replace_head": {"num_classes": Classes},
    "tie": {"groups": tuple[tuple[str, ...], ...]},
    "pack": {"input_size": InputSize},
}
FREEZE = {"verb", "width", "index", "fold_norms", "input_size", "prefer"}


def _is_history(value: list[dict[str, Any]]) -> bool:
    return len(value) <= MOST_STEPS and all(map(_is_step, value))


def _is_step(step: dict[str, Any]) -> bool:
    verb = step.get("verb")
    if not isinstance(verb, str) or (verb == "freeze" and not set(step) <= FREEZE):
        return False
    if not all(fits(step.get(name), hint) for name, hint in STEPS.get(verb, {}).items()):
        return False
    return verb != "convert" or isinstance(step["plan"].get("technique"), dict)


Number = Annotated[float, Range(-sys.float_info.max, sys.float_info.max), "a number"]
HISTORY = f"a list of at most {MOST_STEPS} steps, each an object with a verb and what it needs"
FIELDS: dict[str, Any] = {
    "thriftnet_version": str,
    "model": Annotated[Identity, "{name: text, kwargs: object}"] | None,
    "class": str,
    "history": list[dict[str, Any]],
    "width": Number | str | None,
    "params": Annotated[int, Range(0, 2**63)],
    **FACTS,
    "metrics": dict[str, Number | None] | None,
    "metadata": dict[str, Any],
    "extra_state": dict[str, Any],
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
    metrics = check("metrics", facts.pop("metrics", None), FIELDS["metrics"])
    return {
        SEAL: NO_CHECKSUM,
        "thriftnet_format": FORMAT,
        "thriftnet_version": __version__,
        "model": identity,
        "class": type(model).__name__,
        "history": history(model),
        "width": width(model) if widths(model) else None,
        "params": count_params(model),
        **DataFacts(**known).to_dict(),
        "metrics": metrics,
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
    return identity if fits(identity, Identity) else None


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
    for field, hint in FIELDS.items():
        if field not in config:
            raise CheckpointError(f"{path}: {field} is missing. Copy the file again")
        try:
            check(field, config[field], hint)
        except ConfigError as error:
            raise CheckpointError(f"{path}: {error}. Copy the file again") from None
    if not _is_history(config["history"]):
        raise CheckpointError(f"{path}: its history is not {HISTORY}. Copy the file again")
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
        elif name not in ("seed", "lambda_r") and type(value) in (int, float) and not abs(value) <= limit:
            raise CheckpointError(
                f"{path}: {name}={value} does not fit the {stored:,} numbers that it holds. Copy the file again"
            )
