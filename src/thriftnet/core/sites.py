"""Finding layers in a network and replacing them everywhere they are reachable."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Generic, TypeAlias, TypeVar

from torch import nn

from thriftnet.core.conv import AnyConvolution
from thriftnet.core.linear import GeneratedLinear
from thriftnet.core.patterns import matcher
from thriftnet.errors import ConfigError, unknown_name

M = TypeVar("M", bound=nn.Module, covariant=True)

Want: TypeAlias = Callable[[str, nn.Module], bool]
Select: TypeAlias = Annotated[
    str | Sequence[str] | set[str] | frozenset[str] | Want,
    "a regular expression, a list of names, or (name, module) -> bool",
]
Replacement: TypeAlias = tuple[nn.Module, nn.Module]
Layer: TypeAlias = AnyConvolution | nn.Linear | GeneratedLinear


@dataclass(frozen=True)
class Site(Generic[M]):
    """A module, and every name it has in the network.

    Args:
        names: Dotted names, in registration order.
        module: The module itself.
        role: "stem" for the layer that reads the image, "classifier" for the one that outputs the classes, else "body".
        network: The network it is in, for techniques that depend on how layers are connected.
    """

    names: tuple[str, ...]
    module: M
    role: str = "body"
    network: nn.Module | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]


def sites(model: nn.Module, want: Want) -> list[Site[nn.Module]]:
    """Modules for which ``want(name, module)`` holds, each once, with all its names, in registration order.

    Modules inside a wanted module are not searched.
    """
    roles = dict(zip(map(id, ends(model)), ("stem", "classifier"), strict=True))
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    inside: list[str] = []
    for name, module in model.named_modules(remove_duplicate=False):
        if any(name.startswith(prefix) for prefix in inside[-1:]):
            continue
        if want(name, module):
            found.setdefault(id(module), (module, []))[1].append(name)
            inside.append(f"{name}." if name else "")
    return [Site(tuple(names), module, roles.get(id(module), "body"), model) for module, names in found.values()]


def without(model: nn.Module, select: Select | None, exclude: Select | None) -> Select | None:
    """``select`` without the layers that ``exclude`` selects; both as in `selection`.

    Raises:
        ConfigError: As `selection`; or ``exclude`` matches nothing.
    """
    if exclude is None:
        return select
    want, unwanted = selection(model, select), selection(model, exclude)
    layers = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
    out = {name for name, module in layers if unwanted(name, module)}
    if not out:
        raise ConfigError(f"exclude={exclude!r} matches no layer: leave it out, or correct it")
    kept = {name for name, module in layers if name not in out and want(name, module)}
    return lambda name, module: name in kept


def names_by_module(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """All names of every module, by its id."""
    found: dict[int, tuple[str, ...]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[id(module)] = (*found.get(id(module), ()), name)
    return found


def replace(model: nn.Module, table: Mapping[int, nn.Module]) -> nn.Module:
    """Swap modules, given as {id of the old: new}, in every place they are registered. Ties survive."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in table:
                parent._modules[key] = table[id(child)]
    return table.get(id(model), model)


def restoring(model: nn.Module) -> Callable[[], None]:
    """A function that puts every module of ``model`` back into the places where it is registered now."""
    places = [(module, dict(module._modules)) for module in model.modules()]

    def restore() -> None:
        for module, children in places:
            module._modules.update(children)

    return restore


def group_by(found: Sequence[Site[M]], key: Callable[[Site[M]], Hashable]) -> list[list[Site[M]]]:
    """Sites of equal key together, groups and members in the order met."""
    groups: dict[Hashable, list[Site[M]]] = {}
    for site in found:
        groups.setdefault(key(site), []).append(site)
    return list(groups.values())


def ends(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    """The stem (the first convolution or linear layer) and the classifier of a network, by registration order.

    The classifier is the last linear layer or, in a network without one, a last 1 x 1 convolution that no norm
    follows. None where there is no such layer.
    """
    weighted: list[nn.Module] = []
    norm_follows = False
    for module in model.modules():
        if isinstance(module, Layer):
            weighted.append(module)
            norm_follows = False
        elif isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm | nn.LayerNorm):
            norm_follows = True
    linears = [module for module in weighted if isinstance(module, nn.Linear | GeneratedLinear)]
    stem = weighted[0] if weighted else None
    if linears:
        return stem, linears[-1] if linears[-1] is not stem else None
    last = weighted[-1] if len(weighted) > 1 else None
    is_head = last is not None and all(side == 1 for side in last.kernel_size) and not norm_follows  # type: ignore[union-attr]
    return stem, last if is_head else None


def selection(model: nn.Module, select: Select | None) -> Want:
    """``select`` as a predicate on ``(name, module)``.

    Args:
        model: The network.
        select: A regular expression searched for in module names; a list of names (a container's name selects all
            its layers); a callable ``(name, module) -> bool``; or one of the `PRESETS`. Default: everything except stem and
            classifier, small layers that the papers do not convert.

    Raises:
        ConfigError: The expression is malformed, or a listed name or a preset does not exist.
    """
    if isinstance(select, str) and select.startswith(PRESET):
        if select not in PRESETS:
            raise unknown_name("preset", select, PRESETS)
        return PRESETS[select](model)
    if select is None:
        excluded = {id(module) for module in ends(model)}
        return lambda name, module: id(module) not in excluded
    if callable(select):
        return select
    if isinstance(select, str):
        found = matcher(select)
        return lambda name, module: found(name)
    listed = tuple(select)
    existing = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for name in listed:
        if name not in existing:
            raise unknown_name("layer in select", name, existing - {""})
    return lambda name, module: any(name == entry or name.startswith(f"{entry}.") for entry in listed)


def _later_blocks(model: nn.Module) -> Want:
    """As by default, without the first block of each stage: of modules of one class in a row that hold layers."""
    want = selection(model, None)
    first = []
    for name, module in model.named_modules():
        blocks = list(module.named_children()) if isinstance(module, nn.Sequential | nn.ModuleList) else []
        classes = {type(block) for _, block in blocks}
        if len(blocks) > 1 and len(classes) == 1 and not isinstance(blocks[0][1], nn.Sequential | nn.ModuleList | Layer):
            first.append(f"{name}.{blocks[0][0]}." if name else f"{blocks[0][0]}.")
    return lambda name, module: want(name, module) and not name.startswith(tuple(first))


PRESET = "preset:"
PRESETS: dict[str, Callable[[nn.Module], Want]] = {
    "preset:all": lambda model: lambda name, module: True,  # stem and classifier, too
    "preset:later-blocks": _later_blocks,  # as Kang & Kim share: each stage keeps its first block
}
