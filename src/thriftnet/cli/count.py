"""`thriftnet count`: parameters, MACs and bytes moved of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import (
    add_convert_options,
    add_input_size,
    emit,
    input_size,
    new_parser,
    open_network,
    parse_with_kwargs,
)
from thriftnet.errors import ConfigError
from thriftnet.models import MODELS, model_kwargs
from thriftnet.models.entry import IDENTITY
from thriftnet.models.table import NAMES, normalize_name

if TYPE_CHECKING:
    from torch import nn

    from thriftnet.measure.report import Report

TASK = ("num_classes", "in_chans")  # arguments that networks to be compared share


def run(arguments: Sequence[str]) -> None:
    parser = new_parser(
        "count", "Count parameters, MACs and bytes moved of a network, which --technique converts first.", takes_model=True
    )
    add_convert_options(parser)
    add_input_size(parser)
    parser.add_argument("--against", metavar="MODEL", help="a network to compare with; default: the plain one of the zoo")
    options, kwargs = parse_with_kwargs(parser, arguments)
    if options.select and not options.technique:
        raise ConfigError("--select chooses the layers that --technique converts: give both or neither")

    from thriftnet.measure import inspect
    from thriftnet.techniques import convert

    model = open_network(options.model, kwargs)
    size = input_size(options, model)
    if options.technique:
        model = convert(model, options.technique, select=options.select)
    report = inspect(model, size)
    text, result = str(report), report.to_dict()
    name, other_kwargs = _given(options.against, model) if options.against else _baseline(model)
    if name:
        other = inspect(open_network(name, other_kwargs), size)
        result["against"] = {
            "model": name,
            "kwargs": other_kwargs,
            "params": other.params,
            "macs": other.macs,
            "params_reduction": other.params / max(1, report.params),
            "macs_reduction": other.macs / max(1, report.macs),
        }
        what = name if options.against else f"plain {name}, the network that the paper starts from"
        text += f"\n\nagainst {what}:\n" + _sentence(report, other, name, "" if options.against else "plain ")
    emit(text, result, as_json=options.json)


def _given(name: str, model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The network to compare with and its arguments; one of the zoo gets the same classes and channels."""
    if normalize_name(name) not in NAMES:
        return name, {}
    ours = getattr(model, IDENTITY, {}).get("kwargs", {})
    return name, {key: ours[key] for key in TASK if key in ours and key in model_kwargs(name)}


def _baseline(model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The plain network that the zoo names for this one, with its arguments; "" when there is none."""
    identity = getattr(model, IDENTITY, {"name": ""})
    entry = MODELS.get(identity["name"])
    if entry is None or not entry.baseline:
        return "", {}
    possible = model_kwargs(entry.baseline)
    alike = {key: value for key, value in identity["kwargs"].items() if key in possible}
    return entry.baseline, {**alike, **entry.baseline_kwargs}


def _sentence(report: Report, other: Report, name: str, kind: str) -> str:
    """The comparison in one line."""
    return (
        f"parameters {report.params:,}, {kind}{name} {other.params:,}: {_factor(report.params, other.params)}; "
        f"MACs {report.macs:,}, {kind or f'{name} '}{other.macs:,}: {_factor(report.macs, other.macs)}"
    )


def _factor(ours: int, theirs: int) -> str:
    """How many times fewer or more, in words."""
    if ours == theirs:
        return "the same"
    return f"{theirs / max(1, ours):.2f}x fewer" if ours < theirs else f"{ours / max(1, theirs):.2f}x more"
