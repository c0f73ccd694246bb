"""What a user has put on a layer: its replacement gets it, or the layer is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from thriftnet.core.module import ThriftyModule
from thriftnet.core.sites import Replacement
from thriftnet.errors import IncompatibleModelError

TENSORS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}  # of layers of torch.nn
HOOKS = {  # attributes of a module, and what is in them
    "_forward_hooks": "forward hooks",
    "_forward_pre_hooks": "forward pre-hooks",
    "_backward_hooks": "backward hooks",
    "_backward_pre_hooks": "backward pre-hooks",
    "_state_dict_hooks": "state-dict hooks",
    "_state_dict_pre_hooks": "state-dict pre-hooks",
    "_load_state_dict_pre_hooks": "hooks on loading",
    "_load_state_dict_post_hooks": "hooks on loading",
}
OF_TWO_TENSORS = (nn.modules.conv._ConvNd, nn.Linear, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def obstacle(module: nn.Module) -> str | None:
    """What a new layer in place of this one would lose of what the user has put on it, and what to do; None if nothing."""
    if isinstance(module, ThriftyModule):
        return None
    for attribute, kind in HOOKS.items():
        if getattr(module, attribute):
            return (
                f"has {kind}, which a new layer would lose (weight norm, spectral norm and pruning are hooks, too). "
                "Remove them first, and register them again afterwards"
            )
    for attribute in sorted(vars(module).keys() - OF_EVERY_MODULE):
        if callable(getattr(type(module), attribute, None)):
            return f"has a {attribute!r} that was replaced on the instance. Undo it first: del layer.{attribute}"
    return None


def keep_attributes(pairs: Sequence[Replacement], names: Mapping[int, Sequence[str]] | None = None) -> None:
    """Give the new layers every attribute of the old ones that they lack.

    Raises:
        IncompatibleModelError: One layer replaces several, which have different values of it; or an old layer holds a tensor or a
            module that the new one lacks.
    """
    given: dict[tuple[int, str], tuple[nn.Module, Any]] = {}
    for old, new in pairs:
        if old is new:
            continue
        own = isinstance(old, OF_TWO_TENSORS) and type(old).__module__.startswith("torch.nn.")
        for held in sorted({*old._parameters, *old._buffers, *old._modules} - TENSORS):
            if names and own and not hasattr(new, held):
                raise IncompatibleModelError(
                    f"layer {names[id(old)][0]!r} holds {held!r}, which its replacement, a {type(new).__name__}, would not have. "
                    "Hold it in the module around the layer"
                )
        for attribute in _attributes(old):
            value = getattr(old, attribute)
            first, known = given.get((id(new), attribute), (old, value))
            if names and known is not value and not (type(known) is type(value) and _equal(known, value)):
                raise IncompatibleModelError(
                    f"layers {names[id(first)][0]!r} and {names[id(old)][0]!r} cannot become one: their attribute {attribute!r} "
                    f"differs ({known!r} and {value!r}). Leave one of them out with select"
                )
            if (id(new), attribute) in given or not hasattr(new, attribute):
                given[id(new), attribute] = (old, value)
                setattr(new, attribute, value)
        if isinstance(new, ThriftyModule):
            new.kept = _attributes(old)


def _attributes(layer: nn.Module) -> tuple[str, ...]:
    """Attributes that a user may read from a layer of a plain network; of a new one, those of the layer that it replaced."""
    return layer.kept if isinstance(layer, ThriftyModule) else tuple(sorted(vars(layer).keys() - OF_EVERY_MODULE))


def _equal(left: object, right: object) -> bool:
    try:
        return bool(left == right)
    except Exception:  # of arrays, and of the user's own classes
        return False


def parameter_ties(model: nn.Module) -> dict[int, tuple[str, str]]:
    """Modules that share a parameter with another, by id: the parameter's name, and one it has elsewhere."""
    owners: dict[int, dict[int, str]] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), {})[id(module)] = f"{prefix}.{name}" if prefix else name
    shared = [names for names in owners.values() if len(names) > 1]
    return {
        module: (name, next(other for other in names.values() if other != name))
        for names in shared
        for module, name in names.items()
    }
