"""The layers of a network, and the parameters that each stores and replaces."""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor, nn
from torch.nn.utils import parametrize

from thriftnet.core.module import ThriftyModule
from thriftnet.measure.report import LayerRow


@dataclass
class LayerCost:
    """The counts of one layer while they grow, as in `LayerRow`; ``is_leaf``: one layer together with all its submodules."""

    module: nn.Module
    is_leaf: bool
    names: tuple[str, ...] = ()
    params: int = 0
    dense_params: int = 0
    macs: int = 0
    generation_macs: int = 0
    shift_bytes: int = 0
    output: tuple[int, ...] | None = None
    calls: int = 0

    def row(self) -> LayerRow:
        """The counts as a row of the report."""
        counts = {field.name: getattr(self, field.name) for field in fields(LayerRow) if field.name != "kind"}
        return LayerRow(kind=type(self.module).__name__, **counts)


def layer_costs(model: nn.Module) -> dict[int, LayerCost]:
    """Module id -> counts, for modules not inside another layer, in registration order; parameters counted, costs zero."""
    found: dict[int, LayerCost] = {}
    inside: str | None = None
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is not None and name.startswith(inside):
            continue
        cost = found.setdefault(id(module), LayerCost(module, is_leaf(module)))
        cost.names += (name,)
        if cost.is_leaf:
            inside = f"{name}." if name else ""
    _count_parameters(found)
    return found


def is_leaf(module: nn.Module) -> bool:
    """Whether a module is one layer together with all its submodules."""
    if declared_dense_params(module) is not None or next(module.children(), None) is None:
        return True
    return isinstance(module, nn.MultiheadAttention) or parametrize.is_parametrized(module)


def declared_dense_params(module: nn.Module) -> int | None:
    """``dense_params`` of a converted layer; None for all other modules."""
    value = getattr(module, "dense_params", None)
    return value if isinstance(module, ThriftyModule) and isinstance(value, int) else None


def _count_parameters(found: dict[int, LayerCost]) -> None:
    """Stored parameters at the first layer that has them, dense ones at every name.

    Submodules of a converted layer are not in the plain network, wherever else they are registered.
    """
    converted = [cost.module for cost in found.values() if declared_dense_params(cost.module) is not None]
    absorbed = {id(inner) for module in converted for inner in module.modules() if inner is not module}
    seen: set[object] = set()
    for cost in found.values():
        for parameter in cost.module.parameters(recurse=cost.is_leaf):
            if (place := _storage_place(parameter)) not in seen:
                seen.add(place)
                cost.params += parameter.numel()
        if id(cost.module) not in absorbed:
            cost.dense_params = len(cost.names) * _dense_params(cost.module)


def saved_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers of the state dict, each once."""
    tensors = (value for value in model.state_dict().values() if isinstance(value, Tensor))
    return list({_storage_place(tensor): tensor for tensor in tensors}.values())


def _storage_place(tensor: Tensor) -> object:
    """Equal for parameters that are one tensor in memory (`data_ptr` is 0 on the meta device)."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.numel()


def _dense_params(module: nn.Module) -> int:
    """Parameters of the plain layer that a module replaces."""
    if (declared := declared_dense_params(module)) is not None:
        return declared
    own = sum(parameter.numel() for parameter in module.parameters(recurse=False))
    if parametrize.is_parametrized(module):
        computed = module.get_submodule("parametrizations")
        return own + sum(int(getattr(module, name).numel()) for name, _ in computed.named_children())
    if not is_leaf(module):
        return own
    return sum(parameter.numel() for _, parameter in module.named_parameters(remove_duplicate=False))
