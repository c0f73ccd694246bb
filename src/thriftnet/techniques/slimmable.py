"""Slimmable networks: one set of weights that runs at several widths.

A narrower network uses the first channels of every layer. Norms keep statistics for each width, since the same channel
is distributed differently in a narrower network; everything else is shared. With a gate, the network begins with a front that
runs at full width; from the front's output the gate chooses, image by image, the width of the rest.

Source: Yu et al., Slimmable Neural Networks, ICLR 2019, section 3; Li et al., Dynamic Slimmable Network, CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import nn

from thriftnet.arguments import PositiveShare, checked
from thriftnet.core import probe
from thriftnet.core.conv import PlainConv2d
from thriftnet.core.linear import PlainLinear
from thriftnet.core.norm import PlainBatchNorm2d, PlainGroupNorm, PlainLayerNorm
from thriftnet.core.sites import Replacement, Site, replace
from thriftnet.core.technique import Example
from thriftnet.core.width import WidthAware, WidthSpec, exact_share
from thriftnet.dynamic.add_gate import check_runs, find_front, split_point
from thriftnet.dynamic.split import Split, is_within
from thriftnet.errors import ConfigError, IncompatibleModelError

PLAIN: dict[type[nn.Module], type[WidthAware]] = {
    nn.Conv2d: PlainConv2d,
    nn.BatchNorm2d: PlainBatchNorm2d,
    nn.Linear: PlainLinear,
    nn.GroupNorm: PlainGroupNorm,
    nn.LayerNorm: PlainLayerNorm,
}


@checked
@dataclass(frozen=True, kw_only=True)
class Slimmable:
    """Let a network run at several widths; it takes every layer with parameters.

    The first layer reads all channels of the image and the classifier outputs all classes at every width; all other channels are
    narrowed. Each channel count times each width must be an integer.

    Args:
        widths: Ratios in (0, 1]; kept in ascending order.
        gate: Let a gate choose the width per image: the name of the module that ends the front, or True for the first stage, as
            `add_gate` does for a network that is slimmable already.

    Example:
        >>> Slimmable(widths=(1.0, 0.5))
        Slimmable(widths=(0.5, 1.0), gate=False)

    Source: Yu et al., section 3; Li et al., section 3.3.
    """

    takes: ClassVar[str] = (
        "Conv2d, BatchNorm2d, Linear, GroupNorm, LayerNorm over one axis and converted layers, each with one width"
    )
    every_layer: ClassVar[bool] = True

    widths: Annotated[tuple[PositiveShare, ...], "numbers in (0, 1], as widths=(0.25, 0.5, 0.75, 1.0)"] = (
        0.25,
        0.5,
        0.75,
        1.0,
    )
    gate: bool | str = False

    def __post_init__(self) -> None:
        values = self.widths if isinstance(self.widths, list | tuple) else (self.widths,)
        if not values:
            raise ConfigError("widths=(): expected numbers in (0, 1], as widths=(0.25, 0.5, 0.75, 1.0)")
        object.__setattr__(self, "widths", tuple(sorted({float(v) for v in values})))
        if self.gate == "":
            raise ConfigError(f"gate={self.gate!r}: expected False, True, or the name of the module that ends the front")
        if self.gate and len(self.widths) < 2:
            raise ConfigError(f"a gate has nothing to choose from with widths={self.widths}: give two or more")

    def accepts(self, module: nn.Module) -> bool:
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            return False
        return module.width_spec is None if isinstance(module, WidthAware) else type(module) in PLAIN

    def group(self, sites: Sequence[Site[nn.Module]]) -> list[list[Site[nn.Module]]]:
        if not sites:
            return []
        specs = self._width_specs(sites, self._front(sites))
        for site in sites:
            if id(site.module) in specs:
                _check_groups(site, specs[id(site.module)])
        if self.gate:
            ghost = probe.on_meta(_network(sites))
            on_ghost = [Site(site.names, ghost.get_submodule(site.name), site.role, ghost) for site in sites]
            check_runs(replace(ghost, {id(old): new for old, new in self.build(on_ghost)}))
        return [list(sites)]

    def build(self, group: Sequence[Site[nn.Module]]) -> list[Replacement]:
        front = self._front(group)
        specs = self._width_specs(group, front)
        layers: dict[int, Replacement] = {}
        for site in group:
            layer = site.module if isinstance(site.module, WidthAware) else PLAIN[type(site.module)](site.module)
            layer.set_width_spec(specs.get(id(site.module)))
            layers[id(site.module)] = (site.module, layer)
        if front is not None:
            network = _network(group)
            end = network.get_submodule(front.after)
            _, body = layers.get(id(end), (end, end))
            layers[id(end)] = (end, split_point(body, front.channels[0], self.widths, network))
        return list(layers.values())

    def _front(self, sites: Sequence[Site[nn.Module]]) -> Split | None:
        """What runs before the gate."""
        return find_front(_network(sites), self.gate if isinstance(self.gate, str) else None) if self.gate else None

    def _width_specs(self, sites: Sequence[Site[nn.Module]], front: Split | None) -> dict[int, WidthSpec]:
        """Channels of each layer after the front at each width. Norms after the classifier have all channels."""
        roles = [site.role for site in sites]
        last = roles.index("classifier") if "classifier" in roles else len(roles)
        specs = {}
        for place, site in enumerate(sites):
            if front is not None and any(is_within(name, front.front) for name in site.names):
                continue
            ins, outs = channels(site.module)
            whole_in = site.role == "stem" or place > last
            whole_out = place >= last
            specs[id(site.module)] = WidthSpec(
                self.widths,
                (ins,) * len(self.widths) if whole_in else self._shares(site, ins),
                (outs,) * len(self.widths) if whole_out else self._shares(site, outs),
            )
        return specs

    def _shares(self, site: Site[nn.Module], full: int) -> tuple[int, ...]:
        shares = tuple(exact_share(full, width) for width in self.widths)
        if 0 in shares:
            width = self.widths[shares.index(0)]
            raise _unfit(site, f"width {width:g} of its {full} channels is not an integer", full)
        return shares


def _network(sites: Sequence[Site[nn.Module]]) -> nn.Module:
    network = sites[0].network
    if network is None:
        raise ConfigError("a gate depends on the whole network: make the sites with core.sites.sites")
    return network


def channels(module: nn.Module) -> tuple[int, int]:
    """Input and output channels of a layer."""
    if isinstance(module, nn.LayerNorm):
        return module.normalized_shape[0], module.normalized_shape[0]
    same = [(name, name) for name in ("num_features", "num_channels", "channels")]
    for ins, outs in (("in_channels", "out_channels"), ("in_features", "out_features"), *same):
        if hasattr(module, ins):
            return getattr(module, ins), getattr(module, outs)
    raise IncompatibleModelError(f"{type(module).__name__} has no attribute with its number of channels")


def _check_groups(site: Site[nn.Module], width_spec: WidthSpec) -> None:
    """Raise unless every width of a grouped layer has whole groups."""
    module = site.module
    full_in, full_out = channels(module)
    groups = getattr(module, "groups", getattr(module, "num_groups", 1))
    if groups == 1:
        return
    for width, ins, outs in zip(width_spec.widths, width_spec.ins, width_spec.outs, strict=True):
        if ins % (full_in // groups) or ins // (full_in // groups) * (full_out // groups) != outs:
            raise _unfit(site, f"width {width:g} cuts through one of its {groups} groups", groups)


def _unfit(site: Site[nn.Module], why: str, parts: int) -> IncompatibleModelError:
    possible = [part / parts for part in range(1, parts + 1)]
    shown = ", ".join(f"{p:g}" for p in (possible if parts <= 8 else [*possible[:3], *possible[-3:]]))
    return IncompatibleModelError(
        f"layer {site.name!r} cannot be narrowed: {why}. Expected multiples of 1/{parts} ({shown})"
    )


EXAMPLES = (
    Example(config=Slimmable(widths=(0.5, 1.0))),
    # at a fixed width the gate, two linear layers 8 -> 4 -> 2, does not run
    Example(config=Slimmable(widths=(0.5, 1.0), gate=True), params=4 * (8 * 8 * 9 + 8) + (4 * 8 + 4) + 2 * 4),
)


def full_capacity(layers: int, entries: int) -> list[Slimmable]:
    return [Slimmable(widths=(1.0,)), Slimmable(widths=(0.5, 1.0))]
