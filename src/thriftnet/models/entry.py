"""What the zoo knows of a network without building it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

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
