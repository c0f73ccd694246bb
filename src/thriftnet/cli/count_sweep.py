"""`thriftnet count --sweep ...`: one network with all combinations of values of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from thriftnet.arguments import check, hints_of
from thriftnet.cli.common import accepted_kwargs, literal
from thriftnet.cli.output import write_text
from thriftnet.errors import ConfigError, ThriftnetError, unknown_name
from thriftnet.models.table import MODELS, builder, is_zoo_name, zoo_name
from thriftnet.report import plots
from thriftnet.text import table

if TYPE_CHECKING:
    from argparse import Namespace

    from thriftnet.measure import Report


def sweep_arguments(
    options: Namespace, kwargs: Mapping[str, Any], count: Callable[[Mapping[str, Any]], Report]
) -> tuple[str, dict[str, Any]]:
    """What ``count`` gives for each combination that the network takes, and the reasons of the others, as text and for JSON."""
    axes = _axes(options, kwargs)
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for values in product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        try:
            report = count({**kwargs, **chosen})
            rows.append({"arguments": chosen, "params": report.params, "macs": report.macs})
        except ThriftnetError as error:
            refused.append({"arguments": chosen, "reason": str(error)})
    if not rows:
        raise ConfigError(f"{options.model} takes none of these combinations: {refused[0]['reason']}")
    if options.plot is not None:
        write_text(options.plot, plots.sweep(rows))
    cells = [[*row["arguments"].values(), row["params"], row["macs"]] for row in rows]
    left_out = [f"left out: {plots.setting(row['arguments'])}: {row['reason']}" for row in refused]
    text = "\n".join([table([*axes, "parameters", "MACs"], cells), *left_out])
    return text, {"model": options.model, "sweep": rows, "refused": refused}


def _axes(options: Namespace, kwargs: Mapping[str, Any]) -> dict[str, Sequence[Any]]:
    """The values of each argument; one that the network does not take is refused, with close matches."""
    axes: dict[str, Sequence[Any]] = {}
    accepted = accepted_kwargs(options.model)
    known = accepted is not None and is_zoo_name(options.model)
    given = {text.partition("=")[0].replace("-", "_") for text in options.sweep} | {*kwargs}
    hints = hints_of(builder(MODELS[zoo_name(options.model, kwargs=given, size=options.input_size)])) if known else {}
    for text in options.sweep:
        option, _, values = text.partition("=")
        name = option.replace("-", "_")
        if not name or not values:
            raise ConfigError(f"--sweep {text}: expected an argument and its values, as shared_rank=8,16,32")
        if name in axes or name in kwargs:
            raise ConfigError(f"--sweep {text}: {name} is given twice")
        if accepted is not None and name not in accepted:
            raise unknown_name(f"argument of {options.model}", name, accepted)
        read = literal(f"({values},)")  # stays text where a value is not a literal, as projection
        axes[name] = read if isinstance(read, tuple) else [literal(value) for value in values.split(",")]
        for value in axes[name]:  # a mistyped one is no combination that the network refuses
            check(name, value, hints.get(name, Any))
    return axes
