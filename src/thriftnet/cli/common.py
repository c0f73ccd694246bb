"""Shared by the verbs: parsing, and opening networks."""

from __future__ import annotations

import ast
import re
from argparse import SUPPRESS, Action, ArgumentParser, HelpFormatter, Namespace
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from thriftnet.arguments import as_path
from thriftnet.cli.coming_from import hint
from thriftnet.cli.options import OPTIONS
from thriftnet.cli.output import print_out, say
from thriftnet.errors import ConfigError, unknown_name
from thriftnet.models.table import all_kwargs, is_zoo_name

if TYPE_CHECKING:
    from torch import nn

KWARGS_HELP = (
    "Further --key value options go to the function that builds the network, as --num-classes 100. A saved network takes "
    "--num-classes, for a new classifier; a checkpoint file also takes hints, as --mapping strided."
)


class _Help(HelpFormatter):
    """Help with defaults, except None, False and 0."""

    def _get_help_string(self, action: Action) -> str:
        stated = action.default and action.default != SUPPRESS
        return f"{action.help} (default: %(default)s)" if stated else action.help or ""


ALIKE = 0.8  # of two words, from which one is taken for the other with a letter wrong


class Parser(ArgumentParser):
    """The options of one verb; ``names`` are those of `OPTIONS` that it takes, ``further`` those that others parse."""

    latest: ClassVar[Parser | None] = None  # of the command line that this process runs
    further: Callable[[], Iterable[str]] = staticmethod(tuple)

    def __init__(self, verb: str, description: str, *names: str) -> None:
        Parser.latest = self
        self.takes_model = "model" in names
        epilog = KWARGS_HELP if self.takes_model else None
        super().__init__(f"thriftnet {verb}", description=description, epilog=epilog, formatter_class=_Help)
        self.add_argument("--json", action="store_true", help="print the result as JSON, as the last line")
        self.add_shared(*names)

    def add_shared(self, *names: str, **changes: Any) -> None:
        """Add some of `OPTIONS`."""
        for name in names:
            self.add_argument(name, **OPTIONS[name] | changes)

    def print_help(self, file: object = None) -> None:
        """Print the help as all else."""
        print_out(self.format_help())

    def error(self, message: str) -> NoReturn:
        """Refuse wrong use in one line."""
        if message.startswith("unrecognized arguments: -"):
            raise unknown_option(message.split()[2], self.known)
        reason = re.sub("^argument (.+?): ", r"\1 ", message)
        raise ConfigError(f"{reason}. See {self.prog} --help")

    @property
    def known(self) -> set[str]:
        """Its options."""
        return set(self._option_string_actions)

    def misspelt(self, name: str) -> bool:
        """Whether an option is not known, and looks much like one that is; or has another project's name."""
        option = name if name.startswith("-") else _option(name)
        return option not in self.possible and bool(hint(option) or get_close_matches(option, self.possible, 1, ALIKE))

    @property
    def possible(self) -> set[str]:
        """Its options, and the further ones."""
        return {*self.known, *map(_option, self.further())}


def parse(parser: Parser, arguments: Sequence[str]) -> Namespace:
    """Parse the options of a verb that takes no further ones; close matches for unknown ones."""
    options, others = parse_with_kwargs(parser, arguments)
    if others:
        raise unknown_option(next(iter(others)), parser.known)
    return options


def parse_with_kwargs(
    parser: Parser, arguments: Sequence[str], *, literals: bool = True
) -> tuple[Namespace, dict[str, Any]]:
    """Parse the verb's own options, and return all other ``--key value`` pairs, as Python values or as text.

    argparse cannot do this: it takes the value of an unknown option for the next positional argument.

    Raises:
        ConfigError: Wrong use, or a pair that MODEL does not take, with close matches among options and arguments.
    """
    if any("\0" in word for word in arguments):
        raise ConfigError("an argument holds a NUL character: leave it out")
    own: list[str] = []
    kwargs: dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.partition("=")
        if not word.startswith("--") or _option(key[2:]) in parser.known:
            own.append(_option(key[2:]) + equals + value if word.startswith("--") else word)
            continue
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise unknown_option(word, parser.known)
            value = rest.pop(0)
        kwargs[key[2:].replace("-", "_")] = literal(value) if literals else value
    try:
        options = parser.parse_args(own)
    except ConfigError:  # what is missing may be there, misspelt or under another project's name
        for name in filter(parser.misspelt, (*kwargs, *(word for word in own if word.startswith("-")))):
            raise unknown_option(name, parser.possible) from None
        raise
    for name, value in vars(options).items():
        if value == "":
            raise ConfigError(
                f"{name if name in ('model', 'file', 'pattern') else _option(name)} is empty. See {parser.prog} --help"
            )
    if kwargs and parser.takes_model:
        _check_kwargs(getattr(options, "plain", None) or options.model, kwargs, parser.known)
    return options, kwargs


def _check_kwargs(source: str, kwargs: Mapping[str, Any], options: set[str]) -> None:
    """Refuse arguments that a saved network or one of the zoo does not take: they may be mistyped options."""
    accepted = accepted_kwargs(source)
    for name in kwargs:
        if accepted is not None and name not in accepted:
            raise unknown_option(name, options, accepted)


def did_you_mean(error: Exception) -> str:
    """What to add to an error of code of others, which was given an option that is none of thriftnet's: similar ones of these."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    close = get_close_matches(_option(found[1]), Parser.latest.possible, 3, ALIKE) if found and Parser.latest else ()
    return f". Did you mean {' or '.join(close)}?" if close else ""


def accepted_kwargs(source: str) -> set[str] | None:
    """Names of the arguments that the network called ``source`` takes; None if only the function that builds it knows."""
    path = as_path(source, "MODEL")
    if path.is_file():
        from thriftnet.importing.systems import known_hints

        return {"num_classes", *known_hints()}
    if source.startswith("hf-hub:") or path.exists():
        return {"num_classes"}
    return all_kwargs(source) if is_zoo_name(source) else None


def unknown_option(name: str, options: Iterable[str], kwargs: Iterable[str] = ()) -> ConfigError:
    """The error for an option that neither the verb nor the network has; it knows those of the original projects."""
    option = name if name.startswith("-") else _option(name)
    meaning = hint(option, same=True)
    if meaning:
        return ConfigError(f"unknown option {option!r}: {meaning}")
    return unknown_name("option", option, options, first=map(_option, kwargs))


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def literal(text: str) -> Any:
    """A plain Python value, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def chosen_width(options: Namespace) -> dict[str, Any]:
    """The keyword arguments of `set_width` and `freeze` for ``--width`` and ``--width-index``; empty if none is selected."""
    given = {"width": options.width, "index": options.width_index}
    chosen = {name: value for name, value in given.items() if value is not None}
    if len(chosen) == 2:
        raise ConfigError("--width and --width-index both select a width: give one of them")
    return chosen


def open_network(
    source: str, kwargs: Mapping[str, Any], plain: str | None = None, size: Sequence[int] | None = None
) -> nn.Module:
    """The network that MODEL names, for images of ``size`` where an author's name leaves a choice.

    Of a saved network that is not in the zoo, ``plain`` builds the plain one. A new classifier is announced.
    """
    from thriftnet.core.head import note_on
    from thriftnet.resolve import network_name, open_model

    if plain is not None:
        from thriftnet.store.model_file import load

        return load(source, model=open_model(plain, **kwargs))
    model = open_model(network_name(source, kwargs, size), **kwargs)
    if (note := note_on(model)) and "num_classes" in kwargs:
        say(f"thriftnet: {source}: {note}")
    return model
