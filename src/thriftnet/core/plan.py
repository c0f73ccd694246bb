"""A conversion before it is done: the layers and their groups, each layer's error, and the parameters saved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from thriftnet.core.spec import to_dict
from thriftnet.core.technique import Technique
from thriftnet.errors import ConfigError
from thriftnet.text import table

PLAN_FORMAT = 1


@dataclass(frozen=True)
class PlanRow:
    """One layer to be converted.

    Args:
        names: All names of the layer.
        layer: What it is now.
        becomes: What it will be.
        group: Number of the group it shares with; None for a module that is wrapped, not replaced, as by a gate.
        relative_error: Of its new weight, ``|new - old| / |old|``; None if the new layer is not a single convolution or
            linear layer.
    """

    names: tuple[str, ...]
    layer: str
    becomes: str
    group: int | None
    relative_error: float | None


@dataclass(frozen=True)
class Plan:
    """What `convert` would do. Prints as a table; ``convert(model, plan)`` does exactly this.

    Args:
        technique: The config, or its text or JSON form.
        model: Class name of the network.
        rows: The layers to be converted.
        left: (name, reason) of each convolution that stays as it is.
        params_before: Stored parameters of the network now, shared ones once.
        params_after: The same after the conversion.
        not_checked: What running the converted network beside the plain one could not check, and why.
    """

    technique: Technique | str | Mapping[str, Any]
    model: str
    rows: tuple[PlanRow, ...]
    left: tuple[tuple[str, str], ...] = ()
    params_before: int = 0
    params_after: int = 0
    not_checked: str = ""

    @property
    def groups(self) -> list[list[str]]:
        """First names of the layers, group by group."""
        groups: dict[int, list[str]] = {}
        for row in self.rows:
            if row.group is not None:
                groups.setdefault(row.group, []).append(row.names[0])
        return list(groups.values())

    def __str__(self) -> str:
        rows = [(row.names[0], row.layer, row.becomes, row.group, row.relative_error) for row in self.rows]
        text = table(["layer", "now", "becomes", "group", "relative error"], rows)
        if self.left:
            text += "\n\nleft alone:\n" + "\n".join(f"  {name}: {reason}" for name, reason in self.left)
        if self.not_checked:
            text += f"\n\nnot checked by running: {self.not_checked}"
        factor = self.params_before / max(1, self.params_after)
        change = f"{factor:.2f}x fewer" if factor >= 1 else f"{1 / factor:.2f}x MORE"
        return f"{text}\n\nstored parameters: {self.params_before:,} -> {self.params_after:,} ({change})"

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON-ready dict."""
        written = self.technique if isinstance(self.technique, str | Mapping) else to_dict(self.technique)
        fields = json.loads(json.dumps(asdict(replace(self, technique=""))))
        return {"plan_format": PLAN_FORMAT, **fields, "technique": written, "groups": self.groups}

    def to_json(self) -> str:
        """The plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The plan written by `to_dict`.

        Raises:
            ConfigError: Not a plan, or one of a newer format.
        """
        if data.get("plan_format") != PLAN_FORMAT:
            raise ConfigError(f"not a plan of format {PLAN_FORMAT}: plan_format is {data.get('plan_format')!r}")
        try:
            rows = tuple(PlanRow(**{**row, "names": tuple(row["names"])}) for row in data["rows"])
            left = tuple((str(name), str(reason)) for name, reason in data["left"])
            technique = data["technique"]
            counts = data["params_before"], data["params_after"]
            return cls(technique, data["model"], rows, left, *counts, str(data["not_checked"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"broken plan: {type(error).__name__} {error}. Make a new one with plan(...)") from None

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan written by `to_json`."""
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise ConfigError(f"a plan must be JSON: {error}") from None
        if not isinstance(data, dict):
            raise ConfigError(f"a plan must be a JSON object, got {type(data).__name__}")
        return cls.from_dict(data)
