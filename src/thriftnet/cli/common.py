"""What the verbs share: parsing, model arguments and printing."""

from __future__ import annotations

import ast
import json
import sys
from argparse import ArgumentError
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, Namespace

from thriftnet.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from torch import nn

MODEL_HELP = (
    "a name of the zoo, timm:NAME, torchvision:NAME, package.module:callable, hf-hub:OWNER/NAME, a saved folder, a run, "
    "or a checkpoint file"
)
KWARGS_HELP = "Further --key value options go to the function that builds the network, as --num-classes 100."


def new_parser(verb: str, description: str, *, takes_model: bool = False) -> ArgumentParser:
    """A parser for one verb, with ``--json``."""
    parser = ArgumentParser(
        prog=f"thriftnet {verb}", description=description, exit_on_error=False, epilog=KWARGS_HELP if takes_model else None
    )
    parser.add_argument("--json", action="store_true", help="print the result as JSON, as the last line")
    if takes_model:
        parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse, with one clear error for wrong use."""
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise ConfigError(f"{error.message}. See {parser.prog} --help") from None


def parse_with_kwargs(
    parser: ArgumentParser, arguments: Sequence[str], *, literals: bool = True
) -> tuple[Namespace, dict[str, Any]]:
    """Parse the verb's own options; all other ``--key value`` pairs are given back, as Python values or as texts."""
    known = {name for action in parser._actions for name in action.option_strings}
    own: list[str] = []
    kwargs: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if not word.startswith("--") or key in known:
            own.append(word)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise unknown_name("option", word, known)
            value = rest.pop(0)
        kwargs[key[2:].replace("-", "_")] = literal(value) if literals else value
    return parse(parser, own), kwargs


def literal(text: str) -> Any:
    """A plain Python value, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def quantity(option: str, text: str) -> float:
    """A number that may end in K, M or G.

    Example:
        >>> quantity("--macs", "1.5M")
        1500000.0
    """
    factor = {"K": 1e3, "M": 1e6, "G": 1e9}.get(text[-1:].upper(), 0.0)
    try:
        value = float(text[:-1]) * factor if factor else float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise ConfigError(f"{option} {text}: write a number greater than 0, as 300000000 or 300M")
    return value


def open_network(source: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """The network that a MODEL argument names."""
    from thriftnet.resolve import open_model

    return open_model(source, **kwargs)


def input_size(text: str | None, model: nn.Module) -> tuple[int, int, int]:
    """``3,32,32`` as numbers; left out, what the network says of itself, else (3, 224, 224)."""
    if text is None:
        stated = getattr(model, "default_cfg", None) or getattr(model, "pretrained_cfg", None) or {}
        size = tuple(stated.get("input_size", (3, 224, 224)))
    else:
        try:
            size = tuple(int(part) for part in text.split(","))
        except ValueError:
            size = ()
    if len(size) != 3 or min(size) < 1:
        raise ConfigError(f"--input-size {text}: write channels,height,width, as 3,32,32")
    return size[0], size[1], size[2]


def emit(text: str, result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result for people, or as one line of JSON."""
    sys.stdout.write((json.dumps(result) if as_json else text) + "\n")
