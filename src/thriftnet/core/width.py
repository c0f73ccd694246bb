"""Layers of several widths. Width belongs to the base layers, so that slimming composes with every technique.

Source: Yu et al., Slimmable Neural Networks, ICLR 2019, section 3 (switchable widths, one set of weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from thriftnet.errors import ConfigError, IncompatibleModelError


@dataclass(frozen=True)
class Slim:
    """How many channels a layer reads and gives at each width, narrowest first.

    Args:
        widths: Multipliers in (0, 1], ascending.
        ins: Channels read at each width.
        outs: Channels given at each width.
    """

    widths: tuple[float, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]

    def with_ins(self, channels: int) -> Slim:
        """The same widths, reading ``channels`` at each of them."""
        return Slim(self.widths, (channels,) * len(self.widths), self.outs)

    def with_outs(self, channels: int) -> Slim:
        """The same widths, giving ``channels`` at each of them."""
        return Slim(self.widths, self.ins, (channels,) * len(self.widths))


class WidthAware(nn.Module):
    """A layer that can run at several widths; until `set_slim` is called it has one."""

    slim: Slim | None = None
    width_index: int = -1  # position in slim.widths; the last is the widest

    def set_slim(self, slim: Slim | None) -> None:
        """Give the layer its widths, and select the widest."""
        self.slim = slim
        self.width_index = -1

    def set_width_index(self, index: int) -> None:
        """Select a width by its position."""
        self.width_index = index

    def active_ins(self, full: int) -> int:
        """Channels read at the selected width, of ``full``."""
        return full if self.slim is None else self.slim.ins[self.width_index]

    def active_outs(self, full: int) -> int:
        """Channels given at the selected width, of ``full``."""
        return full if self.slim is None else self.slim.outs[self.width_index]


def slim_layers(model: nn.Module) -> Iterator[WidthAware]:
    """Every layer of ``model`` that has several widths."""
    return (m for m in model.modules() if isinstance(m, WidthAware) and m.slim is not None)


def widths(model: nn.Module) -> tuple[float, ...]:
    """The widths that ``model`` can run at, ascending; empty for a network of one width."""
    for layer in slim_layers(model):
        if layer.slim is not None:
            return layer.slim.widths
    return ()


def width(model: nn.Module) -> float:
    """The width that ``model`` runs at now (1.0 for a network of one width)."""
    for layer in slim_layers(model):
        if layer.slim is not None:
            return layer.slim.widths[layer.width_index]
    return 1.0


def set_width(model: nn.Module, width: float | int | str) -> None:
    """Let ``model`` run at one of its widths from now on.

    Args:
        model: A network converted by `Slimmable`.
        width: A multiplier (float), a position in the ascending list of widths (int), "smallest" or "largest".

    Raises:
        IncompatibleModelError: The network has one width only.
        ConfigError: It has no such width; the message lists those it has.
    """
    possible = widths(model)
    if not possible:
        raise IncompatibleModelError(
            f"{type(model).__name__} has one width only. Make it slimmable first: convert(model, Slimmable(widths=(0.5, 1.0)))"
        )
    index = _position(width, possible)
    for layer in slim_layers(model):
        layer.set_width_index(index)


def _position(width: float | int | str, possible: tuple[float, ...]) -> int:
    names = {"smallest": 0, "largest": len(possible) - 1}
    if isinstance(width, str) and width in names:
        return names[width]
    if isinstance(width, int) and not isinstance(width, bool) and -len(possible) <= width < len(possible):
        return width % len(possible)
    if isinstance(width, float):
        for index, candidate in enumerate(possible):
            if abs(candidate - width) < 1e-9:
                return index
    listed = ", ".join(f"{value:g}" for value in possible)
    raise ConfigError(
        f"no width {width!r}: possible are {listed} (float), 0 to {len(possible) - 1} (int, a position), 'smallest' and 'largest'"
    )


def exact_share(channels: int, width: float) -> int | None:
    """``width`` of ``channels``, or None when that is not a whole number of at least 1.

    Only whole shares are taken, so that sums of channels (concatenation) and products (flattening) stay consistent.

    Example:
        >>> exact_share(64, 0.25), exact_share(10, 0.25)
        (16, None)
    """
    share = round(channels * width)
    return share if share >= 1 and abs(share - channels * width) < 1e-6 else None
