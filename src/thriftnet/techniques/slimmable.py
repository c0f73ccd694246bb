"""Slimmable networks: one set of weights that runs at several widths.

A narrower network uses the first channels of every layer. Norms keep statistics for each width, since the same channel
is distributed differently in a narrower network; everything else is shared. With a gate, the network begins with a front that
is whole at every width; what the front finds decides, image by image, how wide the rest is.

Source: Yu et al., Slimmable Neural Networks, ICLR 2019, section 3; Li et al., Dynamic Slimmable Network, CVPR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from thriftnet.core import probe, sites
from thriftnet.core.conv import GeneratedConv2d, PlainConv2d
from thriftnet.core.linear import PlainLinear
from thriftnet.core.norm import PlainBatchNorm2d, PlainGroupNorm, PlainLayerNorm
from thriftnet.core.sites import Replacement, Site
from thriftnet.core.technique import Example
from thriftnet.core.width import WidthAware, WidthSpec, exact_share, set_width, widths
from thriftnet.dynamic.gate import SplitPoint, SqueezeGate
from thriftnet.dynamic.split import split_at
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
        gate: Let a gate choose the width per image. The name of the module that ends the front, or True for the first stage; the
            gate reads its output, and narrower tails read the first of its channels.
        front: Names of what runs before the gate, and stays whole. Left out, it is found by running the network.

    Example:
        >>> Slimmable(widths=(1.0, 0.5))
        Slimmable(widths=(0.5, 1.0), gate=False, front=())

    Source: Yu et al., section 3; Li et al., section 3.3.
    """

    takes: ClassVar[str] = (
        "Conv2d, BatchNorm2d, Linear, GroupNorm, LayerNorm over one axis and converted layers, each with one width"
    )
    every_layer: ClassVar[bool] = True

    widths: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    gate: bool | str = False
    front: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        values = self.widths if isinstance(self.widths, list | tuple) else (self.widths,)
        if not values or not all(isinstance(v, int | float) and not isinstance(v, bool) and 0 < v <= 1 for v in values):
            raise ConfigError(f"widths={self.widths!r}: possible are numbers in (0, 1], as widths=(0.25, 0.5, 0.75, 1.0)")
        object.__setattr__(self, "widths", tuple(sorted({float(v) for v in values})))
        if not isinstance(self.gate, bool | str) or self.gate == "":
            raise ConfigError(f"gate={self.gate!r}: possible are False, True, or the name of the module that ends the front")
        if not isinstance(self.front, list | tuple) or not all(isinstance(name, str) for name in self.front):
            raise ConfigError(f"front={self.front!r}: possible are names of modules, as front=('conv1', 'bn1', 'layer1')")
        object.__setattr__(self, "front", tuple(self.front))
        if self.gate and len(self.widths) < 2:
            raise ConfigError(f"a gate has nothing to choose among widths={self.widths}: give two or more")
        if self.front and not isinstance(self.gate, str):
            raise ConfigError("front needs a gate at its end: give the name of its last module, as gate='layer1'")

    def adapt(self, model: nn.Module) -> Slimmable:
        """The config with the modules of the front, which are found by running the network without computing."""
        if self.gate is False or self.front or not any(self.accepts(module) for module in model.modules()):
            return self
        size = probe.input_size(model)
        gate = first_stage(model, size) if self.gate is True else self.gate
        return replace(self, gate=gate, front=split_at(model, gate, size).front)

    def finish(self, model: nn.Module) -> None:
        """Put the gate at the end of the front."""
        if not isinstance(self.gate, str):
            return
        size = probe.input_size(model)
        split = split_at(model, self.gate, size)
        if len(split.cuts) > 1:
            raise IncompatibleModelError(
                f"the front cannot end at {self.gate!r}: the output of {split.cuts[0]!r} passes it by. "
                "Name a module whose output is all that goes on, as the end of a stage"
            )
        body = model.get_submodule(self.gate)
        outs = self._shares(Site((self.gate,), body), split.channels[0])
        width_spec = WidthSpec(self.widths, (split.channels[0],) * len(outs), outs)
        like = next(model.parameters())
        sites.replace(model, {id(body): SplitPoint(body, SqueezeGate(split.channels[0], self.widths, like), width_spec)})
        _check_runs(model, size)

    def accepts(self, module: nn.Module) -> bool:
        if isinstance(module, nn.LayerNorm) and len(module.normalized_shape) != 1:
            return False
        return module.width_spec is None if isinstance(module, WidthAware) else type(module) in PLAIN

    def group(self, sites: Sequence[Site[nn.Module]]) -> list[list[Site[nn.Module]]]:
        if sites:
            slims = self._slims(sites)
            for site in sites:
                if id(site.module) in slims:
                    _check_groups(site, slims[id(site.module)])
        return [list(sites)] if sites else []

    def build(self, group: Sequence[Site[nn.Module]]) -> list[Replacement]:
        slims = self._slims(group)
        pairs: list[Replacement] = []
        for site in group:
            layer = site.module if isinstance(site.module, WidthAware) else PLAIN[type(site.module)](site.module)
            layer.set_width_spec(slims.get(id(site.module)))
            pairs.append((site.module, layer))
        return pairs

    def _slims(self, sites: Sequence[Site[nn.Module]]) -> dict[int, WidthSpec]:
        """Channels of each layer behind the front at each width. Norms behind the classifier see whole inputs."""
        roles = [site.role for site in sites]
        last = roles.index("classifier") if "classifier" in roles else len(roles)
        slims = {}
        for place, site in enumerate(sites):
            if any(_within(name, self.front) for name in site.names):
                continue
            ins, outs = channels(site.module)
            whole_in = site.role == "stem" or place > last
            whole_out = place >= last
            slims[id(site.module)] = WidthSpec(
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


def _check_groups(site: Site[nn.Module], width_spec: WidthSpec) -> None:
    """Grouped layers narrow by whole groups."""
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
        f"layer {site.name!r} cannot be narrowed: {why}. Possible are multiples of 1/{parts} ({shown})"
    )


def first_stage(model: nn.Module, size: tuple[int, int, int]) -> str:
    """The module that ends a front by default: the first that runs and holds several convolutions, if not most of them.

    In a network without such stages it is what runs after a third of the convolutions.

    Raises:
        IncompatibleModelError: There is none.
    """
    ran = list(dict.fromkeys(call.name for call in probe.calls(model, size) if call.name))
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | GeneratedConv2d)]
    for name in ran:
        outer = name.rpartition(".")[0]
        of_outer = sum(_within(layer, (outer,)) for layer in layers) if outer else len(layers)
        if 2 <= sum(_within(layer, (name,)) for layer in layers) <= len(layers) / 2 < of_outer:
            return name
    seen = 0
    for name in ran:
        seen += name in layers
        if seen >= len(layers) / 3 and name not in layers:
            return name
    raise IncompatibleModelError(
        f"{type(model).__name__} has no stage that could be the front. Name the module that ends it, as gate='layer1'"
    )


def _within(name: str, outer: Sequence[str]) -> bool:
    return any(name == part or name.startswith(f"{part}.") for part in outer)


def _check_runs(model: nn.Module, size: tuple[int, int, int]) -> None:
    """Raise unless the network runs at every width."""
    ghost = probe.on_meta(model)
    for index in range(len(widths(model))):
        set_width(ghost, index)
        error = probe.failure(ghost, size)
        if error is not None:
            raise IncompatibleModelError(
                f"{type(model).__name__} does not run at width {widths(model)[index]} behind a front that is whole: "
                f"{str(error).splitlines()[0]}. End the front elsewhere"
            )


EXAMPLES = (
    Example(config=Slimmable(widths=(0.5, 1.0))),
    # at a fixed width the gate, two linear layers 8 -> 4 -> 2, does not run
    Example(config=Slimmable(widths=(0.5, 1.0), gate=True), params=4 * (8 * 8 * 9 + 8) + (4 * 8 + 4) + 2 * 4),
)


def full_capacity(layers: int, entries: int) -> list[Slimmable]:
    return [Slimmable(widths=(1.0,)), Slimmable(widths=(0.5, 1.0))]
