"""Shared by the verbs: parsing, model arguments and printing."""

from __future__ import annotations

import ast
import json
import sys
from argparse import Action, ArgumentError
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from thriftnet.errors import ConfigError, unknown_name
from thriftnet.models import model_kwargs
from thriftnet.models.table import NAMES, normalize_name

if TYPE_CHECKING:
    from torch import nn

MODEL_HELP = (
    "a name of the zoo, timm:NAME, torchvision:NAME, package.module:callable, hf-hub:OWNER/NAME, a saved folder, a run, "
    "or a checkpoint file"
)
KWARGS_HELP = "Further --key value options go to the function that builds the network, as --num-classes 100."


class _Help(DefaultHelpFormatter):
    """jsonargparse's help, without "default: null" and the like."""

    def _get_help_string(self, action: Action) -> str:
        return super()._get_help_string(action) if action.default else action.help or ""


def new_parser(verb: str, description: str, *, takes_model: bool = False) -> ArgumentParser:
    """A parser for one verb, with ``--json``."""
    epilog = KWARGS_HELP if takes_model else None
    prog = f"thriftnet {verb}"
    parser = ArgumentParser(prog=prog, description=description, epilog=epilog, formatter_class=_Help, exit_on_error=False)
    parser.add_argument("--json", action="store_true", help="print the result as JSON, as the last line")
    if takes_model:
        parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    return parser


def parse(parser: ArgumentParser, arguments: Sequence[str]) -> Namespace:
    """Parse, with a one-line error for wrong use, and close matches for unknown options."""
    known = _options(parser)
    for word in arguments:
        option = word.partition("=")[0]
        if word.startswith("--") and word != "--" and not any(name.startswith(option) for name in known):
            raise unknown_name("option", option, known)
    try:
        return parser.parse_args(list(arguments))
    except ArgumentError as error:
        raise ConfigError(f"{error.message}. See {parser.prog} --help") from None


def parse_with_kwargs(
    parser: ArgumentParser, arguments: Sequence[str], *, literals: bool = True
) -> tuple[Namespace, dict[str, Any]]:
    """Parse the verb's own options, and return all other ``--key value`` pairs, as Python values or as text.

    argparse cannot do this: it takes the value of an unknown option for the next positional argument.

    Raises:
        ConfigError: Wrong use, or a pair that MODEL does not take, with close matches among options and arguments.
    """
    known = _options(parser)
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
    options = parse(parser, own)
    if kwargs and any(action.dest == "model" and not action.option_strings for action in parser._actions):
        _check_kwargs(options.get("plain") or options.model, kwargs, known)
    return options, kwargs


def _options(parser: ArgumentParser) -> set[str]:
    return {name for action in parser._actions for name in action.option_strings}


def _check_kwargs(source: str, kwargs: Mapping[str, Any], options: set[str]) -> None:
    """Refuse arguments that a saved network or one of the zoo does not take: they may be mistyped options."""
    saved = source.startswith("hf-hub:") or Path(source).exists()
    if not saved and normalize_name(source) not in NAMES:
        return  # the builder of another library or of the user's code knows
    possible = set() if saved else {f"--{name.replace('_', '-')}" for name in model_kwargs(source)}
    for key in kwargs:
        option = f"--{key.replace('_', '-')}"
        if option not in possible:
            where = f"option for the saved network {source}" if saved else "option"
            raise unknown_name(where, option, options | possible)


def add_convert_options(parser: ArgumentParser, *, required: bool = False) -> None:
    """``--technique`` and ``--select``: the arguments of `convert` and `plan`."""
    add = parser.add_argument
    add(
        "--technique",
        metavar="T",
        required=required,
        help="as 'soft-sharing(templates=2)'; docs/techniques lists the fields",
    )
    add("--select", metavar="REGEX", help="which layers, by name; default: all but the stem and the classifier")


def add_output(parser: ArgumentParser) -> None:
    """``--output``, required."""
    parser.add_argument("--output", metavar="FOLDER", required=True, help="where to save the network")


def add_width_options(parser: ArgumentParser) -> None:
    """``--width`` and ``--width-index``, which `chosen_width` reads."""
    add = parser.add_argument
    add("--width", metavar="W", help="of a slimmable network: one of its ratios, as 0.5, or smallest or largest")
    add("--width-index", type=int, metavar="I", help="instead: index into its list of widths, from 0")


def chosen_width(options: Namespace) -> dict[str, Any]:
    """The keyword arguments of `set_width` and `freeze` for these options; empty if no width is selected."""
    if options.width is not None and options.width_index is not None:
        raise ConfigError("--width and --width-index both select a width: give one of them")
    if options.width is not None:
        return {"width": width_from(options.width)}
    return {} if options.width_index is None else {"index": options.width_index}


def width_from(text: str) -> float | str:
    """A width as text: a ratio, or a name.

    Example:
        >>> width_from("0.5"), width_from("largest")
        (0.5, 'largest')
    """
    try:
        return float(text)
    except ValueError:
        return text.strip()


def check_positive(options: Namespace, *names: str) -> None:
    """Refuse integers below 1, by the name of their option; None is not checked.

    Raises:
        ConfigError: One is below 1.
    """
    for name in names:
        for value in options[name] if isinstance(options[name], list) else [options[name]]:
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} {value}: expected an integer >= 1")


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
        raise ConfigError(f"{option} {text}: expected a number > 0, as 300000000 or 300M")
    return value


def open_network(source: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """`open_model`, imported on first use."""
    from thriftnet.resolve import open_model

    return open_model(source, **kwargs)


def numbers(text: str, kind: type[int] | type[float], option: str, example: str) -> tuple[Any, ...]:
    """Comma-separated numbers."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} {text}: expected numbers with commas, as {example}") from None


def add_input_size(parser: ArgumentParser) -> None:
    """Add ``--input-size``, which `input_size` reads."""
    parser.add_argument(
        "--input-size", metavar="C,H,W", help="channels, height and width, as 3,32,32; default: the network's own"
    )


def input_size(options: Namespace, model: nn.Module) -> tuple[int, int, int]:
    """``--input-size``; by default the size that the network states."""
    from thriftnet.core.provenance import input_size_of

    text = options.input_size
    return input_size_of(model, None if text is None else numbers(text, int, "--input-size", "3,32,32"))


def write_text(path: str | Path, text: str) -> None:
    """Write a file.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None


def emit(text: str, result: Mapping[str, Any], *, as_json: bool) -> None:
    """Print a result for people, or as one line of JSON."""
    sys.stdout.write((json.dumps(result) if as_json else text) + "\n")
