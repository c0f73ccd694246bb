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
from weakref import WeakKeyDictionary

from torch import nn

from thriftnet.arguments import InputSize, PositiveShare, checked
from thriftnet.core import probe
from thriftnet.core.sites import Replacement, Site
from thriftnet.core.slim import PLAIN, Narrowing
from thriftnet.core.spaces import length
from thriftnet.core.spec import format_spec
from thriftnet.core.technique import Example
from thriftnet.core.width import WidthAware
from thriftnet.dynamic.add_gate import find_front, split_point
from thriftnet.dynamic.split import is_within
from thriftnet.errors import ConfigError, IncompatibleModelError


@checked
@dataclass(frozen=True, kw_only=True)
class Slimmable:
    """Let any network run at several widths.

    Which channels are narrowed together is seen by running the network on the meta device, and checked by running it at every width.
    Channels of the image, those that reach an output, and those whose number the network's code fixes stay whole; the plan
    lists the layers that do, and why. A width is at least that share of the channels: 3 of 8 at 0.3.

    Args:
        widths: Ratios in (0, 1]; kept in ascending order.
        gate: Let a gate choose the width per image: the name of the module that ends the front, or True for the first stage, as
            `add_gate` does for a network that is slimmable already.
        input_size: Channels, height and width of the images that show how the network is connected. Default: the size it states,
            or one it runs on.
        example: Types and shapes of what it reads otherwise, as text; filled with the ``example`` that `convert` is given.

    Example:
        >>> Slimmable(widths=(1.0, 0.5))
        Slimmable(widths=(0.5, 1.0), gate=False, input_size=None, example=None)

    Source: Yu et al., section 3; Li et al., section 3.3.
    """

    takes: ClassVar[str] = "layers of any class, each with one width"
    every_layer: ClassVar[bool] = True

    widths: Annotated[tuple[PositiveShare, ...], "numbers in (0, 1], as widths=(0.25, 0.5, 0.75, 1.0)"] = (
        0.25,
        0.5,
        0.75,
        1.0,
    )
    gate: Annotated[bool | str, "False, True, or the name of the module that ends the front"] = False
    input_size: InputSize | None = None
    example: str | None = None

    def __post_init__(self) -> None:
        values = self.widths if isinstance(self.widths, list | tuple) else (self.widths,)
        if not values:
            raise ConfigError("widths=(): expected numbers in (0, 1], as widths=(0.25, 0.5, 0.75, 1.0)")
        object.__setattr__(self, "widths", tuple(sorted({float(v) for v in values})))
        if self.gate == "":
            raise ConfigError(f"gate={self.gate!r}: expected False, True, or the name of the module that ends the front")
        if self.input_size is not None:
            object.__setattr__(self, "input_size", tuple(self.input_size))
        if self.gate and len(self.widths) < 2:
            raise ConfigError(f"a gate has nothing to choose from with widths={self.widths}: give two or more")

    def accepts(self, module: nn.Module) -> bool:
        if isinstance(module, WidthAware):
            return module.width_spec is None
        owns = any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        inner = any(True for child in module.children() for _ in child.parameters())
        return type(module) in PLAIN or (owns and not inner)

    def group(self, sites: Sequence[Site[nn.Module]]) -> list[list[Site[nn.Module]]]:
        if not sites:
            return []
        network = _network(sites)
        _found.pop(network, None)
        narrowing = self._narrowing(network)
        if not narrowing:
            raise IncompatibleModelError(
                f"{format_spec(self)} finds nothing to narrow in {type(network).__name__}: {_blockers(sites, narrowing)}"
            )
        return [[site for site in sites if narrowing.narrows(site.name, site.module)]]

    def build(self, group: Sequence[Site[nn.Module]]) -> list[Replacement]:
        network = _network(group)
        narrowing = self._narrowing(network)
        _found.pop(network, None)  # it is about to change
        layers = {id(old): (old, new) for _, old, new in narrowing.layers(network)}
        if narrowing.trace.cut is not None:
            end = network.get_submodule(narrowing.trace.cut)
            _, body = layers.get(id(end), (end, end))
            channels = length(narrowing.trace.cut_axis or ())
            shares = narrowing.shares(narrowing.trace.cut_axis)
            layers[id(end)] = (end, split_point(body, channels, self.widths, shares, network))
        return list(layers.values())

    def why_left(self, network: nn.Module, name: str) -> str:
        """Why a layer has all its channels at every width."""
        return self._narrowing(network).why_whole(name)

    def _narrowing(self, network: nn.Module) -> Narrowing:
        """Which layers are narrowed, and how; found once for a network that does not change."""
        if network not in _found:
            try:
                front = find_front(network, self.gate if isinstance(self.gate, str) else None) if self.gate else None
                inputs = self._inputs(network)
            except IncompatibleModelError as error:
                raise IncompatibleModelError(
                    f"{error} ({format_spec(self)} runs a network to see how it is connected)"
                ) from None
            before = front.front if front else ()
            _found[network] = Narrowing(
                network, self.widths, inputs, lambda name: is_within(name, before), front.after if front else None
            )
        return _found[network]

    def _inputs(self, network: nn.Module) -> probe.Inputs:
        """What shows how the network is connected."""
        if self.example is not None:
            return probe.Inputs.from_text(self.example)
        return probe.Inputs((probe.images(network, probe.training_size(network, self.input_size)),), {})


_found: WeakKeyDictionary[nn.Module, Narrowing] = WeakKeyDictionary()


def _network(sites: Sequence[Site[nn.Module]]) -> nn.Module:
    network = sites[0].network
    if network is None:
        raise ConfigError("slimming depends on the whole network: make the sites with core.sites.sites")
    return network


def _blockers(sites: Sequence[Site[nn.Module]], narrowing: Narrowing) -> str:
    """Each reason why layers stay whole, with the layers."""
    names: dict[str, list[str]] = {}
    for site in sites:
        names.setdefault(narrowing.why_whole(site.name), []).append(site.name)
    return "; ".join(f"{', '.join(held[:4])}{', ...' if len(held) > 4 else ''}: {why}" for why, held in names.items())


EXAMPLES = (
    Example(config=Slimmable(widths=(0.5, 1.0))),
    # at a fixed width the gate, two linear layers 8 -> 4 -> 2, does not run
    Example(config=Slimmable(widths=(0.5, 1.0), gate=True), params=4 * (8 * 8 * 9 + 8) + (4 * 8 + 4) + 2 * 4),
)


def full_capacity(layers: int, entries: int) -> list[Slimmable]:
    return [Slimmable(widths=(1.0,)), Slimmable(widths=(0.5, 1.0))]
