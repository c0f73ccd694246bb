"""A technique for each part of a network, chosen by the names of its layers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from thriftnet.core.patterns import matcher
from thriftnet.core.sites import Replacement, Site
from thriftnet.core.technique import Technique, requires_all_layers, takes
from thriftnet.errors import ConfigError


class ByPattern(Mapping[str, "Technique | None"]):
    """A mapping from regular expressions on the names of layers to techniques, and itself a technique.

    The first expression found in a layer's name decides; layers that none is found in, or whose technique is None, stay as they
    are. Layers of different entries never share.

    Args:
        parts: Regular expressions, and a technique's config or None for each.

    Raises:
        ConfigError: No entry, a malformed expression, or a technique that takes all layers or none.

    Example:
        >>> from thriftnet.techniques import resolve
        >>> resolve({"layer3": "soft-sharing(templates=2)", "layer[12]": "shift"})
        ByPattern({'layer3': 'soft-sharing(templates=2)', 'layer[12]': 'shift'})
    """

    def __init__(self, parts: Mapping[str, Technique | None]) -> None:
        if not any(technique is not None for technique in parts.values()):
            raise ConfigError("expected at least one pattern with a technique, as {'layer4': 'soft-sharing(templates=8)'}")
        for pattern, technique in parts.items():
            if technique is not None and requires_all_layers(technique):
                raise ConfigError(
                    f"{pattern!r}: {type(technique).__name__} takes every layer, not some: convert with it alone"
                )
        self._parts = dict(parts)
        self._found = {pattern: matcher(pattern) for pattern in parts}

    def __getitem__(self, pattern: str) -> Technique | None:
        return self._parts[pattern]

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)

    def __hash__(self) -> int:
        return hash(tuple(self._parts.items()))

    @property
    def takes(self) -> str:
        """Which layers the techniques accept."""
        return "; or ".join(dict.fromkeys(takes(technique) for technique in self._techniques()))

    def accepts(self, module: nn.Module) -> bool:
        """Whether one of the techniques can replace this layer."""
        return any(technique.accepts(module) for technique in self._techniques())

    def group(self, sites: Sequence[Site[Any]]) -> list[list[Site[Any]]]:
        """The groups that each technique makes of its layers."""
        mine: dict[str, list[Site[Any]]] = {pattern: [] for pattern in self}
        for site in sites:
            if (pattern := self._pattern(site)) is not None:
                mine[pattern].append(site)
        groups = []
        for pattern, found in mine.items():
            if not found:
                raise ConfigError(f"pattern {pattern!r} decides on no layer: an earlier one takes them, or no name has it")
            technique = self[pattern]
            if technique is not None:
                groups += technique.group([site for site in found if technique.accepts(site.module)])
        return groups

    def build(self, group: Sequence[Site[Any]]) -> list[Replacement]:
        """New layers for one group, by the technique of its pattern."""
        pattern = self._pattern(group[0])
        technique = None if pattern is None else self[pattern]
        if technique is None:
            raise ConfigError(f"no pattern gives layer {group[0].name!r} a technique: change the patterns, or its group")
        return technique.build(group)

    def _pattern(self, site: Site[Any]) -> str | None:
        return next((pattern for pattern in self if any(map(self._found[pattern], site.names))), None)

    def _techniques(self) -> list[Technique]:
        return [technique for technique in self._parts.values() if technique is not None]

    def __repr__(self) -> str:
        from thriftnet.core.spec import format_spec

        return f"ByPattern({format_spec(self)})"
