"""The table of the zoo, read from ``zoo.yaml``: every network by name. Counts are stored facts that a test recomputes."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml

from thriftnet.models.entry import ModelEntry, Published


def _read() -> dict[str, ModelEntry]:
    """Entries by name, in the order of the file."""
    text = (files("thriftnet.models") / "zoo.yaml").read_text(encoding="utf-8")
    stated = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    entries = {}
    for group in stated["groups"]:
        common = {name: value for name, value in group.items() if name != "models"}
        for name, own in group["models"].items():
            entries[name] = _entry(stated["papers"], {**common, **own})
    return entries


def _entry(papers: dict[str, str], fields: dict[str, Any]) -> ModelEntry:
    family, function = fields.pop("builder").split(".")
    for name in ("fixed", "input_size", "aliases"):
        fields[name] = tuple(fields[name]) if name in fields else getattr(ModelEntry, name)
    fields["published"] = Published(**fields.get("published", {}))
    return ModelEntry(**{**fields, "family": family, "function": function, "paper": papers[fields["paper"]]})


def normalize_name(name: str) -> str:
    """The form in which names are compared: ``ResNet56_DoubleShared`` and ``resnet56_double_shared`` are the same."""
    return name.lower().replace("_", "").replace("-", "")


MODELS: dict[str, ModelEntry] = _read()
# every name and alias, normalized -> the name in MODELS
NAMES: dict[str, str] = {normalize_name(alias): name for name, entry in MODELS.items() for alias in (*entry.aliases, name)}
