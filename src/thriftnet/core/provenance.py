"""What a network knows of its data: it travels with the network through every verb, into the model file and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, TypedDict, get_type_hints

from torch import nn

from thriftnet.arguments import Deviations, InputSize, Means, PositiveShare, Side, check, checked, fits
from thriftnet.errors import ConfigError

DATA = "thriftnet_data"  # attribute of a network: its `DataFacts`


# of each channel; a class would keep its types as text, which is evaluated in each check
Normalisation = TypedDict("Normalisation", {"mean": Means, "std": Deviations})  # noqa: UP013


@checked
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

    input_size: InputSize | None = None
    normalisation: Normalisation | None = None
    class_names: tuple[str, ...] | None = None
    resize: Side | None = None
    crop_pct: PositiveShare | None = None
    eval_interpolation: Literal["nearest", "bilinear", "bicubic"] | None = None

    def __post_init__(self) -> None:
        if self.normalisation is not None and len(self.normalisation["mean"]) != len(self.normalisation["std"]):
            raise ConfigError(f"normalisation={self.normalisation!r}: expected as many numbers in mean as in std")

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
    return next(((size[0], size[1], size[2]) for size in sizes if size is not None and fits(size, InputSize)), None)


def input_size_of(model: nn.Module, given: Sequence[int] | None = None) -> tuple[int, int, int]:
    """``given``, checked, or else the size that the network states.

    Raises:
        ConfigError: Not three integers >= 1, or neither is there.
    """
    size = stated_input_size(model) if given is None else check("input_size", given, InputSize)
    if size is None:
        raise ConfigError(
            f"{type(model).__name__} does not state its input size: give input_size=(C, H, W), such as "
            "input_size=(3, 224, 224), or --input-size 3,224,224 on the command line"
        )
    return size[0], size[1], size[2]


FACTS: dict[str, Any] = get_type_hints(DataFacts, include_extras=True)
