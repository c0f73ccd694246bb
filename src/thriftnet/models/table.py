"""The table of the zoo, read from ``zoo.yaml``: every network by name. Counts are stored facts that a test recomputes."""

from __future__ import annotations

import importlib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from types import MappingProxyType
from typing import Any

import yaml

from thriftnet.errors import ConfigError, unknown_name

IDENTITY = "thriftnet_model"  # attribute of a network: the name and kwargs that rebuild it


@dataclass(frozen=True)
class Published:
    """What the authors state.

    Args:
        params: Parameters, as written, as "0.24M".
        flops: FLOPs or multiply-adds, as written, as "0.16G".
        top1: Top-1 accuracy in percent, by data set.
        top5: Top-5 accuracy in percent, by data set, where they state it.
        note: Why their figures differ from ours, where they do.
    """

    params: str = ""
    flops: str = ""
    top1: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    top5: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    note: str = ""


@dataclass(frozen=True)
class ModelEntry:
    """One network of the zoo.

    Args:
        family: Module in `thriftnet.models` that builds it.
        function: Function or class in that module.
        paper: Where it comes from.
        params: Stored parameters with default arguments.
        macs: Executed multiply-accumulates at batch 1 and ``input_size``.
        technique: Name of the technique in it, "" for a plain network.
        kwargs: Arguments that make this member of the family.
        fixed: Those of them that a user cannot change.
        input_size: (C, H, W) that the MACs are for.
        aliases: Further names, as the authors' own.
        published: What the authors state.
        note: One line on what differs from the authors' code, or that it is ours.
        baseline: Name of the plain network that it is compared with, "" for none.
        baseline_kwargs: Arguments of that network; those of its others that both have follow the user's.
    """

    family: str
    function: str
    paper: str
    params: int
    macs: int
    technique: str = ""
    kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    fixed: tuple[str, ...] = ()
    input_size: tuple[int, int, int] = (3, 32, 32)
    aliases: tuple[str, ...] = ()
    published: Published = Published()
    note: str = ""
    baseline: str = ""
    baseline_kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


def _read() -> dict[str, ModelEntry]:
    """Entries by name, in the order of the file."""
    text = (files("thriftnet.models") / "zoo.yaml").read_text(encoding="utf-8")
    stated = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    entries = {}
    for group in stated["groups"]:
        common = {name: value for name, value in group.items() if name != "models"}
        for name, own in group["models"].items():
            entries[name] = _entry(stated["papers"], {**common, **own})
    return entries


def _entry(papers: dict[str, str], fields: dict[str, Any]) -> ModelEntry:
    family, function = fields.pop("builder").split(".")
    for name in ("fixed", "input_size", "aliases"):
        fields[name] = tuple(fields[name]) if name in fields else getattr(ModelEntry, name)
    fields["published"] = Published(**fields.get("published", {}))
    return ModelEntry(**{**fields, "family": family, "function": function, "paper": papers[fields["paper"]]})


def normalize_name(name: str) -> str:
    """The form in which names are compared: ``ResNet56_DoubleShared`` and ``resnet56_double_shared`` are the same."""
    return name.lower().replace("_", "").replace("-", "")


def is_zoo_name(name: str) -> bool:
    """Whether it is a name of the zoo, or an author's."""
    return normalize_name(name) in NAMES


def zoo_name(name: str, *, kwargs: Iterable[str] = (), size: Sequence[int] | None = None, paper: str = "") -> str:
    """The network that a name means: the name in `MODELS`.

    Authors give one name to networks for CIFAR and for ImageNet, or two projects to different ones. A name of the zoo itself, spelled
    as there, means that network, unless it does not take the arguments given, or an author of ``paper`` means another by it.

    Args:
        name: A name of the zoo, or an author's.
        kwargs: Names of arguments for the network.
        size: Channels, height and width of the images: the network for the nearest size is meant.
        paper: Whose recipe it is.

    Raises:
        ConfigError: Unknown, or it means several networks and nothing decides.
    """
    found = NAMES.get(normalize_name(name), ())
    if not found:
        raise unknown_name("model", name, MODELS)
    nearest = 0.0 if size is None else min(_distance(each, size) for each in found)
    for decides in (
        lambda each: {*kwargs} <= {*model_kwargs(each)},
        lambda each: MODELS[each].paper == paper,
        lambda each: each == name,
        lambda each: size is not None and _distance(each, size) == nearest,
    ):
        found = tuple(filter(decides, found)) or found
    if len(found) > 1:
        meant = " or ".join(
            f"{each} ({MODELS[each].paper}; {'x'.join(map(str, MODELS[each].input_size))})" for each in found
        )
        raise ConfigError(f"{name} means {meant}: give one of these names")
    return found[0]


def _distance(name: str, size: Sequence[int]) -> float:
    """Between the images of a network and others, in powers of their side."""
    return abs(math.log(MODELS[name].input_size[-1] / size[-1]))


def model_kwargs(name: str) -> dict[str, Any]:
    """Keyword arguments of a network of the zoo and their defaults."""
    entry = MODELS[name if name in MODELS else zoo_name(name)]
    parameters = inspect.signature(builder(entry)).parameters.values()
    return {p.name: entry.kwargs.get(p.name, p.default) for p in parameters if p.name not in entry.fixed}


def all_kwargs(name: str) -> set[str]:
    """Names of the arguments of every network that a name may mean."""
    return {key for each in NAMES.get(normalize_name(name), ()) for key in model_kwargs(each)}


def builder(entry: ModelEntry) -> Callable[..., Any]:
    """The function that builds a network."""
    function: Callable[..., Any] = getattr(importlib.import_module(f"thriftnet.models.{entry.family}"), entry.function)
    return function


def _names() -> dict[str, tuple[str, ...]]:
    """The networks of each normalized name; an alias as ``cifar100_ResNet34`` is also one without the project."""
    names: dict[str, list[str]] = {}
    for name, entry in MODELS.items():
        short = [alias.partition("_")[2] for alias in entry.aliases if alias.startswith(PROJECTS)]
        for key in dict.fromkeys(map(normalize_name, (name, *entry.aliases, *short))):
            names.setdefault(key, []).append(name)
    return {key: tuple(found) for key, found in names.items()}


PROJECTS = ("cifar10_", "cifar100_", "ilsvrc_", "shiftresnet_")  # of the authors' names
MODELS: dict[str, ModelEntry] = _read()
NAMES = _names()
