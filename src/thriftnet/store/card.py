"""The model card: `README.md` of a model folder, as the Hub shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from thriftnet.core.spec import format_spec
from thriftnet.techniques import resolve
from thriftnet.text import printable, shortened

LONGEST = 60  # characters of a class's name


def model_card(config: Mapping[str, Any]) -> str:
    """The card of the network whose model file has this config."""
    identity = config["model"]
    name = identity["name"] if identity else config["class"]
    argument = "" if identity else ", model=plain_network"
    lines = [
        "---",
        "library_name: thriftnet",
        "pipeline_tag: image-classification",
        "tags: [image-classification, thriftnet]",
        "---",
        "",
        f"# {name}",
        "",
        f"{config['params']:,} stored parameters. Made with thriftnet {config['thriftnet_version']}.",
        "",
        *(f"- {_step(step)}" for step in config["history"]),
        *_facts(config),
        "",
        "```python",
        "import thriftnet",
        "",
        f'model = thriftnet.load("this/folder"{argument})  # or "hf-hub:owner/name"',
        "```",
        "",
    ]
    return "\n".join(lines)


def _step(step: Mapping[str, Any]) -> str:
    return f"convert: {format_spec(resolve(step['plan']['technique']))}" if step["verb"] == "convert" else step["verb"]


def _facts(config: Mapping[str, Any]) -> list[str]:
    """Lines on what the network reads, tells apart and reaches; those that are known."""
    facts: dict[str, Any] = {}
    if config["input_size"]:
        facts["input size"] = " x ".join(map(str, config["input_size"]))
    if config["normalisation"]:
        facts["normalisation"] = "mean {mean}, std {std}".format(**config["normalisation"])
    if config["class_names"]:
        names = config["class_names"]
        shown = ", ".join(shortened(name, LONGEST) for name in names[:10])
        facts["classes"] = f"{shown}, ... ({len(names)} in all)" if len(names) > 10 else shown
    facts |= {name: config[name] for name in ("resize", "crop_pct", "eval_interpolation") if config[name] is not None}
    facts |= {**(config["metrics"] or {}), **config["metadata"]}
    return [f"- {_line(key)}: {_line(value)}" for key, value in facts.items()]


def _line(value: Any) -> str:
    """A value on one line, as text or JSON."""
    text = value if isinstance(value, str) else json.dumps(value)
    return printable(" ".join(text.split()))
