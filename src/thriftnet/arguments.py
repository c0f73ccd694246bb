"""What an argument may be: the one check of types and ranges at public borders, for functions, configs and options alike.

An annotation says it all: ``templates: Annotated[int, Range(1, 1024)]``. `checked` holds the arguments of a call against the
annotations, `check` a single value. Text among the metadata of `Annotated` replaces our words for what is expected.
"""

from __future__ import annotations

import ast
import collections.abc
import functools
import importlib
import inspect
import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from thriftnet.errors import ConfigError, unknown_name

T = TypeVar("T")
LONGEST = 60  # characters of a value in a message
LONGEST_NAME, LONGEST_PATH = 255, 4095  # of Linux and others


@dataclass(frozen=True)
class Range:
    """The numbers between two finite ones; metadata of ``Annotated[int, ...]`` or ``Annotated[float, ...]``.

    An integer is an int and no bool. For a float, integers will do; NaN and infinity are never within.

    Args:
        least, most: The ends.
        ends: Whether they belong to it, as in mathematics: "[]", "(]", "[)" or "()".
    """

    least: float
    most: float
    ends: Literal["[]", "(]", "[)", "()"] = "[]"

    def holds(self, value: object, kind: type) -> bool:
        """Whether a value is an ``int`` or ``float`` of this range."""
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            return False
        above = self.least <= value if self.ends[0] == "[" else self.least < value
        return above and (value <= self.most if self.ends[1] == "]" else value < self.most)

    def expected(self, kind: type) -> str:
        """In words."""
        name = "an integer" if kind is int else "a number"
        least, most = (f"{end:,}" if kind is int else f"{end:g}".replace("e+0", "e") for end in (self.least, self.most))
        if (self.ends == "(]" and self.most > 1) or most == "1e9":
            return f"{name} {'>=' if self.ends[0] == '[' else '>'} {least}, at most {most}"
        return (
            f"{name} from {least} to {most}"
            if self.ends == "[]"
            else f"{name} in {self.ends[0]}{least}, {most}{self.ends[1]}"
        )


# Numbers that several rooms take. The limits are far beyond what is of use, and small enough that nothing overflows.
Share = Annotated[float, Range(0, 1)]
PositiveShare = Annotated[float, Range(0, 1, "(]")]
ProperShare = Annotated[float, Range(0, 1, "[)")]
OpenShare = Annotated[float, Range(0, 1, "()")]
Weight = Annotated[float, Range(0, 1e9)]  # a factor, a rate, a number of epochs that need not be an integer
PositiveWeight = Annotated[float, Range(0, 1e9, "(]")]
Expansion = Annotated[float, Range(0, 1024, "(]")]  # channels inside, as a multiple of others
Reduction = Annotated[float, Range(1 / 1024, 1024)]
Factor = Annotated[int, Range(1, 1024)]  # of channels
Rank = Annotated[int, Range(0, 100_000)]
Templates = Annotated[int, Range(1, 10_000)]
Operations = Annotated[float, Range(0, 1e18, "(]")]  # multiply-accumulates of an image
Channels = Annotated[int, Range(1, 1_000_000)]
Classes = Annotated[int, Range(1, 1_000_000)]
ClassesOrNone = Annotated[int, Range(0, 1_000_000)]
ImageChannels = Annotated[int, Range(1, 1024)]
Side = Annotated[int, Range(1, 16_384)]  # of an image, in pixels
KernelSide = Annotated[int, Range(1, 1024)]
Step = Annotated[int, Range(1, 1024)]  # a stride, or the spacing of a kernel
Sides = Annotated[KernelSide | tuple[KernelSide, KernelSide], "an integer from 1 to 1,024, or two of them"]
Steps = Annotated[Step | tuple[Step, Step], "an integer from 1 to 1,024, or two of them"]
Depth = Annotated[int, Range(1, 2000)]
BatchSize = Annotated[int, Range(1, 1_000_000)]
Epochs = Annotated[int, Range(1, 1_000_000)]
Count = Annotated[int, Range(1, 1_000_000_000)]  # of images, batches, steps
Natural = Annotated[int, Range(0, 1_000_000_000)]  # a count that may be 0
Population = Annotated[int, Range(2, 1_000_000)]
Workers = Annotated[int, Range(0, 1024)]
Threads = Annotated[int, Range(1, 1024)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Index = Annotated[int, Range(-1_000_000, 1_000_000), "an index"]  # from the end of a list where it is negative
InputSize = Annotated[tuple[ImageChannels, Side, Side], "channels (1 to 1,024), height and width (1 to 16,384), as 3,32,32"]
Jitter = Annotated[float, Range(0, 1000)]  # a relative change
Padding = Annotated[int, Range(0, 16_384)]  # pixels
Means = Annotated[tuple[Share, ...], "numbers in [0, 1], one per channel"]
Deviations = Annotated[tuple[PositiveWeight, ...], "numbers > 0, one per channel"]
Pathlike = str | os.PathLike[str]

WORDS = {
    "str": "text",
    "bool": "True or False",
    "int": "an integer",
    "float": "a number",
    "NoneType": "None",
    "PathLike": "a path",
    "Module": "a network (torch.nn.Module), as create_model(...) gives it",
    "Tensor": "a tensor",
    "Callable": "a function",
    "Mapping": "a mapping",
    "dict": "a mapping",
    "Iterable": "an iterable",
}


def check(name: str, value: T, hint: Any) -> T:
    """The value, if it is what the annotation says; a list is taken for a tuple, and comes back as one.

    Raises:
        ConfigError: It is not: in one line what was got and what is expected.

    Example:
        >>> check("seed", -1, Seed)
        Traceback (most recent call last):
        thriftnet.errors.ConfigError: seed=-1: expected an integer from 0 to 4,294,967,295
    """
    for candidate in (value, _tuples(value)):
        if _fits(candidate, hint):
            return candidate
    if isinstance(value, str) and (names := [each for each in _choices(hint) if isinstance(each, str)]):
        raise unknown_name(name, shown(value)[1:-1], names)
    raise ConfigError(f"{name}={shown(value)}: expected {expected(hint)}")


def checked(function: T) -> T:
    """A function, or a class with the arguments of its ``__init__``, that checks the arguments it is given by their annotations.

    Signature and documentation stay. Annotations are looked at in the first call, so that nothing is imported for them before.
    """
    if isinstance(function, type):
        function.__init__ = checked(function.__init__)  # type: ignore[misc]
        return function
    call: Callable[..., Any] = function  # type: ignore[assignment]
    signature = inspect.signature(call)
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    hints = functools.cache(lambda: _hints(call))

    @functools.wraps(call)
    def checking(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return call(*args, **kwargs)  # Python says what is missing or too much
        for name, value in bound.arguments.items():
            if name in hints() and kinds[name] not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                bound.arguments[name] = check(name, value, hints()[name])
        return call(*bound.args, **bound.kwargs)

    checking.checks_arguments = hints  # type: ignore[attr-defined]
    return checking  # type: ignore[return-value]


def fits(value: object, hint: Any) -> bool:
    """Whether `check` takes a value."""
    return _fits(value, hint) or _fits(_tuples(value), hint)


def _fits(value: object, hint: Any) -> bool:
    typeguard = _typeguard()
    if isinstance(value, range) and value:  # its ends say as much as all of it, which may be endless
        least, most = sorted((value[0], value[-1]))
        value = range(least, most + 1, max(1, most - least))
    try:
        typeguard.check_type(value, hint, collection_check_strategy=typeguard.CollectionCheckStrategy.ALL_ITEMS)
    except (typeguard.TypeCheckError, RecursionError):
        return False
    return True


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function's or class's arguments."""
    return _hints(function.__init__ if isinstance(function, type) else function)  # type: ignore[misc]


def as_path(given: str | os.PathLike[str], name: str = "path", *, home: bool = False) -> Path:
    """A path that the system can look for, ``~`` replaced with ``home``.

    Raises:
        ConfigError: It is empty, too long, cannot be encoded, or names a home that does not exist.
    """
    text = os.fspath(check(name, given, Pathlike))
    problem = ""
    try:
        longest = max(map(len, os.fsencode(text).split(os.sep.encode())))
        path = Path(text).expanduser() if home else Path(text)
    except (UnicodeError, RuntimeError, TypeError):  # a lone surrogate; no such home; a path-like that gives bytes
        problem = "a path that the system knows"
    else:
        problem = "a path, not nothing" if not text else "a path without null characters" if "\0" in text else ""
        if longest > LONGEST_NAME or len(text) > LONGEST_PATH:
            problem = f"names of at most {LONGEST_NAME} bytes, a path of at most {LONGEST_PATH} characters"
    if problem:
        raise ConfigError(f"{name}={shown(given)}: expected {problem}")
    return path


def expected(hint: Any) -> str:
    """An annotation in words.

    Example:
        >>> expected(Annotated[int, Range(1, 4096)] | tuple[str, ...] | None)
        'an integer from 1 to 4,096, a list (text) or None'
    """
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        own = [extra for extra in args[1:] if isinstance(extra, str)]
        return own[0] if own else args[1].expected(args[0])
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}" if len(args) > 1 else repr(args[0])
    if origin in (Union, types.UnionType):
        parts = list(dict.fromkeys(map(expected, args)))
        return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"
    if origin is tuple and args[-1] is not Ellipsis:
        return f"{len(args)} values ({', '.join(map(expected, args))})"
    if origin in (dict, collections.abc.Mapping) and Any not in args:
        return f"a mapping ({' -> '.join(map(expected, args))})"
    name = getattr(origin or hint, "__name__", str(hint))
    if name in ("tuple", "list", "Sequence", "set", "frozenset"):
        return f"a list ({expected(args[0])})" if args else "a list"
    return WORDS.get(name, f"a {name}")


def shown(value: object) -> str:
    """A value in a message: plain ones as Python writes them, shortened; of others the class, since their text may be anything."""
    if isinstance(value, type):
        return f"<class {value.__name__}>"
    if type(value) not in (type(None), bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset):
        path = f" {os.fspath(value)!r}" if type(value).__module__ == "pathlib" else ""  # type: ignore[call-overload]
        return f"<{type(value).__name__}{path[:LONGEST]}>"
    try:
        text = repr(value[: LONGEST * 2] if isinstance(value, str | bytes) else value)
    except Exception:  # an integer of too many digits, or something inside that has no text
        return f"<{type(value).__name__}>"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 4]}...{text[-1]}"


@functools.cache
def _typeguard() -> Any:
    """typeguard, told about `Range`; imported on first use."""
    import typeguard

    def lookup(origin: Any, args: Any, extras: tuple[Any, ...]) -> Any:
        ranges = [extra for extra in extras if isinstance(extra, Range)]

        def is_within(value: object, *_: object) -> None:
            if not ranges[0].holds(value, origin):
                raise typeguard.TypeCheckError("is out of range")

        return is_within if ranges and origin in (int, float) else None

    typeguard.checker_lookup_functions.insert(0, lookup)
    return typeguard


def _tuples(value: Any) -> Any:
    """Lists as tuples, also those in a mapping; a list that contains itself stays as it is."""
    try:
        if isinstance(value, dict):
            return {key: _tuples(entry) for key, entry in value.items()}
        return tuple(map(_tuples, value)) if isinstance(value, list) else value
    except RecursionError:
        return value


def _choices(hint: Any) -> tuple[Any, ...]:
    """The values of a `Literal`, also of one among others."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(choice for each in get_args(hint) for choice in _choices(each))
    return get_args(hint) if get_origin(hint) is Literal else ()


def _hints(call: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function, those resolved that only type checkers import."""
    plain = inspect.unwrap(call)
    if isinstance(plain, functools.partial):
        plain = plain.func
    module = sys.modules[plain.__module__]
    try:
        return get_type_hints(plain, include_extras=True)
    except NameError:
        return get_type_hints(plain, {**vars(module), **_imports_for_checking(module)}, include_extras=True)


@functools.cache
def _imports_for_checking(module: types.ModuleType) -> dict[str, Any]:
    """What a module imports ``if TYPE_CHECKING``."""
    blocks = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.If)]
    wanted = [node for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING" for node in ast.walk(block)]
    return {
        alias.asname or alias.name: getattr(importlib.import_module(node.module), alias.name)
        for node in wanted
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
