"""Layers of several widths. Width belongs to the base layers, so that slimming composes with every technique.

Source: Yu et al., Slimmable Neural Networks, ICLR 2019, section 3 (switchable widths, one set of weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from torch import nn

from thriftnet.errors import ConfigError, IncompatibleModelError

Width: TypeAlias = float | int | str


@dataclass(frozen=True)
class WidthSpec:
    """How many channels a layer reads and gives in each of the network's sub-networks, narrowest first.

    Args:
        widths: What the sub-networks are called: multipliers in (0, 1], ascending; or, where no one multiplier fits the
            whole network, their positions 0, 1, ..., and after them names of such as are not among these.
        ins: Channels read in each.
        outs: Channels given in each.
        bn_sets: Which of a norm's statistics each one uses, numbered from 0, the widest ones last. Left out, every
            sub-network has its own.
        slot: Where several layers must give equally many channels, a name for them all. Left out, the layer's own name.
    """

    widths: tuple[Width, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    bn_sets: tuple[int, ...] | None = None
    slot: str = field(default="", compare=False)

    def with_ins(self, channels: int) -> WidthSpec:
        """The same widths, reading ``channels`` at each of them."""
        return replace(self, ins=(channels,) * len(self.widths))

    def with_outs(self, channels: int) -> WidthSpec:
        """The same widths, giving ``channels`` at each of them."""
        return replace(self, outs=(channels,) * len(self.widths))

    def bn_set(self, index: int) -> int:
        """Which of a norm's statistics the sub-network at position ``index`` uses."""
        return range(len(self.widths))[index] if self.bn_sets is None else self.bn_sets[index]

    def narrower_bn_sets(self) -> dict[int, int]:
        """Channels of each of a norm's statistics, but for the widest ones."""
        channels = {self.bn_set(index): outs for index, outs in enumerate(self.outs)}
        widest = max(channels)
        return {store: outs for store, outs in sorted(channels.items()) if store != widest}


class WidthAware(nn.Module):
    """A layer that can run at several widths; until `set_width_spec` is called it has one."""

    width_spec: WidthSpec | None = None
    width_index: int = -1  # position in width_spec.widths; the last is the widest

    def set_width_spec(self, width_spec: WidthSpec | None) -> None:
        """Give the layer its widths, and select the widest."""
        self.width_spec = width_spec
        self.width_index = -1

    def set_width_index(self, index: int) -> None:
        """Select a width by its position."""
        self.width_index = index

    def active_ins(self, full: int) -> int:
        """Channels read at the selected width, of ``full``."""
        return full if self.width_spec is None else self.width_spec.ins[self.width_index]

    def active_outs(self, full: int) -> int:
        """Channels given at the selected width, of ``full``."""
        return full if self.width_spec is None else self.width_spec.outs[self.width_index]


def slimmable_layers(model: nn.Module) -> Iterator[WidthAware]:
    """Every layer of ``model`` that has several widths."""
    return (m for m in model.modules() if isinstance(m, WidthAware) and m.width_spec is not None)


def widths(model: nn.Module) -> tuple[Width, ...]:
    """The widths that ``model`` can run at, as `set_width` takes them, ascending; empty for a network of one width."""
    for layer in slimmable_layers(model):
        if layer.width_spec is not None:
            return layer.width_spec.widths
    return ()


def width(model: nn.Module) -> Width:
    """The width that ``model`` runs at now (1.0 for a network of one width)."""
    for layer in slimmable_layers(model):
        if layer.width_spec is not None:
            return layer.width_spec.widths[layer.width_index]
    return 1.0


def set_width(model: nn.Module, width: Width) -> None:
    """Let ``model`` run at one of its widths from now on.

    Args:
        model: A network converted by `Slimmable`, or slimmable by itself.
        width: A multiplier (float), a position in the ascending list of widths (int), "smallest" or "largest". A network
            may name further ones: in DS-Net "largest" is none of those that have a position.

    Raises:
        IncompatibleModelError: The network has one width only.
        ConfigError: It has no such width; the message lists those it has.
    """
    possible = widths(model)
    if not possible:
        raise IncompatibleModelError(
            f"{type(model).__name__} has one width only. Make it slimmable first: convert(model, Slimmable(widths=(0.5, 1.0)))"
        )
    index = width_index(width, possible)
    for layer in slimmable_layers(model):
        layer.set_width_index(index)


def width_index(width: Width, possible: tuple[Width, ...]) -> int:
    """Where a width stands in the ascending list of a network's widths.

    Raises:
        ConfigError: It is none of them; the message lists them.
    """
    if isinstance(width, str) and width in possible:
        return possible.index(width)
    names = {"smallest": 0, "largest": len(possible) - 1}
    if isinstance(width, str) and width in names:
        return names[width]
    numbered = [candidate for candidate in possible if not isinstance(candidate, str)]
    if isinstance(width, int) and not isinstance(width, bool) and -len(numbered) <= width < len(numbered):
        return width % len(numbered)
    multipliers = [candidate for candidate in numbered if isinstance(candidate, float)]
    for index, candidate in enumerate(multipliers):
        if isinstance(width, float) and abs(candidate - width) < 1e-9:
            return index
    named = ["'smallest'", *(repr(item) for item in possible if isinstance(item, str) and item not in names)]
    listed = f"{', '.join(map(format_width, multipliers))} (float), " if multipliers else ""
    raise ConfigError(
        f"no width {width!r}: possible are {listed}0 to {len(numbered) - 1} (int, a position), "
        f"{', '.join(named)} and 'largest'"
    )


def format_width(width: Width) -> str:
    """A width for messages.

    Example:
        >>> format_width(0.5), format_width("largest")
        ('0.5', 'largest')
    """
    return width if isinstance(width, str) else f"{width:g}"


def exact_share(channels: int, width: Width) -> int | None:
    """``width`` of ``channels``, or None when that is not a whole number of at least 1, or ``width`` no multiplier.

    Only whole shares are taken, so that sums of channels (concatenation) and products (flattening) stay consistent.

    Example:
        >>> exact_share(64, 0.25), exact_share(10, 0.25)
        (16, None)
    """
    if not isinstance(width, float):
        return None
    share = round(channels * width)
    return share if share >= 1 and abs(share - channels * width) < 1e-6 else None
