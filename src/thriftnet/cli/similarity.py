"""`thriftnet similarity`: which layers of a network with soft sharing have learned the same mix of templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from thriftnet.arguments import PositiveShare
from thriftnet.cli.common import Parser, open_network, parse_with_kwargs
from thriftnet.cli.options import reads, svg_file
from thriftnet.cli.output import emit, write_text
from thriftnet.text import table

if TYPE_CHECKING:
    from thriftnet.techniques.soft_sharing import LayerSimilarity

DESCRIPTION = "Show how similar the layers of each template bank are, and which agree so well that they could be one layer."


def run(arguments: Sequence[str]) -> None:
    parser = Parser("similarity", DESCRIPTION, "model")
    add = parser.add_argument
    add("--plot", type=svg_file, metavar="FILE.svg", help="draw the matrices")
    threshold = "layers a, b agree if 2<a,b> / (|a|^2 + |b|^2) of their coefficients reaches it, in (0, 1]"
    add("--threshold", type=reads(PositiveShare), default=0.99, metavar="T", help=threshold)
    parser.add_shared("--output", required=False, help="save the network in which layers that agree are one")
    options, kwargs = parse_with_kwargs(parser, arguments)

    from thriftnet.core.tied import count_params
    from thriftnet.report import plots
    from thriftnet.store.model_file import save
    from thriftnet.techniques.soft_sharing import fold_recurrence, recurrences, similarity

    model = open_network(options.model, kwargs)
    banks, loops = similarity(model), recurrences(model, options.threshold)
    lines = [_text(bank, found) for bank, found in banks.items()]
    lines += [f"one layer at threshold {options.threshold:g}: {', '.join(names)}" for names in loops]
    if not loops:
        lines.append(f"no two layers agree at threshold {options.threshold:g}")
    matrices = {bank: (found.layers, found.matrix.tolist()) for bank, found in banks.items()}
    result: dict[str, Any] = {
        "model": options.model,
        "banks": {bank: {"layers": layers, "similarity": matrix} for bank, (layers, matrix) in matrices.items()},
        "threshold": options.threshold,
        "recurrences": loops,
    }
    if options.output is not None:
        tied = fold_recurrence(model, options.threshold)
        folder, before, after = save(tied, options.output), count_params(model), count_params(tied)
        lines.append(f"{folder}: {before:,} -> {after:,} stored parameters ({before / after:.2f}x)")
        result |= {"output": str(folder), "params_before": before, "params": after}
    if options.plot is not None:
        write_text(options.plot, plots.similarities(matrices))
    emit("\n".join(lines), result, as_json=options.json)


def _text(bank: str, found: LayerSimilarity) -> str:
    """The matrix; columns are numbered as its rows are."""
    numbers = [str(number) for number in range(1, len(found.layers) + 1)]
    cells = [[f"{value:.2f}" for value in row] for row in found.matrix.tolist()]
    rows = [[number, name, *row] for number, name, row in zip(numbers, found.layers, cells, strict=True)]
    return f"{bank}\n{table(['', 'layer', *numbers], rows)}\n"
