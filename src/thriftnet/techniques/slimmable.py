"""Slimmable networks: one set of weights that runs at several widths.

A narrower network uses the first channels of every layer. Norms keep statistics for each width, since the same channel
is distributed differently in a narrower network; everything else is shared.

Source: Yu et al., Slimmable Neural Networks, ICLR 2019, section 3; Li et al., Dynamic Slimmable Network, CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from thriftnet.core.conv import PlainConv2d
from thriftnet.core.linear import PlainLinear
from thriftnet.core.norm import PlainBatchNorm2d, PlainGroupNorm, PlainLayerNorm
from thriftnet.core.sites import Replacement, Site
from thriftnet.core.width import Slim, WidthAware, exact_share
from thriftnet.errors import ConfigError, IncompatibleModelError

PLAIN: dict[type[nn.Module], type[WidthAware]] = {
    nn.Conv2d: PlainConv2d,
    nn.BatchNorm2d: PlainBatchNorm2d,
    nn.Linear: PlainLinear,
    nn.GroupNorm: PlainGroupNorm,
    nn.LayerNorm: PlainLayerNorm,
}


@dataclass(frozen=True, kw_only=True)
class Slimmable:
    """Let a network run at several widths; it takes every layer with parameters.

    The image is read and the classes are given whole at every width; all other channels are narrowed. Each channel count
    times each width must be a whole number.

    Args:
        widths: Multipliers in (0, 1]; kept in ascending order.
        gate: Let a gate choose the width per input. Not possible yet.

    Example:
        >>> Slimmable(widths=(1.0, 0.5))
        Slimmable(widths=(0.5, 1.0), gate=False)

    Source: Yu et al., section 3.
    """

    takes: ClassVar[str] = (
        "Conv2d, BatchNorm2d, Linear, GroupNorm, LayerNorm over one axis and converted layers, each with one width"
    )
    every_layer: ClassVar[bool] = True

    widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    gate: bool = False

    def __post_init__(self) -> None:
        values = self.widths if isinstance(self.widths, list | tuple) else (self.widths,)
        if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v <= 1 for v in values):
            raise ConfigError(f"widths={self.widths!r}: possible are numbers in (0, 1], as widths=(0.25, 0.5, 0.75, 1.0)")
        object.__setattr__(self, "widths", tuple(sorted({float(v) for v in values})))
        if self.gate:
            raise ConfigError("gate=True: gates cannot be trained yet. Use gate=False and choose the width with set_width")

    def accepts(self, module: nn.Module) -> bool:
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            return False
        return module.slim is None if isinstance(module, WidthAware) else type(module) in PLAIN

    def group(self, sites: Sequence[Site[nn.Module]]) -> list[list[Site[nn.Module]]]:
        if sites:
            slims = self._slims(sites)
            for site in sites:
                _check_groups(site, slims[id(site.module)])
        return [list(sites)] if sites else []

    def build(self, group: Sequence[Site[nn.Module]]) -> list[Replacement]:
        slims = self._slims(group)
        pairs: list[Replacement] = []
        for site in group:
            layer = site.module if isinstance(site.module, WidthAware) else PLAIN[type(site.module)](site.module)
            layer.set_slim(slims[id(site.module)])
            pairs.append((site.module, layer))
        return pairs

    def _slims(self, sites: Sequence[Site[nn.Module]]) -> dict[int, Slim]:
        """Channels of each layer at each width. Norms behind the classifier see whole inputs."""
        roles = [site.role for site in sites]
        last = roles.index("classifier") if "classifier" in roles else len(roles)
        slims = {}
        for place, site in enumerate(sites):
            ins, outs = channels(site.module)
            whole_in = site.role == "stem" or place > last
            whole_out = place >= last
            slims[id(site.module)] = Slim(
                self.widths,
                (ins,) * len(self.widths) if whole_in else self._shares(site, ins),
                (outs,) * len(self.widths) if whole_out else self._shares(site, outs),
            )
        return slims

    def _shares(self, site: Site[nn.Module], full: int) -> tuple[int, ...]:
        shares = [exact_share(full, width) for width in self.widths]
        for width, share in zip(self.widths, shares, strict=True):
            if share is None:
                raise _unfit(site, f"width {width:g} of its {full} channels is no whole number", full)
        return tuple(share for share in shares if share is not None)


def channels(module: nn.Module) -> tuple[int, int]:
    """Channels in and out of a layer."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0], module.normalized_shape[0]
    for ins, outs in (
        ("in_channels", "out_channels"),
        ("in_features", "out_features"),
        ("num_features", "num_features"),
        ("num_channels", "num_channels"),
        ("channels", "channels"),
    ):
        if hasattr(module, ins):
            return getattr(module, ins), getattr(module, outs)
    raise IncompatibleModelError(f"{type(module).__name__} does not say how many channels it has")


def _check_groups(site: Site[nn.Module], slim: Slim) -> None:
    """Grouped layers narrow by whole groups."""
    module = site.module
    full_in, full_out = channels(module)
    groups = getattr(module, "groups", getattr(module, "num_groups", 1))
    if groups == 1:
        return
    for width, ins, outs in zip(slim.widths, slim.ins, slim.outs, strict=True):
        if ins % (full_in // groups) or ins // (full_in // groups) * (full_out // groups) != outs:
            raise _unfit(site, f"width {width:g} cuts through one of its {groups} groups", groups)


def _unfit(site: Site[nn.Module], why: str, parts: int) -> IncompatibleModelError:
    possible = [part / parts for part in range(1, parts + 1)]
    shown = ", ".join(f"{p:g}" for p in (possible if parts <= 8 else [*possible[:3], *possible[-3:]]))
    return IncompatibleModelError(
        f"layer {site.name!r} cannot be narrowed: {why}. Possible are multiples of 1/{parts} ({shown})"
    )
