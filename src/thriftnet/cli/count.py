"""`thriftnet count`: what a network costs."""

from __future__ import annotations

from collections.abc import Sequence

from thriftnet.cli.common import emit, input_size, new_parser, open_network, parse_with_kwargs


def run(arguments: Sequence[str]) -> None:
    parser = new_parser("count", "Count parameters, MACs and bytes moved of a network.", takes_model=True)
    parser.add_argument("--technique", help="convert first, as 'soft-sharing(templates=2)'")
    parser.add_argument("--select", help="with --technique: regular expression on layer names")
    parser.add_argument("--input-size", metavar="C,H,W", help="as 3,32,32; left out, what the network was made for")
    parser.add_argument("--against", metavar="MODEL", help="a network to compare with")
    options, kwargs = parse_with_kwargs(parser, arguments)

    from thriftnet.measure import inspect
    from thriftnet.techniques import convert

    model = open_network(options.model, kwargs)
    size = input_size(options.input_size, model)
    if options.technique:
        model = convert(model, options.technique, select=options.select)
    report = inspect(model, size)
    text, result = str(report), report.to_dict()
    if options.against:
        other = inspect(open_network(options.against, {}), size)
        result["against"] = {
            "model": options.against,
            "params": other.params,
            "macs": other.macs,
            "params_reduction": other.params / max(1, report.params),
            "macs_reduction": other.macs / max(1, report.macs),
        }
        text += (
            f"\n\nagainst {options.against}: {other.params:,} parameters ({other.params / max(1, report.params):.2f}x), "
            f"{other.macs:,} MACs ({other.macs / max(1, report.macs):.2f}x)"
        )
    emit(text, result, as_json=options.json)
