"""`thriftnet count`: parameters, MACs and bytes moved of a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import Parser, open_network, parse_with_kwargs
from thriftnet.cli.options import svg_file
from thriftnet.cli.output import emit
from thriftnet.errors import ConfigError
from thriftnet.models import MODELS
from thriftnet.models.table import IDENTITY, ModelEntry, all_kwargs

if TYPE_CHECKING:
    from argparse import Namespace

    from torch import nn

    from thriftnet.measure import Report

TASK = ("num_classes", "in_chans")  # arguments that networks to be compared share
DESCRIPTION = "Count parameters, MACs and bytes moved of a network, which --technique converts first."


def run(arguments: Sequence[str]) -> None:
    parser = Parser("count", DESCRIPTION, "model", "--technique", "--select", "--input-size")
    add = parser.add_argument
    add("--against", metavar="MODEL", help="a network to compare with; default: the plain one of the zoo")
    sweep = "count with each of these values of an argument of the network; of several, with all combinations"
    add("--sweep", action="append", metavar="NAME=V,V", help=sweep)
    add("--plot", type=svg_file, metavar="FILE.svg", help="with --sweep: draw parameters and MACs over the first argument")
    options, kwargs = parse_with_kwargs(parser, arguments)
    if options.select and not options.technique:
        raise ConfigError("--select chooses the layers that --technique converts: give both or neither")
    if options.plot and not options.sweep:
        raise ConfigError("--plot draws what --sweep counts: give both or neither")
    if options.against and options.sweep:
        raise ConfigError("--against compares one network, and --sweep counts several: give one of them")
    if options.sweep:
        from thriftnet.cli.count_sweep import sweep_arguments

        text, result = sweep_arguments(options, kwargs, lambda chosen: _counted(options, chosen)[1])
    else:
        text, result = _one(options, kwargs)
    emit(text, result, as_json=options.json)


def _counted(options: Namespace, kwargs: Mapping[str, Any]) -> tuple[nn.Module, Report]:
    """The network that the options name, converted, and its counts."""
    from thriftnet.core.provenance import input_size_of
    from thriftnet.measure import inspect
    from thriftnet.techniques import convert

    model = open_network(options.model, kwargs, size=options.input_size)
    size = input_size_of(model, options.input_size)
    if options.technique:
        model = convert(model, options.technique, select=options.select)
    return model, inspect(model, size)


def _one(options: Namespace, kwargs: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """One network, compared with another, as text and for JSON."""
    from thriftnet.core.history import history
    from thriftnet.measure import inspect
    from thriftnet.measure.as_published import published_flops

    model, report = _counted(options, kwargs)
    lines, result = [str(report), ""], report.to_dict()
    identity = getattr(model, IDENTITY, {})
    ours = dict(identity.get("kwargs", {}))
    for step in history(model):
        if "num_classes" in step:  # a new classifier
            ours["num_classes"] = step["num_classes"]
    entry = MODELS.get(identity.get("name", ""))
    published = published_flops(report, entry.paper) if entry else None
    paper_line = "as the paper counts: {:,} FLOPs ({})".format(*published) if published else ""
    if published:
        result["published_flops"] = dict(zip(("flops", "definition"), published, strict=True))
    name, other_kwargs = _compared_with(options.against, entry, ours)
    if name:
        other = inspect(open_network(name, other_kwargs), report.input_size)
        result["against"] = {
            "model": name,
            "kwargs": other_kwargs,
            "params": other.params,
            "macs": other.macs,
            "params_reduction": other.params / max(1, report.params),
            "macs_reduction": other.macs / max(1, report.macs),
        }
        built = f"{name} ({', '.join(f'{key}={value!r}' for key, value in other_kwargs.items())})" if other_kwargs else name
        lines.append(
            f"{'against' if options.against else 'the plain network that the paper starts from,'} {built}: "
            f"{other.params:,} parameters: {_factor(report.params, other.params)}; "
            f"{other.macs:,} MACs: {_factor(report.macs, other.macs)}"
        )
        if published and entry and not options.against:
            plain = published_flops(other, entry.paper)
            result["against"]["published_flops"] = plain and plain[0]
            paper_line += ", the plain network {:,}".format(*plain or (0,))
    return "\n".join([*lines, paper_line]).rstrip(), result


def _compared_with(against: str | None, entry: ModelEntry | None, ours: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The network to compare with, by default the plain one that the zoo names ("" if none), and its arguments.

    One of the zoo gets the same classes and channels; the plain one all arguments that it shares with this network.
    """
    name, fixed = (entry.baseline, entry.baseline_kwargs) if entry else ("", {})
    if against is not None:
        name, fixed, ours = against, {}, {key: ours[key] for key in TASK if key in ours}
    possible = all_kwargs(name)
    compared = {**{key: value for key, value in ours.items() if key in possible}, **fixed}
    if against is None and MODELS.get(name) is entry and all(ours.get(key, value) == value for key, value in fixed.items()):
        return "", {}  # it is the plain network
    return name, compared


def _factor(ours: int, theirs: int) -> str:
    """How many times fewer or more, in words."""
    if ours == theirs:
        return "the same"
    return f"{theirs / max(1, ours):.2f}x fewer" if ours < theirs else f"{ours / max(1, theirs):.2f}x more"
