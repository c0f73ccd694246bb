"""Technique configs as text and JSON: ``soft-sharing(templates=4)``. Parsed by `ast.literal_eval`, never evaluated."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, TypeVar

from thriftnet.errors import ConfigError, unknown_name

T = TypeVar("T")


def spec_name(name: str) -> str:
    """``SoftSharing`` or "soft_sharing" -> "soft-sharing"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", name).lower().replace("_", "-")


def format_spec(config: object) -> str:
    """A config as text: its name and the fields that differ from their defaults; of a mapping, those of its entries."""
    if isinstance(config, Mapping):
        return repr({pattern: None if each is None else format_spec(each) for pattern, each in config.items()})
    fields = [field for field in dataclasses.fields(config) if field.init]  # type: ignore[arg-type]
    values = [(field.name, getattr(config, field.name), field.default) for field in fields]
    parts = [f"{name}={value!r}" for name, value, default in values if value != default or type(value) is not type(default)]
    return spec_name(type(config).__name__) + (f"({', '.join(parts)})" if parts else "")


def parse_spec(text: str, table: Mapping[str, type[T]]) -> T:
    """The config written as ``text``.

    Args:
        text: ``name`` or ``name(field=value, ...)``; CamelCase and underscores are understood in names.
        table: Possible configs by name.

    Raises:
        ConfigError: Malformed text, unknown name or field, or a value the config refuses.

    Example:
        >>> from thriftnet.techniques import TECHNIQUES
        >>> parse_spec("shift(expansion=3.0)", TECHNIQUES)
        Shift(kernel_size=None, dilation=None, expansion=3.0, init='weights', depthwise=True)
    """
    match = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if match is None:
        raise ConfigError(
            f"cannot read technique {text!r}: write it as name(field=value, ...), as soft-sharing(templates=4)"
        )
    try:
        call = ast.parse(f"f({match[2] or ''})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args or any(keyword.arg is None for keyword in call.keywords):
            raise ValueError("expected field=value only")
        names = [keyword.arg for keyword in call.keywords]
        if len(set(names)) < len(names):
            raise ValueError("a field is given twice")
        kwargs = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ConfigError(
            f"cannot read the fields of {text!r} ({str(error).partition(': <ast')[0]}): write them as field=value with plain values"
        ) from None
    return make(match[1], kwargs, table)


def parse_mapping(text: str) -> dict[str, Any]:
    """The mapping from regular expressions to techniques that is written as ``{'layer4': 'soft-sharing(templates=8)'}``.

    Raises:
        ConfigError: Malformed text, or a key that is no text.
    """
    try:
        mapping = ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        mapping = None
    if not isinstance(mapping, dict) or not all(isinstance(pattern, str) for pattern in mapping):
        raise ConfigError(
            f"cannot read {text!r}: write patterns and techniques as {{'layer4': 'soft-sharing(templates=8)', 'layer3': 'shift'}}"
        )
    return mapping


def from_dict(data: Mapping[str, Any], table: Mapping[str, type[T]]) -> T:
    """The config written as ``{"technique": name, field: value, ...}``."""
    if not isinstance(data.get("technique"), str):
        raise ConfigError(f"a technique in JSON needs a key 'technique' with its name; got keys {sorted(map(str, data))}")
    return make(data["technique"], {key: value for key, value in data.items() if key != "technique"}, table)


def to_dict(config: object) -> dict[str, Any]:
    """A config as JSON-ready dict, all fields included; of a mapping, those of its entries."""
    if isinstance(config, Mapping):
        return {pattern: None if each is None else to_dict(each) for pattern, each in config.items()}
    return {"technique": spec_name(type(config).__name__), **dataclasses.asdict(config)}  # type: ignore[call-overload]


def make(name: str, kwargs: Mapping[str, Any], table: Mapping[str, type[T]]) -> T:
    """Build the config called ``name``."""
    key = spec_name(name)
    if key not in table:
        raise unknown_name("technique", name, table)
    cls = table[key]
    expected = [field.name for field in dataclasses.fields(cls) if field.init]  # type: ignore[arg-type]
    for field in kwargs:
        if field not in expected:
            raise unknown_name(f"field of {key}", field, expected)
    return cls(**{field: _tuples(value) for field, value in kwargs.items()})


def _tuples(value: Any) -> Any:
    """Lists as tuples, so that configs stay hashable and JSON round trips are exact."""
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value
