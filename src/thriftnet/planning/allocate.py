"""Settings of a technique for each set of layers, so that a network keeps to a budget at the least error.

Every set of layers that can be decided on alone has a few possible configs, which the technique lists (``choices``), each with a
cost and an error. Of all combinations within the budget the one with the least sum of errors is taken.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.by_pattern import ByPattern
from thriftnet.core.convert import relative_error
from thriftnet.core.moments import before_norms
from thriftnet.core.probe import Call, Size, image_calls, on_meta
from thriftnet.core.sites import Select, Site, selection, sites
from thriftnet.core.spec import format_spec
from thriftnet.core.technique import Technique, takes
from thriftnet.core.width import eval_mode
from thriftnet.errors import ConfigError, IncompatibleModelError
from thriftnet.measure.counting import layer_macs
from thriftnet.planning.budget import MEASURES, Budget
from thriftnet.text import short_count

UNITS = 16_384
Progress = Callable[[int, int], object]  # sets that are done, and all


@runtime_checkable
class Adjustable(Protocol):
    """A technique whose settings a budget can choose."""

    def choices(self, sites: Sequence[Site[Any]]) -> list[tuple[list[Site[Any]], list[Technique]]]:
        """Sets of layers that can be decided on apart from each other, each with the configs to choose from."""
        ...


@dataclass(frozen=True)
class Option:
    """What could become of a set of layers.

    Args:
        config: None leaves them as they are.
        cost: In the budget's measure.
        error: Sum over the layers of the squared relative error.
    """

    config: Technique | None
    cost: float
    error: float


def allocate(
    model: nn.Module,
    technique: Technique,
    budget: Budget,
    total: int,
    *,
    size: Size,
    select: Select | None = None,
    inputs: LayerInputs | None = None,
    progress: Progress | None = None,
) -> ByPattern:
    """The technique with settings of its own for each set of layers, within a budget.

    Args:
        model: The network.
        technique: What the settings do not say is taken from this config.
        budget: Of the whole network.
        total: What the network has of the budget's measure now.
        size: Channels, height and width of an image.
        select: Which layers may change.
        inputs: What each layer reads: errors are then those of outputs. Default: errors of weights, and of outputs for noise where a
            layer has no single weight.
        progress: Called after each set.

    Raises:
        ConfigError: The budget is out of reach.
        IncompatibleModelError: The technique has no settings to choose, or finds no layer.
    """
    if not isinstance(technique, Adjustable):
        raise IncompatibleModelError(
            f"{format_spec(technique)} has no settings that a budget could choose. A width is found by thriftnet search"
        )
    want = selection(model, select)
    found = sites(model, lambda name, module: want(name, module) and technique.accepts(module))
    sets = [(members, configs) for members, configs in technique.choices(found) if configs]
    if not sets:
        raise IncompatibleModelError(f"{format_spec(technique)} finds nothing to convert. It takes {takes(technique)}")
    judge = Judge(model, size, inputs, budget.measure)
    sets_of_options = []
    for number, (members, configs) in enumerate(sets, 1):
        kept = Option(None, sum(judge.cost([site.module], site) for site in members), 0.0)
        options = [option for config in configs if (option := judge.option(members, config)) is not None]
        sets_of_options.append([kept, *options])
        if progress is not None:
            progress(number, len(sets))
    rest = total - sum(options[0].cost for options in sets_of_options)
    chosen = least_error(sets_of_options, budget.limit - rest)
    if chosen is None:
        least = rest + sum(min(option.cost for option in options) for options in sets_of_options)
        if least >= total:
            raise ConfigError(
                f"{format_spec(technique)} does not lower {MEASURES[budget.measure]}: use another technique or budget"
            )
        raise ConfigError(
            f"{budget} is out of reach: {format_spec(technique)} leaves {short_count(least)} to {short_count(total)} "
            f"{MEASURES[budget.measure]} ({least / total:.0%} to 100%). Raise the budget, select more layers, or use another technique"
        )
    parts: dict[Technique, list[str]] = {}
    for (members, _), option in zip(sets, chosen, strict=True):
        if option.config is not None:
            parts.setdefault(option.config, []).extend(site.name for site in members)
    if not parts:
        raise ConfigError(f"{budget} is more than the network has: there is nothing to convert. Give a smaller budget")
    return ByPattern({f"^({'|'.join(map(re.escape, names))})$": config for config, names in parts.items()})


def least_error(sets: Sequence[Sequence[Option]], limit: float) -> list[Option] | None:
    """One option of each set: of those that cost at most ``limit`` in all, the least sum of errors; None if none is that cheap.

    A multiple-choice knapsack, solved by dynamic programming over costs in `UNITS` steps, rounded up.

    Example:
        >>> sets = [[Option(None, 9, 0.0), Option(None, 6, 0.2), Option(None, 3, 0.25)], [Option(None, 5, 0.0), Option(None, 1, 0.4)]]
        >>> [option.cost for option in least_error(sets, 10)]
        [3, 5]
    """
    cheapest = [min(option.cost for option in options) for options in sets]
    room = limit - sum(cheapest)
    if room < 0:
        return None
    unit = max(room / UNITS, 1e-9)
    best = torch.zeros(UNITS + 1, dtype=torch.float64)  # the least error of the sets so far, by what they may cost
    picks, spent = [], []
    for options, least in zip(sets, cheapest, strict=True):
        extra = [math.ceil((option.cost - least) / unit) for option in options]
        rows = torch.full((len(options), UNITS + 1), math.inf, dtype=torch.float64)
        for row, more, option in zip(rows, extra, options, strict=True):
            if more <= UNITS:
                row[more:] = best[: UNITS + 1 - more] + option.error
        best, pick = rows.min(0)
        picks.append(pick)
        spent.append(extra)
    left, chosen = UNITS, []
    for options, pick, extra in zip(reversed(sets), reversed(picks), reversed(spent), strict=True):
        place = int(pick[left])
        chosen.append(options[place])
        left -= extra[place]
    return chosen[::-1]


class Judge:
    """Costs and errors of new layers.

    Args:
        model: The network they are for.
        size: Channels, height and width of an image.
        inputs: As in `allocate`.
        measure: Of costs.
    """

    def __init__(self, model: nn.Module, size: Size, inputs: LayerInputs | None, measure: str = "params") -> None:
        self.measure, self.shapes, self.inputs = measure, _shapes(model, size), inputs or LayerInputs({}, frozenset())

    def option(self, members: Sequence[Site[Any]], config: Technique) -> Option | None:
        """A config for a set of layers; None where it does not take them."""
        try:
            groups = config.group(members)
            pairs = [pair for group in groups for pair in config.build(group)]
        except IncompatibleModelError:
            return None
        new = {id(old): layer.eval() for old, layer in pairs}
        if not new:
            return None
        layers = [new.get(id(site.module), site.module) for site in members]
        error = sum(self.error(site, new[id(site.module)]) ** 2 for site in members if id(site.module) in new)
        if self.measure == "macs":
            return Option(config, sum(map(self._macs, members, layers)), error)
        return Option(config, self._stored(layers), error)

    def cost(self, layers: Sequence[nn.Module], site: Site[Any]) -> float:
        """Of a layer as it is."""
        return self._macs(site, site.module) if self.measure == "macs" else self._stored(layers)

    def _stored(self, layers: Sequence[nn.Module]) -> float:
        held: dict[int, Tensor] = {id(tensor): tensor for layer in layers for tensor in layer.parameters()}
        if self.measure == "bytes":
            held |= {id(tensor): tensor for layer in layers for tensor in layer.buffers()}
            return sum(tensor.numel() * tensor.element_size() for tensor in held.values())
        return sum(tensor.numel() for tensor in held.values())

    def _macs(self, site: Site[Any], layer: nn.Module) -> float:
        ghost = on_meta(layer)
        calls = sum((self.shapes.get(name, Counter()) for name in site.names), Counter[tuple[int, ...]]())
        return sum(times * layer_macs(ghost, shape) for shape, times in calls.items())

    @torch.no_grad()
    def error(self, site: Site[Any], layer: nn.Module) -> float:
        """Relative error of a layer's outputs, less their means, if inputs are known, else of its weight if there is one.

        Where a batch norm follows, an output's scale is free.
        """
        old = site.module
        x = self.inputs.tensors.get(id(old))
        if x is None:
            error = relative_error(old, layer)
            if error is not None:
                return error
            x = self._noise(site)
        axis = 1 if isinstance(old, nn.Conv2d) else -1
        with eval_mode(old):
            right, got = (out.movedim(axis, 0).flatten(1) for out in (old(x), layer(x)))
        right, got = (rows - rows.mean(1, keepdim=True) for rows in (right, got))
        if id(old) in self.inputs.rescaled:
            right, got = (F.normalize(rows, dim=1) for rows in (right, got))
            got = got * (got * right).sum(1, keepdim=True).clamp_min(0)
        return float((got - right).norm() / right.norm().clamp_min(1e-30))

    def _noise(self, site: Site[Any]) -> Tensor:
        shape = next((shape for name in site.names for shape in self.shapes.get(name, ())), None)
        if shape is None:
            raise IncompatibleModelError(f"layer {site.name!r} never runs: leave it out with exclude={site.name!r}")
        like = next(site.module.parameters())
        generator = torch.Generator().manual_seed(0)
        return torch.randn(1, *shape, generator=generator).relu().to(like)  # most convolutions follow a ReLU


def _shapes(model: nn.Module, size: Size) -> dict[str, Counter[tuple[int, ...]]]:
    """How often each module reads tensors of each shape, without the batch, in one run of the network."""
    found: dict[str, Counter[tuple[int, ...]]] = {}
    calls: list[Call] = image_calls(model, size)
    for call in calls:
        if call.inputs and isinstance(call.inputs[0], Tensor) and call.inputs[0].dim() > 1:
            tensor = call.inputs[0]
            images = max(1, tensor.shape[0] // 2)  # the run has two images; windows of attention are more
            found.setdefault(call.name, Counter())[tuple(tensor.shape[1:])] += images
    return found


@dataclass(frozen=True)
class LayerInputs:
    """What layers read when the network sees images.

    Args:
        tensors: By the layer's id.
        rescaled: Ids of layers whose outputs go to a batch norm only.
    """

    tensors: Mapping[int, Tensor]
    rescaled: frozenset[int]


@torch.no_grad()
def layer_inputs(model: nn.Module, modules: Sequence[nn.Module], images: Tensor, rows: int = 32) -> LayerInputs:
    """What modules read when the network sees images: in the first run of each, at most ``rows`` of the batch."""
    found: dict[int, Tensor] = {}

    def note(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if id(module) not in found:
            found[id(module)] = args[0][:rows].detach().clone()

    handles = [module.register_forward_pre_hook(note) for module in modules]
    try:
        with eval_mode(model):
            model(images)
            rescaled = before_norms(model, modules, images[:2])
    finally:
        for handle in handles:
            handle.remove()
    if any(not bool(tensor.isfinite().all()) for tensor in found.values()):
        raise ConfigError("the network computes NaN or infinity for these images: its weights, or the data, are broken")
    return LayerInputs(found, rescaled)
