"""Which layers a technique replaces, and replacing them. Written once for all techniques."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from thriftnet.core.conv import AnyConvolution
from thriftnet.core.copied import copied
from thriftnet.core.fit import Progress, fitted
from thriftnet.core.fold import is_foldable
from thriftnet.core.history import history, record
from thriftnet.core.kept import keep_attributes, obstacle, parameter_ties
from thriftnet.core.plan import Plan, PlanRow
from thriftnet.core.sites import (
    Layer,
    Replacement,
    Select,
    Site,
    Want,
    names_by_module,
    replace,
    restoring,
    selection,
    sites,
)
from thriftnet.core.spec import format_spec
from thriftnet.core.technique import Technique, requires_all_layers, takes
from thriftnet.core.tied import count_params
from thriftnet.core.trial import MismatchError, Trial
from thriftnet.core.wrappers import inner_name
from thriftnet.errors import ConfigError, IncompatibleModelError


def dry_run(
    model: nn.Module,
    technique: Technique,
    *,
    select: Select | None = None,
    input_size: Sequence[int] | None = None,
    example: Any = None,
    images: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, Plan]:
    """A converted copy and its plan; the random state does not change."""
    _check_convertible(model)
    with torch.random.fork_rng(devices=[]):
        model = copied(model)
        return _prepare(model, technique, select, Trial(model, input_size, example), images, progress)


def convert(
    model: nn.Module,
    technique: Technique | Plan,
    *,
    select: Select | None = None,
    inplace: bool = False,
    input_size: Sequence[int] | None = None,
    example: Any = None,
    images: Tensor | None = None,
    progress: Progress | None = None,
    check: bool = True,
) -> nn.Module:
    """As `thriftnet.convert`, for a config or a plan that holds one; without ``check``, the result is not run."""
    _check_convertible(model)
    model = copied(model, inplace=inplace)
    trial = Trial(model, input_size, example) if check else None
    converted, done = _prepare(model, technique, select, trial, images, progress)
    fitted = {} if images is None else {"fitted_on": len(images)}
    record(converted, {"verb": "convert", "plan": done.to_dict(), **fitted})
    return converted


def tie(model: nn.Module, groups: Sequence[Sequence[str]]) -> nn.Module:
    """A copy of ``model`` in which the layers of each group, given by name, are one module, the first of them."""
    model = copied(model)
    table = {id(model.get_submodule(name)): model.get_submodule(names[0]) for names in groups for name in names[1:]}
    tied = replace(model, table)
    record(tied, {"verb": "tie", "groups": [list(names) for names in groups]})
    return tied


def _check_convertible(model: nn.Module) -> None:
    """Raise for what is no plain network."""
    if (name := inner_name(model)) is not None:
        raise IncompatibleModelError(
            f"{type(model).__name__} only wraps a network: convert that one, convert(model.{name}, ...), and wrap the result"
        )
    for parameter_name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise IncompatibleModelError(
                f"parameter {parameter_name!r} of {type(model).__name__} has no shape yet: run the network on one batch first"
            )
    if any(step["verb"] == "pack" for step in history(model)):
        raise IncompatibleModelError("a packed network has no plain layers: convert the network it was packed from")


def _prepare(
    model: nn.Module,
    technique: Technique | Plan,
    select: Select | None,
    trial: Trial | None,
    images: Tensor | None = None,
    progress: Progress | None = None,
) -> tuple[nn.Module, Plan]:
    """Convert ``model`` in place; the new network and the plan that was carried out. If it is refused, ``model`` is as before."""
    if isinstance(technique, Plan):
        if select is not None:
            raise ConfigError("a plan already names the layers: leave select out, or make a new plan with it")
        technique = dataclasses.replace(technique, technique=_sized(technique.technique, trial))
        config, groups = _planned_groups(model, technique)
    else:
        config = _sized(technique, trial)
        groups = config.group(_accepted(model, config, select))
    left = _left_alone(model, config, select, {id(site.module) for group in groups for site in group})
    if not groups:
        reasons = "; ".join(f"layer {name!r} is {reason}" for name, reason in left[:3]) or "it has no convolutions"
        hint = "" if takes(config) in reasons else f". It takes {takes(config)}"
        raise IncompatibleModelError(
            f"{format_spec(config)} finds nothing to convert in {type(model).__name__}: {reasons}{hint}"
        )
    before, names = count_params(model), names_by_module(model)
    described = {id(module): describe(module) for module in model.modules()}
    built = [_built(config, group) for group in groups]
    replaced = [pair for pairs in built for pair in pairs]
    keep_attributes(replaced, names)
    model_name = type(model).__name__
    restore = restoring(model)
    converted = replace(model, {id(old): new for old, new in replaced})
    not_checked = ""
    if trial is not None:
        try:
            not_checked = trial.compare(converted, [(names[id(old)][0], old, new) for old, new in replaced])
        except MismatchError as error:
            restore()
            hint = "" if error.layer is None else _leaving_out(config, error.layer)
            raise IncompatibleModelError(f"{format_spec(config)} does not fit {model_name}: {error}.{hint}") from error
    if images is not None:
        restore()
        converted = fitted(model, built, images, progress)
    rows: list[PlanRow] = []
    for number, (group, pairs) in enumerate(zip(groups, built, strict=True)):
        members = {id(site.module) for site in group}
        for old, new in pairs:
            in_group = number if id(old) in members else None
            rows.append(PlanRow(names[id(old)], described[id(old)], becomes(new), in_group, relative_error(old, new)))
    counts = before, count_params(converted)
    return converted, Plan(config, model_name, tuple(rows), tuple(left), *counts, not_checked=not_checked)


def _built(config: Technique, group: Sequence[Site[Any]]) -> list[Replacement]:
    """New layers for a group, in the old ones' modes, and frozen where these are."""
    for site in group:
        if (lost := obstacle(site.module)) is not None:
            raise IncompatibleModelError(f"layer {site.name!r} {lost}")
    pairs = config.build(group)
    _freeze_alike(pairs)
    for old, new in pairs:
        new.train(old.training)  # which may return nothing
    return pairs


def _sized(config: Any, trial: Trial | None) -> Any:
    """A config that runs the network itself, with the inputs that `convert` was given; others, and one that has some, as they are."""
    names = [name for name in ("input_size", "example") if hasattr(config, name)]
    if trial is None or not names or any(getattr(config, name) is not None for name in names):
        return config
    given = {"input_size": trial.input_size, "example": None if trial.example is None else trial.example.to_text()}
    return dataclasses.replace(config, **{name: given[name] for name in names})


def _freeze_alike(pairs: Sequence[Replacement]) -> None:
    """Replacements of frozen layers are frozen, unless a trainable layer shares them."""
    before = [(new, [p.requires_grad for p in old.parameters(recurse=False)]) for old, new in pairs]
    trained = {id(p) for new, flags in before if any(flags) or not flags for p in new.parameters()}
    for parameter in (p for new, _ in before for p in new.parameters() if id(p) not in trained):
        parameter.requires_grad_(False)


def _planned_groups(model: nn.Module, planned: Plan) -> tuple[Technique, list[list[Site[nn.Module]]]]:
    """The groups that a plan names, found in ``model``."""
    if isinstance(planned.technique, str) or not hasattr(planned.technique, "build"):
        raise ConfigError(f"the plan's technique {planned.technique!r} is text: use thriftnet.convert, which resolves it")
    config: Technique = planned.technique  # type: ignore[assignment]
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = set()
    for name in (name for group in planned.groups for name in group):
        if name not in modules or not config.accepts(modules[name]):
            found = describe(modules[name]) if name in modules else "missing"
            raise IncompatibleModelError(
                f"the plan was made for another network: layer {name!r} is {found}; it needs {takes(config)}. Make a new plan"
            )
        wanted.add(id(modules[name]))
    if requires_all_layers(config):
        groups = config.group(_accepted(model, config, None))
        missing = [site.name for group in groups for site in group if id(site.module) not in wanted]
        if missing:
            raise IncompatibleModelError(
                f"the plan was made for another network: {format_spec(config)} must take every layer, "
                f"but the plan leaves out {missing[0]!r}. Make a new plan"
            )
        return config, groups
    by_module = {id(site.module): site for site in sites(model, lambda _, module: id(module) in wanted)}
    return config, [[by_module[id(modules[name])] for name in group] for group in planned.groups]


def _accepted(model: nn.Module, technique: Technique, select: Select | None) -> list[Site[nn.Module]]:
    """Selected sites that the technique accepts."""
    want, ties = selection(model, select), parameter_ties(model)
    if requires_all_layers(technique):
        found = sites(model, lambda _, module: technique.accepts(module))
        _check_whole(model, technique, found, None if select is None else want)
        for own, other in (ties[id(site.module)] for site in found if id(site.module) in ties):
            raise IncompatibleModelError(
                f"{own!r} and {other!r} are one parameter, which {format_spec(technique)} would separate: give each layer its own"
            )
        return found
    found = sites(model, lambda name, module: want(name, module) and id(module) not in ties and technique.accepts(module))
    if select is not None:
        _check_selection(model, technique, select, want, found)
    return found


def _check_selection(
    model: nn.Module, technique: Technique, select: Select, want: Want, found: Sequence[Site[nn.Module]]
) -> None:
    """Raise if the technique accepts no selected layer, or not one that is listed by name."""
    listed = () if callable(select) or isinstance(select, str) else tuple(select)
    names = {name for site in found for name in site.names}
    for name in listed:
        if not any(held == name or held.startswith(f"{name}.") for held in names):
            raise _refusal(technique, name, model.get_submodule(name))
    if found:
        return
    matched = [(name, module) for name, module in model.named_modules() if want(name, module)]
    for name, module in sorted(matched, key=lambda pair: not isinstance(pair[1], Layer)):
        raise _refusal(technique, name, module)
    layers = [name for name, module in model.named_modules() if isinstance(module, Layer)]
    raise ConfigError(
        f"select={select!r} matches no layer of {type(model).__name__}. Its layers: {', '.join(layers[:8])}, ..."
    )


def _check_whole(model: nn.Module, technique: Technique, found: Sequence[Site[nn.Module]], chosen: Want | None) -> None:
    """Raise if a layer with parameters would be left out by a technique that must take all."""
    taken = {id(inner) for site in found for inner in site.module.modules()}
    for name, module in model.named_modules():
        owns = any(True for _ in module.parameters(recurse=False))
        inner = any(True for child in module.children() for _ in child.parameters())  # then it is changed with its layers
        if owns and not inner and id(module) not in taken:
            raise _refusal(technique, name, module)
    for site in found:
        if chosen is not None and not any(chosen(name, site.module) for name in site.names):
            raise IncompatibleModelError(
                f"{format_spec(technique)} must take every layer, but select leaves out {site.name!r}. Leave select out"
            )


def _refusal(technique: Technique, name: str, module: nn.Module) -> IncompatibleModelError:
    return IncompatibleModelError(
        f"layer {name!r} is {describe(module)}; {format_spec(technique)} takes {takes(technique)}.{_leaving_out(technique, name)}"
    )


def _leaving_out(technique: Technique, name: str) -> str:
    """How to convert all but one layer, as the last sentence of a message; nothing where all must be taken."""
    return "" if requires_all_layers(technique) else f" Exclude it: select=r'^(?!{name.replace('.', chr(92) + '.')}$)'"


def _left_alone(model: nn.Module, technique: Technique, select: Select | None, grouped: set[int]) -> list[tuple[str, str]]:
    """(name, reason) of each convolution that is not converted."""
    want, ties = selection(model, select), parameter_ties(model)
    taken = {id(inner) for module in model.modules() if id(module) in grouped for inner in module.modules()}
    left, every = [], requires_all_layers(technique)
    for name, module in model.named_modules():
        if id(module) in taken or not isinstance(module, Layer if every else AnyConvolution):
            continue
        if every:
            reason = technique.why_left(model, name) if hasattr(technique, "why_left") else "in no group of layers"
        elif not want(name, module):
            reason = "not selected" if select is not None else "the stem or the classifier"
        elif id(module) in ties:
            reason = "{!r} is one parameter with {!r}: new layers would not share it".format(*ties[id(module)])
        elif not technique.accepts(module):
            lost = obstacle(module)
            reason = f"{describe(module)} and {lost}" if lost else f"{describe(module)}, not {takes(technique)}"
        else:
            reason = f"{describe(module)}, in no group of layers that the config makes"
        left.append((name, reason))
    return left


def becomes(new: nn.Module) -> str:
    """A new layer's class; with the rank that it got, which may be lower than the one asked for."""
    rank = getattr(new, "rank", None)
    return type(new).__name__ + ("" if rank is None else f"(rank={rank})")


def describe(module: nn.Module) -> str:
    """A module in one line."""
    weight = getattr(module, "weight", None)
    kind = (
        f"complex {type(module).__name__}" if isinstance(weight, Tensor) and weight.is_complex() else type(module).__name__
    )
    text = " ".join(f"{kind}({module.extra_repr()})".split())
    return text if len(text) <= 120 else text[:117] + "..."


def relative_error(old: nn.Module, new: nn.Module) -> float | None:
    """``|new - old| / |old|`` of weight and bias of two convolutions or linear layers; None where one is neither, or has no data."""
    if any(parameter.is_meta for parameter in (*old.parameters(), *new.parameters())):
        return None
    folded = new.fold() if is_foldable(new) else new
    if not (isinstance(old, Layer) and isinstance(folded, Layer)) or old.weight.shape != folded.weight.shape:
        return None
    wide = torch.complex128 if old.weight.is_complex() else torch.float64
    if old.weight.shape != folded.weight.shape:
        return None
    before, after = (_values(layer).to(wide) for layer in (old, folded))
    error, norm = (after - before).norm(), before.norm()
    return float(error / norm if norm > 0 else error)


def _values(layer: Layer) -> Tensor:
    """Weight and bias in one row; a missing bias is zeros."""
    bias = layer.weight.new_zeros(len(layer.weight)) if layer.bias is None else layer.bias
    return torch.cat([layer.weight.detach().flatten(), bias.detach()])
