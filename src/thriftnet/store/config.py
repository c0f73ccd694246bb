"""`config.json` of a model folder: its fields, how they are checked, and how older formats become the present one."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from torch import nn

from thriftnet import __version__
from thriftnet.core.history import history
from thriftnet.core.tied import count_params
from thriftnet.core.width import width, widths
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.models.entry import IDENTITY

FORMAT = 2
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FILES = (WEIGHTS, CONFIG, CARD)
TYPED = ("input_size", "normalisation", "class_names", "metrics")  # facts of `save`'s metadata with fields of their own
MOST_STEPS = 1000

Config = dict[str, Any]


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_count(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_object(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _is_list_of(check: Callable[[object], bool], value: object) -> bool:
    return isinstance(value, list) and all(map(check, value))


def _is_identity(value: object) -> bool:
    return isinstance(value, dict) and _is_text(value.get("name")) and _is_object(value.get("kwargs"))


def _is_width(value: object) -> bool:
    return _is_text(value) or (_is_number(value) and math.isfinite(value))  # type: ignore[arg-type]


def _is_step(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    verb = value.get("verb")
    if verb == "convert":
        return _is_object(value.get("plan")) and _is_object(value["plan"].get("technique"))
    if verb == "freeze":
        return _is_width(value.get("width"))
    if verb == "tie":
        return _is_list_of(lambda names: _is_list_of(_is_text, names), value.get("groups"))
    if verb == "pack":
        return _is_size(value.get("input_size"))
    return isinstance(verb, str)


def _is_history(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MOST_STEPS and all(map(_is_step, value))


def _is_size(value: object) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_count(side, 1) for side in value)


def _is_normalisation(value: object) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"mean", "std"}
        and all(_is_list_of(lambda x: _is_number(x) and math.isfinite(x), value[key]) for key in value)  # type: ignore[arg-type]
        and len(value["mean"]) == len(value["std"]) > 0
        and min(value["std"]) > 0
    )


def _is_metrics(value: object) -> bool:
    return _is_object(value) and all(entry is None or _is_number(entry) for entry in value.values())  # type: ignore[attr-defined]


def _is_hashes(value: object) -> bool:
    return (
        isinstance(value, dict)
        and WEIGHTS in value
        and all(_is_text(digest) and len(digest) == 64 for digest in value.values())
    )


def _or_null(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


# What each field of format 2 must be, and the same in words.
FIELDS: dict[str, tuple[Callable[[object], bool], str]] = {
    "thriftnet_version": (_is_text, "text"),
    "model": (_or_null(_is_identity), "null or {name: text, kwargs: object}"),
    "class": (_is_text, "text"),
    "history": (_is_history, f"a list of at most {MOST_STEPS} steps, each an object with a verb and what it needs"),
    "width": (_or_null(_is_width), "null, a number or text"),
    "params": (_is_count, "a whole number"),
    "input_size": (_or_null(_is_size), "null or [channels, height, width]"),
    "normalisation": (_or_null(_is_normalisation), "null or {mean: numbers, std: positive numbers}, equally many"),
    "class_names": (_or_null(lambda value: _is_list_of(_is_text, value)), "null or a list of text"),
    "metrics": (_or_null(_is_metrics), "null or an object of numbers and nulls"),
    "metadata": (_is_object, "an object"),
    "sha256": (_is_hashes, f"an object with a hash of each file, {WEIGHTS} among them"),
}


def _from_1(config: Config) -> Config:
    """Format 1 had all facts in its metadata, selected no width, and hashed the weights only."""
    metadata = config.get("metadata")
    known = dict(metadata) if isinstance(metadata, dict) else {}
    facts = {key: known.pop(key) if key in known and FIELDS[key][0](known[key]) else None for key in TYPED}
    return {**config, **facts, "width": None, "metadata": known}


MIGRATIONS: dict[int, Callable[[Config], Config]] = {1: _from_1}  # from each older format to the next


def described(model: nn.Module, metadata: Mapping[str, Any]) -> Config:
    """What `config.json` says of a network, but for the hashes.

    Raises:
        ConfigError: Metadata that is not JSON, or a typed fact of another type.
    """
    try:  # JSON has no NaN: what a failed training measured becomes null
        facts = json.loads(json.dumps(dict(metadata)), parse_constant=lambda _: None)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"metadata must be plain values that JSON can hold: {error}") from None
    if facts.get("input_size") is None:
        stated = getattr(model, "default_cfg", None)
        size = list(stated.get("input_size") or ()) if isinstance(stated, Mapping) else []
        facts["input_size"] = size if _is_size(size) else None
    typed = {key: facts.pop(key, None) for key in TYPED}
    for key, value in typed.items():
        if not FIELDS[key][0](value):
            raise ConfigError(f"metadata: {key}={value!r}; possible is {FIELDS[key][1]}")
    return {
        "thriftnet_format": FORMAT,
        "thriftnet_version": __version__,
        "model": _identity(model),
        "class": type(model).__name__,
        "history": history(model),
        "width": width(model) if widths(model) else None,
        "params": count_params(model),
        **typed,
        "metadata": facts,
    }


def _identity(model: nn.Module) -> Config | None:
    """How the network is built, if JSON can say it."""
    try:
        identity = json.loads(json.dumps(getattr(model, IDENTITY, None)))
    except (TypeError, ValueError, RecursionError):
        return None  # an argument is an object, as a layer class
    return identity if _is_identity(identity) else None


def read_config(place: str | Path) -> Config:
    """What a model folder's `config.json` says, in the present format.

    Raises:
        CheckpointError: Not a model folder, damaged, or of a newer format.
    """
    try:
        with open_regular(Path(place) / CONFIG) as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise no_folder(Path(place)) from None
    except OSError as error:
        raise CheckpointError(f"{Path(place) / CONFIG} cannot be read: {error.strerror or error}") from None
    return parse_config(text, Path(place))


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open a file of a folder for reading, without waiting for a pipe in its place.

    Raises:
        OSError: No file, or a device or pipe, which may never end.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | getattr(os, "O_NONBLOCK", 0))) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "it is a device or pipe, not a file")
        yield file


def no_folder(place: Path) -> CheckpointError:
    """The error for a place that holds no model folder."""
    return CheckpointError(f"{place} is no model folder: it has no {CONFIG}. Folders are written by thriftnet.save")


def parse_config(text: bytes, place: Path) -> Config:
    """The content of a `config.json`, every field checked."""
    where = place / CONFIG
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} cannot be read: {error}") from None
    version = config.get("thriftnet_format") if isinstance(config, dict) else None
    if not isinstance(version, int) or version < 1:
        raise CheckpointError(f"{where} is not of thriftnet: it has no thriftnet_format")
    if version > FORMAT:
        made_by = config.get("thriftnet_version", "a newer version")
        raise CheckpointError(
            f"{place} has format {version}, this version reads up to {FORMAT}: install thriftnet {str(made_by)[:40]}"
        )
    while version < FORMAT:
        config = MIGRATIONS[version](config)
        version += 1
    for field, (check, possible) in FIELDS.items():
        if field not in config or not check(config[field]):
            got = repr(config[field]) if field in config else "missing"
            raise CheckpointError(f"{where}: {field} is {got[:80]}; possible is {possible}. Copy the folder anew")
    return {**config, "thriftnet_format": FORMAT}


def check_sizes(config: Config, stored: int, place: Path) -> None:
    """Raise where an argument is out of all proportion to the weights, before anything is built with it.

    Args:
        config: The folder's config.
        stored: How many numbers the weights are.
        place: The folder, for the message.
    """
    limit = max(10_000, stored)
    asked: list[tuple[str, Any]] = [] if config["model"] is None else [("kwargs", config["model"]["kwargs"])]
    asked += [("technique", step["plan"]["technique"]) for step in config["history"] if step["verb"] == "convert"]
    while asked:
        name, value = asked.pop()
        if isinstance(value, dict):
            asked += value.items()
        elif isinstance(value, list):
            asked += [(name, entry) for entry in value]
        elif name not in ("seed", "lambda_r") and _is_number(value) and not abs(value) <= limit:
            raise CheckpointError(
                f"{place / CONFIG}: {name}={value} does not fit the {stored:,} numbers in {WEIGHTS}. Copy the folder anew"
            )
