"""What a network knows of its data: it travels with the network through every verb, into the model file and back."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from torch import nn

from thriftnet.errors import ConfigError

DATA = "thriftnet_data"  # attribute of a network: its `DataFacts`


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """How images become inputs, and what the outputs mean; None where it is unknown.

    Args:
        input_size: Channels, height and width.
        normalisation: ``mean`` and ``std``, a number per channel.
        class_names: Names of the outputs, in order.
        resize: Shorter side before the centre crop, in pixels.
        crop_pct: Share of the resized image that the crop keeps.
        eval_interpolation: How images are resized, as "bicubic".

    Raises:
        ConfigError: A value of another type.
    """

    input_size: tuple[int, int, int] | None = None
    normalisation: Mapping[str, tuple[float, ...]] | None = None
    class_names: tuple[str, ...] | None = None
    resize: int | None = None
    crop_pct: float | None = None
    eval_interpolation: str | None = None

    def __post_init__(self) -> None:
        for name, (holds, expected) in CHECKS.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ConfigError(f"{name}={value!r}; expected {expected}")
        for name in ("input_size", "class_names"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, tuple(getattr(self, name)))
        if self.normalisation is not None:
            normalisation = {key: tuple(map(float, self.normalisation[key])) for key in ("mean", "std")}
            object.__setattr__(self, "normalisation", normalisation)

    def to_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        facts: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return facts


def data_facts(model: nn.Module) -> DataFacts:
    """What the network knows of its data."""
    facts = getattr(model, DATA, None)
    return facts if isinstance(facts, DataFacts) else DataFacts()


def add_data_facts(model: nn.Module, facts: Mapping[str, Any]) -> None:
    """Tell a network of its data; a fact that is not among them stays, other keys are left out.

    Raises:
        ConfigError: A value of another type.
    """
    setattr(model, DATA, replace(data_facts(model), **{name: facts[name] for name in FACTS if name in facts}))


def stated_input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """The input size in a network's data facts, ``default_cfg`` (the zoo's networks) or ``pretrained_cfg`` (timm's)."""
    configs = [getattr(model, name, None) for name in ("default_cfg", "pretrained_cfg")]
    sizes = [data_facts(model).input_size, *(c.get("input_size") for c in configs if isinstance(c, Mapping))]
    return next(((size[0], size[1], size[2]) for size in sizes if size is not None and _is_size(size)), None)


def input_size_of(model: nn.Module, given: Sequence[int] | None = None) -> tuple[int, int, int]:
    """``given``, checked, or else the size that the network states.

    Raises:
        ConfigError: Not three integers >= 1, or neither is there.
    """
    if given is not None and not _is_size(given):
        raise ConfigError(
            f"input_size={given!r}: expected three integers >= 1 (channels, height, width), such as (3, 32, 32)"
        )
    size = stated_input_size(model) if given is None else given
    if size is None:
        raise ConfigError(
            f"{type(model).__name__} does not state its input size: give input_size=(C, H, W), such as "
            "input_size=(3, 224, 224), or --input-size 3,224,224 on the command line"
        )
    return size[0], size[1], size[2]


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_size(value: Any) -> bool:
    return _is_list(value) and len(value) == 3 and all(type(side) is int and side >= 1 for side in value)


def _is_normalisation(value: Any) -> bool:
    if not isinstance(value, Mapping) or set(value) != {"mean", "std"}:
        return False
    mean, std = value["mean"], value["std"]
    if not (_is_list(mean) and _is_list(std) and all(map(_is_number, (*mean, *std)))):
        return False
    return len(mean) == len(std) > 0 and min(std) > 0


FACTS = tuple(field.name for field in fields(DataFacts))
CHECKS: dict[str, tuple[Any, str]] = {
    "input_size": (_is_size, "[channels, height, width], integers >= 1"),
    "normalisation": (_is_normalisation, "{mean: numbers, std: positive numbers}, equally many"),
    "class_names": (lambda value: _is_list(value) and all(isinstance(name, str) for name in value), "a list of text"),
    "resize": (lambda value: type(value) is int and value >= 1, "an integer >= 1"),
    "crop_pct": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    "eval_interpolation": (lambda value: isinstance(value, str), "text"),
}
