"""What to convert, and how far: a plan for a budget, and a comparison of the techniques."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from thriftnet.arguments import InputSize, checked
from thriftnet.core import convert as core
from thriftnet.core import probe
from thriftnet.core.batches import first_images
from thriftnet.core.fit import IMAGES as FIT_IMAGES
from thriftnet.core.plan import Plan
from thriftnet.core.sites import Select, Site, selection, without
from thriftnet.core.spec import spec_name
from thriftnet.core.technique import Technique
from thriftnet.errors import ConfigError, IncompatibleModelError
from thriftnet.measure import Report, inspect
from thriftnet.planning.allocate import Adjustable, Judge, LayerInputs, Progress, allocate, layer_inputs
from thriftnet.planning.budget import Limit, read_budget
from thriftnet.techniques import TECHNIQUES, TechniqueLike, convert, resolve

if TYPE_CHECKING:
    from torch import nn

IMAGES = 32  # for the errors of layers


@checked
def plan(
    model: nn.Module,
    technique: TechniqueLike,
    *,
    select: Select | None = None,
    exclude: Select | None = None,
    params: Limit = None,
    macs: Limit = None,
    bytes: Limit = None,
    data: Iterable[Any] | None = None,
    input_size: InputSize | None = None,
    example: Any = None,
    progress: Progress | None = None,
) -> Plan:
    """What `convert` would do to ``model``; the network and the random state do not change.

    With a budget, the settings of the technique (templates, ranks, rate, expansion) are chosen for each set of layers that can be
    decided on alone, so that the sum of the layers' squared errors is small: it is the technique's config in the plan. With data, the
    layers are fitted as `convert` fits them, and errors are those of their outputs.

    Args:
        model: Any network.
        technique: A technique's config, its text or JSON form, or a mapping from regular expressions to these.
        select: Which layers, as in `convert`.
        exclude: Which of them to leave alone, in the same forms.
        params: At most so many stored parameters: a share in (0, 1) of what the network has, or a number, as "300K".
        macs: At most so many multiply-accumulates for one image, in the same forms.
        bytes: At most so many bytes of parameters and buffers, as "1MB".
        data: As in `convert`. Give it to both, or to neither.
        input_size: Channels, height and width of an image. Default: the size the network states, or one it runs on.
        example: What the network reads, if not images: a tensor, a tuple of arguments, or a dict of arguments by name.
        progress: Called with the sets of layers that a budget has decided on, and their number; then with those that are fitted.

    Raises:
        ConfigError, IncompatibleModelError: As `convert`; or the budget is out of reach.
        DataError: The data has no images.

    Example:
        >>> import thriftnet as tn
        >>> planned = tn.plan(tn.create_model("resnet20"), "soft-sharing", params=0.7)
        >>> planned.params_after <= 0.7 * planned.params_before
        True
    """
    config, chosen = resolve(technique), without(model, select, exclude)
    before = _counts(model, input_size)
    whole = _whole(before) if before else {}
    asked = {"params": params, "macs": macs, "bytes": bytes}
    if before is None and any(value is not None for value in asked.values()):
        probe.input_size(model, input_size)  # raises, and says why
        raise IncompatibleModelError(
            f"{type(model).__name__} cannot be counted on the meta device, so it cannot keep to a budget"
        )
    budget = read_budget(whole, **asked)
    images = None if data is None else first_images(data, FIT_IMAGES, "a plan")
    with torch.random.fork_rng(devices=[]):
        inputs = None if images is None else _inputs(model, config, chosen, images)
        if budget is not None and before is not None:
            size, total = before.input_size, whole[budget.measure]
            config = allocate(model, config, budget, total, size=size, select=chosen, inputs=inputs, progress=progress)
        converted, planned = core.dry_run(
            model, config, select=chosen, input_size=input_size, example=example, images=images, progress=progress
        )
        if before is not None and (budget is not None or inputs is not None):
            planned = _with_errors(planned, model, converted, Judge(model, before.input_size, inputs))
    after = before and _counts(converted, before.input_size)
    if before is None or after is None:
        return planned
    return dataclasses.replace(planned, macs_before=before.macs, macs_after=after.macs, size_bytes=after.size_bytes)


@checked
def suggest(
    model: nn.Module,
    *,
    params: Limit = None,
    macs: Limit = None,
    bytes: Limit = None,
    techniques: Sequence[TechniqueLike] | None = None,
    select: Select | None = None,
    exclude: Select | None = None,
    data: Iterable[Any] | None = None,
    input_size: InputSize | None = None,
    progress: Callable[[str], object] | None = None,
) -> list[Plan]:
    """Plans of all techniques, and of useful pairs, that keep to a budget, the one with the least error first.

    In a pair the first technique goes half of the way, in ratios, and the second the rest. Errors are those of layers, before any
    training: they tell which plans are worth training, not how accurate a trained network will be.

    Args:
        model: Any network.
        params: As in `plan`; exactly one budget is needed.
        macs: As in `plan`.
        bytes: As in `plan`.
        techniques: Those to compare, without pairs. Default: all that have settings to choose, and their pairs.
        select: As in `plan`.
        exclude: As in `plan`.
        data: As in `plan`.
        input_size: As in `plan`.
        progress: Called with the name of each technique or pair, before it is planned.

    Raises:
        ConfigError: No budget or several; or none of the techniques reaches it: the error says why for each.

    Example:
        >>> import thriftnet as tn
        >>> best, *others = tn.suggest(tn.create_model("resnet20"), params=0.5)
        >>> small = tn.convert(tn.create_model("resnet20"), best)
    """
    asked = {name: value for name, value in (("params", params), ("macs", macs), ("bytes", bytes)) if value is not None}
    if len(asked) != 1:
        raise ConfigError(
            f"give exactly one budget: params=, macs= or bytes=, as params=0.5; got {', '.join(asked) or 'none'}"
        )
    images = None if data is None else [first_images(data, FIT_IMAGES, "a plan")]
    common: Any = {"data": images, "input_size": input_size}
    chosen = without(model, select, exclude)
    configs = [resolve(each) for each in techniques] if techniques else [TECHNIQUES[name]() for name in TECHNIQUES]
    if not techniques:
        configs = [config for config in configs if isinstance(config, Adjustable)]
    plans, refused = [], []
    for first in configs:
        partners = () if techniques else getattr(first, "partners", ())
        for second in (None, *map(resolve, partners)):
            name = spec_name(type(first).__name__) + (f", then {spec_name(type(second).__name__)}" if second else "")
            if progress is not None:
                progress(name)
            try:
                plans.append(_planned(model, first, second, asked, chosen, common))
            except (ConfigError, IncompatibleModelError) as error:
                refused.append(f"{name}: {error}")
    if not plans:
        raise ConfigError(f"no technique keeps to this budget. {'; '.join(refused)}")
    return sorted(plans, key=lambda each: each.error)


def _planned(
    model: nn.Module, first: Technique, second: Technique | None, asked: dict[str, Any], select: Select | None, common: Any
) -> Plan:
    """The plan of one technique, or of two."""
    if second is None:
        return plan(model, first, **asked, select=select, **common)
    before = _counts(model, common["input_size"])
    if before is None:
        raise IncompatibleModelError(f"{type(model).__name__} cannot be counted on the meta device")
    whole = _whole(before)
    ((measure, budget),) = ((name, read_budget(whole, **{name: value})) for name, value in asked.items())
    if budget is None:
        raise ConfigError("a pair needs a budget")
    half: Any = {measure: math.sqrt(budget.limit * whole[measure])}
    whole_way: Any = {measure: budget.limit}
    start = plan(model, first, **half, select=select, **common)
    converted = convert(model, start, data=common["data"])
    return dataclasses.replace(start, then=plan(converted, second, **whole_way, **common))


def _with_errors(planned: Plan, model: nn.Module, converted: nn.Module, judge: Judge) -> Plan:
    """The plan with errors of outputs: with data, or where there is none of the weight."""
    rows = []
    for row in planned.rows:
        measured = row.group is not None and (bool(judge.inputs) or row.relative_error is None)
        error = None
        if measured:
            site = Site(row.names, model.get_submodule(row.names[0]))
            error = judge.error(site, converted.get_submodule(row.names[0]).eval())
        rows.append(dataclasses.replace(row, output_error=error))
    return dataclasses.replace(planned, rows=tuple(rows))


def _whole(report: Report) -> dict[str, int]:
    """What a network has of each measure that a budget may limit."""
    return {"params": report.params, "macs": report.macs, "bytes": report.size_bytes}


def _counts(model: nn.Module, size: Sequence[int] | None) -> Report | None:
    """Parameters and cost, found on the meta device; None for a network that does not run there."""
    try:
        return inspect(probe.on_meta(model), probe.input_size(model, size))
    except (IncompatibleModelError, RuntimeError, TypeError):
        return None


def _inputs(model: nn.Module, technique: Technique, select: Select | None, images: Tensor) -> LayerInputs:
    """What the layers that may be converted read, for a few images."""
    like = next(p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point())
    want = selection(model, select)
    modules = [module for name, module in model.named_modules() if want(name, module) and technique.accepts(module)]
    return layer_inputs(model, modules, images[:IMAGES].to(like))


__all__ = ["plan", "suggest"]
