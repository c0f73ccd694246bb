"""`thriftnet count`: parameters, MACs and bytes moved of a network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import Parser, emit, open_network, parse_with_kwargs
from thriftnet.errors import ConfigError
from thriftnet.models import MODELS
from thriftnet.models.entry import IDENTITY
from thriftnet.models.table import all_kwargs

if TYPE_CHECKING:
    from torch import nn

TASK = ("num_classes", "in_chans")  # arguments that networks to be compared share
DESCRIPTION = "Count parameters, MACs and bytes moved of a network, which --technique converts first."


def run(arguments: Sequence[str]) -> None:
    parser = Parser("count", DESCRIPTION, "model", "--technique", "--select", "--input-size")
    parser.add_argument("--against", metavar="MODEL", help="a network to compare with; default: the plain one of the zoo")
    options, kwargs = parse_with_kwargs(parser, arguments)
    if options.select and not options.technique:
        raise ConfigError("--select chooses the layers that --technique converts: give both or neither")

    from thriftnet.core.provenance import input_size_of
    from thriftnet.measure import inspect
    from thriftnet.techniques import convert

    model = open_network(options.model, kwargs, size=options.input_size)
    size = input_size_of(model, options.input_size)
    if options.technique:
        model = convert(model, options.technique, select=options.select)
    report = inspect(model, size)
    text, result = str(report), report.to_dict()
    name, other_kwargs = _compared_with(options.against, model)
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
        kind = "" if options.against else "plain "
        text += (
            f"\n\nagainst {kind}{name}{', the network that the paper starts from' if kind else ''}:\n"
            f"parameters {report.params:,}, {kind}{name} {other.params:,}: {_factor(report.params, other.params)}; "
            f"MACs {report.macs:,}, {kind or f'{name} '}{other.macs:,}: {_factor(report.macs, other.macs)}"
        )
    emit(text, result, as_json=options.json)


def _compared_with(against: str | None, model: nn.Module) -> tuple[str, dict[str, Any]]:
    """The network to compare with, by default the plain one that the zoo names ("" if none), and its arguments.

    One of the zoo gets the same classes and channels; the plain one all arguments that it shares with this network.
    """
    identity = getattr(model, IDENTITY, {})
    ours, entry = identity.get("kwargs", {}), MODELS.get(identity.get("name", ""))
    name, fixed = (entry.baseline, entry.baseline_kwargs) if entry else ("", {})
    if against is not None:
        name, fixed, ours = against, {}, {key: ours[key] for key in TASK if key in ours}
    possible = all_kwargs(name)
    compared = {**{key: value for key, value in ours.items() if key in possible}, **fixed}
    same = (
        against is None
        and name == identity.get("name")
        and all(ours.get(key, value) == value for key, value in fixed.items())
    )
    return ("", {}) if same else (name, compared)


def _factor(ours: int, theirs: int) -> str:
    """How many times fewer or more, in words."""
    if ours == theirs:
        return "the same"
    return f"{theirs / max(1, ours):.2f}x fewer" if ours < theirs else f"{ours / max(1, theirs):.2f}x more"
