"""`thriftnet models`: the zoo."""

from __future__ import annotations

from collections.abc import Sequence

from thriftnet.cli.common import emit, new_parser, parse
from thriftnet.errors import ConfigError
from thriftnet.models import MODELS, list_models
from thriftnet.text import table


def run(arguments: Sequence[str]) -> None:
    parser = new_parser("models", "List the networks of the zoo, with parameters and MACs at their paper's input size.")
    parser.add_argument("pattern", nargs="?", default="*", help="shell pattern, as 'resnet*'")
    options = parse(parser, arguments)
    names = list_models(options.pattern)
    if not names:
        raise ConfigError(f"no model matches {options.pattern!r}. Possible: {', '.join(list_models())}")
    rows = [(name, MODELS[name].params, MODELS[name].macs, MODELS[name].paper) for name in names]
    result = [dict(zip(("name", "params", "macs", "paper"), row, strict=True)) for row in rows]
    emit(table(["name", "params", "MACs", "paper"], rows), {"models": result}, as_json=options.json)
