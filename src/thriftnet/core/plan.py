"""A conversion before it is done: the layers and their groups, each layer's error, and the parameters saved."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from thriftnet.arguments import checked
from thriftnet.core.spec import spec_name, to_dict
from thriftnet.core.technique import Technique
from thriftnet.errors import ConfigError
from thriftnet.text import table

PLAN_FORMAT = 1
COUNTS = ("params_before", "params_after", "macs_before", "macs_after", "size_bytes")


@dataclass(frozen=True)
class PlanRow:
    """One layer to be converted.

    Args:
        names: All names of the layer.
        layer: What it is now.
        becomes: What it will be.
        group: Number of the group it shares with; None for a module that is wrapped, not replaced, as by a gate.
        relative_error: Of its new weight and bias, ``|new - old| / |old|``; None if the new layer is not a single convolution or
            linear layer.
        output_error: The same of its outputs, less their means, for images, or for noise where no images were given and there is
            no error of the weight; None if it was not measured.
    """

    names: tuple[str, ...]
    layer: str
    becomes: str
    group: int | None
    relative_error: float | None
    output_error: float | None = None

    @property
    def error(self) -> float:
        """Of the outputs, if it was measured, else of the weight; 0 if neither was."""
        return next((error for error in (self.output_error, self.relative_error) if error is not None), 0.0)


@checked
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
        macs_before: Multiply-accumulates for one image now; None if they were not counted.
        macs_after: The same after the conversion.
        size_bytes: Of parameters and buffers after the conversion, as they are saved; None if they were not counted.
        not_checked: What running the converted network beside the plain one could not check, and why.
        then: What to do afterwards, with the converted network.
    """

    technique: Technique | str | Mapping[str, Any]
    model: str
    rows: tuple[PlanRow, ...]
    left: tuple[tuple[str, str], ...] = ()
    params_before: int = 0
    params_after: int = 0
    macs_before: int | None = None
    macs_after: int | None = None
    size_bytes: int | None = None
    not_checked: str = ""
    then: Plan | None = None

    @property
    def last(self) -> Plan:
        """The last of the plans that follow one another: its counts are those of the result."""
        return self if self.then is None else self.then.last

    @property
    def name(self) -> str:
        """The technique in one line, without patterns."""
        config = self.technique
        parts = config.values() if isinstance(config, Mapping) and "technique" not in config else [config]
        texts = dict.fromkeys(part if isinstance(part, str) else spec_name(type(part).__name__) for part in parts if part)
        return " + ".join(texts) + (f", then {self.then.name}" if self.then else "")

    @property
    def error(self) -> float:
        """Root mean square of the layers' errors; layers that stay as they are count as 0."""
        total = sum(row.error**2 for row in self.rows) / max(1, len(self.rows) + len(self.left))
        return math.sqrt(total + (self.then.error**2 if self.then else 0.0))

    @property
    def groups(self) -> list[list[str]]:
        """First names of the layers, group by group."""
        groups: dict[int, list[str]] = {}
        for row in self.rows:
            if row.group is not None:
                groups.setdefault(row.group, []).append(row.names[0])
        return list(groups.values())

    def __str__(self) -> str:
        rows = [(row.names[0], row.layer, row.becomes, row.group, row.relative_error, row.output_error) for row in self.rows]
        shown = 6 if any(row.output_error is not None for row in self.rows) else 5
        heads = ("layer", "now", "becomes", "group", "relative error", "of outputs")
        text = table(heads[:shown], [row[:shown] for row in rows])
        if self.left:
            reasons = dict.fromkeys(reason for _, reason in self.left)
            named = {reason: [name for name, why in self.left if why == reason] for reason in reasons}
            text += "\n\nleft alone:\n" + "\n".join(f"  {', '.join(names)}: {reason}" for reason, names in named.items())
        if self.not_checked:
            text += f"\n\nnot checked by running: {self.not_checked}"
        text += f"\n\nstored parameters: {_change(self.params_before, self.params_after)}"
        if self.macs_before is not None and self.macs_after is not None:
            text += f"\nMACs: {_change(self.macs_before, self.macs_after)}"
        if self.size_bytes is not None:
            text += f"\nbytes as saved: {self.size_bytes:,}"
        return text if self.then is None else f"{text}\n\nthen:\n\n{self.then}"

    def to_dict(self) -> dict[str, Any]:
        """The plan as a JSON-ready dict."""
        written = self.technique if isinstance(self.technique, str | dict) else to_dict(self.technique)
        fields = json.loads(json.dumps(asdict(replace(self, technique="", then=None))))
        then = None if self.then is None else self.then.to_dict()
        return {"plan_format": PLAN_FORMAT, **fields, "technique": written, "groups": self.groups, "then": then}

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
            counts = {name: data[name] for name in COUNTS}
            if not all(value is None or (type(value) is int and value >= 0) for value in counts.values()):
                raise ValueError(f"counts must be integers >= 0, got {counts}")
            then = None if data["then"] is None else cls.from_dict(data["then"])
            return cls(technique, data["model"], rows, left, **counts, not_checked=str(data["not_checked"]), then=then)
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


def _change(before: int, after: int) -> str:
    """Two counts, and how many times fewer the second is."""
    factor = before / max(1, after)
    same = "the same" if before == after else f"{factor:.2f}x fewer" if factor > 1 else f"{1 / factor:.2f}x MORE"
    return f"{before:,} -> {after:,} ({same})"
