"""The verbs. Each is written once and names no technique."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn

from thriftnet.core import probe
from thriftnet.core.conv import GeneratedConv2d
from thriftnet.core.fold_norms import fold_norms_of
from thriftnet.core.linear import GeneratedLinear
from thriftnet.core.penalty import PenaltyTerm as PenaltyTerm
from thriftnet.core.penalty import param_groups as param_groups
from thriftnet.core.penalty import penalty as penalty
from thriftnet.core.plan import Plan, PlanRow
from thriftnet.core.sites import Replacement, Select, Site, Want, default_select, replace, selection, sites
from thriftnet.core.spec import check_choice, format_spec
from thriftnet.core.technique import Technique, adapted, finish, is_whole, takes
from thriftnet.core.width import Width, set_width, widths
from thriftnet.core.width import width as selected_width
from thriftnet.core.width_slots import Choice, assign
from thriftnet.errors import ConfigError, IncompatibleModelError

if TYPE_CHECKING:
    from typing_extensions import TypeIs

HISTORY = "thriftnet_history"  # attribute of a network: what was done to it, for save and load


def plan(model: nn.Module, technique: Technique, *, select: Select | None = None) -> Plan:
    """What `convert` would do to ``model``; the network and the random state stay as they are.

    Raises:
        ConfigError, IncompatibleModelError: As `convert`.
    """
    with torch.random.fork_rng(devices=[]):
        return _prepare(_copied(model), technique, select)[1]


def convert(
    model: nn.Module, technique: Technique | Plan, *, select: Select | None = None, inplace: bool = False
) -> nn.Module:
    """Make a network small with a technique, starting from the weights it has.

    Args:
        model: Any network; it is left untouched unless ``inplace``.
        technique: A technique's config, or a plan made by `plan`.
        select: Which layers: a regular expression on module names, a list of names, or ``(name, module) -> bool``.
            Left out, everything but stem and classifier.
        inplace: Replace the layers in ``model`` itself.

    Returns:
        The converted network.

    Raises:
        ConfigError: ``select`` matches nothing, or names a layer that does not exist.
        IncompatibleModelError: A listed layer that the technique cannot take, or nothing to convert.
    """
    if not inplace:
        model = _copied(model)
    converted, done = _prepare(model, technique, select)
    record(converted, {"verb": "convert", "plan": done.to_dict()})
    return converted


def _copied(model: nn.Module) -> nn.Module:
    if not isinstance(model, nn.Module):
        raise ConfigError(f"a network is needed, got {model!r}. Build one by name with create_model(...)")
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        reason = str(error).split(".")[0]
        raise IncompatibleModelError(
            f"{type(model).__name__} cannot be copied ({reason}): remove what computes its weights, as weight_norm or pruning, first"
        ) from None


def record(model: nn.Module, step: dict[str, Any]) -> None:
    """Note in the network what was done to it."""
    setattr(model, HISTORY, [*history(model), step])


def history(model: nn.Module) -> list[dict[str, Any]]:
    """What was done to the network since it was a plain one, oldest first; JSON-ready."""
    return list(getattr(model, HISTORY, []))


def _prepare(model: nn.Module, technique: Technique | Plan, select: Select | None) -> tuple[nn.Module, Plan]:
    """Convert ``model`` in place; the new network and the plan that was carried out."""
    if any(step["verb"] == "pack" for step in history(model)):
        raise IncompatibleModelError("a packed network is no longer made of plain layers: convert what it was packed from")
    if isinstance(technique, Plan):
        if select is not None:
            raise ConfigError("a plan already says which layers: leave select out, or make a new plan with it")
        config, groups = _planned_groups(model, technique)
    else:
        config = adapted(technique, model)
        groups = config.group(_accepted(model, config, select))
    left = _left_alone(model, config, select, {id(site.module) for group in groups for site in group})
    if not groups:
        reasons = "; ".join(f"layer {name!r} is {reason}" for name, reason in left[:3])
        raise IncompatibleModelError(
            f"{format_spec(config)} finds nothing to convert in {type(model).__name__}: "
            f"{reasons or f'it has no convolutions. It takes {takes(config)}'}"
        )
    before = count_params(model)
    rows: list[PlanRow] = []
    table: dict[int, nn.Module] = {}
    for number, group in enumerate(groups):
        for site in group:
            _check_hooks(site)
        described = {id(site.module): describe(site.module) for site in group}
        names = {id(site.module): site.names for site in group}
        pairs = config.build(group)
        _freeze_alike(pairs)
        for old, new in pairs:
            table[id(old)] = new.train(old.training)
            rows.append(PlanRow(names[id(old)], described[id(old)], type(new).__name__, number, relative_error(old, new)))
    model_name = type(model).__name__
    converted = replace(model, table)
    finish(config, converted)
    return converted, Plan(config, model_name, tuple(rows), tuple(left), before, count_params(converted))


def _check_hooks(site: Site[nn.Module]) -> None:
    """A new layer would lose what hooks do; weight norm and pruning work by hooks, too."""
    if site.module._forward_hooks or site.module._forward_pre_hooks:
        raise IncompatibleModelError(
            f"layer {site.name!r} has forward hooks, which a new layer would lose. Remove them first, and add them again after"
        )


def _freeze_alike(pairs: Sequence[Replacement]) -> None:
    """Where a layer does not train, what replaces it does not, unless a layer that trains uses it, too."""
    before = [(new, [p.requires_grad for p in old.parameters(recurse=False)]) for old, new in pairs]
    trained = {id(p) for new, flags in before if any(flags) or not flags for p in new.parameters()}
    for new, _ in before:
        for parameter in new.parameters():
            if id(parameter) not in trained:
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
    if is_whole(config):
        for site in sites(model, lambda _, module: config.accepts(module)):
            if id(site.module) not in wanted:
                raise IncompatibleModelError(
                    f"the plan was made for another network: {format_spec(config)} must take every layer, "
                    f"but the plan leaves out {site.name!r}. Make a new plan"
                )
    by_module = {id(site.module): site for site in sites(model, lambda _, module: id(module) in wanted)}
    return config, [[by_module[id(modules[name])] for name in group] for group in planned.groups]


def _accepted(model: nn.Module, technique: Technique, select: Select | None) -> list[Site[nn.Module]]:
    """Sites that are selected and that the technique can take."""
    if is_whole(technique):
        found = sites(model, lambda _, module: technique.accepts(module))
        chosen = None if select is None else selection(model, select)
        _check_whole(model, technique, found, chosen)
        return found
    want = default_select(model) if select is None else selection(model, select)
    found = sites(model, lambda name, module: want(name, module) and technique.accepts(module))
    if select is not None:
        _check_selection(model, technique, select, want, found)
    return found


def _check_selection(
    model: nn.Module, technique: Technique, select: Select, want: Want, found: Sequence[Site[nn.Module]]
) -> None:
    """Raise when nothing selected can be taken, or a layer listed by its own name cannot."""
    listed = () if callable(select) or isinstance(select, str) else tuple(select)
    names = {name for site in found for name in site.names}
    for name in listed:
        if not any(held == name or held.startswith(f"{name}.") for held in names):
            raise _refusal(technique, name, model.get_submodule(name))
    if found:
        return
    matched = [(name, module) for name, module in model.named_modules() if want(name, module)]
    for name, module in sorted(matched, key=lambda pair: not _is_layer(pair[1])):
        raise _refusal(technique, name, module)
    layers = [name for name, module in model.named_modules() if _is_layer(module)]
    raise ConfigError(
        f"select={select!r} matches no layer of {type(model).__name__}. Its layers: {', '.join(layers[:8])}, ..."
    )


def _check_whole(model: nn.Module, technique: Technique, found: Sequence[Site[nn.Module]], chosen: Want | None) -> None:
    """Raise when a layer with parameters would be left out by a technique that must take all."""
    taken = {id(inner) for site in found for inner in site.module.modules()}
    for name, module in model.named_modules():
        owns = any(True for _ in module.parameters(recurse=False))
        if owns and id(module) not in taken:
            raise _refusal(technique, name, module)
    for site in found if chosen is not None else ():
        if chosen is not None and not any(chosen(name, site.module) for name in site.names):
            raise IncompatibleModelError(
                f"{format_spec(technique)} must take every layer, but select leaves out {site.name!r}. Leave select out"
            )


def _refusal(technique: Technique, name: str, module: nn.Module) -> IncompatibleModelError:
    hint = "" if is_whole(technique) else f" Exclude it: select=r'^(?!{name.replace('.', chr(92) + '.')}$)'"
    return IncompatibleModelError(
        f"layer {name!r} is {describe(module)}; {format_spec(technique)} takes {takes(technique)}.{hint}"
    )


def _left_alone(model: nn.Module, technique: Technique, select: Select | None, grouped: set[int]) -> list[tuple[str, str]]:
    """(name, reason) of each convolution that is not converted."""
    want = default_select(model) if select is None else selection(model, select)
    taken = {id(inner) for module in model.modules() if id(module) in grouped for inner in module.modules()}
    left = []
    for name, module in model.named_modules():
        if id(module) in taken or not isinstance(module, nn.Conv2d | GeneratedConv2d):
            continue
        if not want(name, module):
            reason = "not selected" if select is not None else "the stem or the classifier"
        elif not technique.accepts(module):
            reason = f"{describe(module)}, not {takes(technique)}"
        else:
            reason = f"{describe(module)}, in no group of layers that the config makes"
        left.append((name, reason))
    return left


def _is_layer(module: nn.Module) -> TypeIs[nn.Conv2d | nn.Linear | GeneratedConv2d | GeneratedLinear]:
    return isinstance(module, nn.Conv2d | nn.Linear | GeneratedConv2d | GeneratedLinear)


def describe(module: nn.Module) -> str:
    """A module in one line."""
    text = f"{type(module).__name__}({module.extra_repr()})"
    return text if len(text) <= 120 else text[:117] + "..."


def relative_error(old: nn.Module, new: nn.Module) -> float | None:
    """``|new - old| / |old|`` of the weights of two convolutions or linear layers; None where one is neither, or has no data."""
    folded = new.fold() if is_foldable(new) else new
    if not (_is_layer(old) and isinstance(folded, nn.Conv2d | nn.Linear)):
        return None
    before, after = old.weight.detach().double(), folded.weight.detach().double()
    if before.shape != after.shape or before.is_meta or after.is_meta:
        return None
    norm = before.norm()
    return float((after - before).norm() / norm) if norm > 0 else float((after - before).norm())


def count_params(model: nn.Module) -> int:
    """Stored parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


class Foldable(Protocol):
    """A layer that can turn itself into plainer ones."""

    training: bool

    def fold(self) -> nn.Module:
        """Layers that compute the same; those among them that fold further are folded in turn, tied ones once."""
        ...


def is_foldable(module: nn.Module) -> TypeIs[Foldable]:  # type: ignore[narrowed-type-not-subtype]
    """Whether the module can turn itself into plain layers."""
    return callable(getattr(type(module), "fold", None))


PREFERENCES = ("", "speed", "size")


def fold(model: nn.Module, *, inplace: bool = False, prefer: str = "") -> nn.Module:
    """The same function in `torch.nn` layers only, at the selected width.

    Layers that were tied stay tied. A network without converted layers comes back as it is.

    Args:
        model: The network, in eval mode.
        inplace: Replace the layers in ``model`` itself.
        prefer: "" makes one layer of every converted one. With "speed" or "size" a layer that runs faster, or stores
            less, as two plain layers becomes those: a filter basis of a low rank.

    Raises:
        ConfigError: Another preference.
        IncompatibleModelError: A converted layer is in training mode, where the function depends on the batch.
    """
    for name, module in model.named_modules():
        if is_foldable(module) and module.training:
            raise IncompatibleModelError(
                f"layer {name!r} is in training mode; folding is exact in eval mode only. Call model.eval() first"
            )
    check_choice("prefer", prefer, PREFERENCES)
    plain = model if inplace else copy.deepcopy(model)
    selected = {"width": selected_width(plain)} if widths(plain) else {}
    folded: set[int] = set()
    while found := sites(plain, lambda _, module: is_foldable(module) and id(module) not in folded):
        table = {id(site.module): _folded(cast(Foldable, site.module), prefer) for site in found}
        folded.update(id(layer) for layer in table.values())
        plain = replace(plain, table)
    record(plain, {"verb": "fold", **({"prefer": prefer} if prefer else {}), **selected})
    return plain


def _folded(layer: Foldable, prefer: str) -> nn.Module:
    """What a layer folds into: a layer that has a choice makes it in ``fold_for(prefer)``."""
    choose = getattr(layer, "fold_for", None)
    return layer.fold() if choose is None else cast(nn.Module, choose(prefer))


def tie(model: nn.Module, groups: Sequence[Sequence[str]]) -> nn.Module:
    """A copy of ``model`` in which the layers of each group are one module, the first of them.

    Args:
        model: The network.
        groups: Lists of module names.
    """
    model = copy.deepcopy(model)
    table = {id(model.get_submodule(name)): model.get_submodule(names[0]) for names in groups for name in names[1:]}
    tied = replace(model, table)
    record(tied, {"verb": "tie", "groups": [list(names) for names in groups]})
    return tied


def freeze(
    model: nn.Module,
    width: Choice,
    *,
    fold_norms: bool = False,
    input_size: Sequence[int] | None = None,
) -> nn.Module:
    """A plain network, in eval mode, that computes what ``model`` does at one of its widths. Its weights are copies.

    Args:
        model: A network of several widths.
        width: One width for all of it; or a width for each part that can have its own; or widths by regular expressions on the
            names of layers, where the first that is found counts, and the largest if none is. What the history of a
            frozen network holds is taken, too: JSON text.
        fold_norms: Fold batch norms into the convolutions before them, where nothing else reads those.
        input_size: Channels, height and width of an image, for finding out which layers belong together. Left out, as the
            network says or as is found by trying.

    Raises:
        IncompatibleModelError: The network has one width only, or a layer can have none of its own.
        ConfigError: It has no such width, or widths that do not fit together.
    """
    if isinstance(width, str) and width.startswith("{"):
        return freeze(model, **_from_text(width))
    _check_slimmable(model)
    options = ({"fold_norms": True} if fold_norms else {}) | ({"input_size": list(input_size)} if input_size else {})
    uniform = not isinstance(width, Mapping | list | tuple)
    size = None if uniform and not fold_norms else probe.input_size(model, input_size)
    model = copy.deepcopy(model).eval()
    if isinstance(width, Mapping | list | tuple):
        assign(model, width, size or ())
    else:
        set_width(model, cast(Width, width))
    frozen = fold(model, inplace=True)
    if fold_norms:
        frozen = fold_norms_of(frozen, size or ())
    step = {"verb": "freeze", "width": width if uniform and not options else json.dumps({"width": width, **options})}
    setattr(frozen, HISTORY, [*history(frozen)[:-1], step])
    return frozen


def _from_text(text: str) -> dict[str, Any]:
    """Arguments of `freeze` as a frozen network's history holds them."""
    try:
        given = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"cannot read the widths {text!r}: {error}") from None
    if "width" not in given or not given.keys() <= {"width", "fold_norms", "input_size"}:
        raise ConfigError(f"widths as text are JSON with the keys width, fold_norms, input_size; got {sorted(given)}")
    return dict(given)


def _check_slimmable(model: nn.Module) -> None:
    """Raise for a network that was taken out of a slimmable one."""
    if not widths(model) and any(step["verb"] == "freeze" for step in history(model)):
        raise IncompatibleModelError(
            f"{type(model).__name__} has one width only, since it was frozen. Freeze the network that it was taken from"
        )
