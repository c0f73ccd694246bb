"""Modules that several users hold at once, stored once.

Sharing in thriftnet means: the same module object is registered in every user. Parameters, `.to`, deepcopy, DDP and
pickling are then plain PyTorch. Only the state dict needs care, because PyTorch writes a module once per name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.init import skip_init

from thriftnet.core.module import ThriftyModule

M = TypeVar("M", bound=nn.Module)

EXTRA_STATE = "_extra_state"  # torch's name for it in state dicts


class Tied(ThriftyModule):
    """Written into a state dict once, under the first name met; read from whichever of its names is present.

    Shape: any. A key missing under every name is reported as missing, under the first name.
    """

    transient: ClassVar[tuple[str, ...]] = ("_written", "_loading")  # attributes that copies and files do not have

    _written: tuple[int, str] | None = None  # (state dict, prefix) of the latest writing
    _loading: tuple[list[str], dict[str, str]] | None = None  # missing keys of this loading, and ours among them

    def _own_tensors(self) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in (*self._parameters.items(), *self._buffers.items()) if tensor is not None}

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self._is_in(destination, prefix):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            self._written = (id(destination), prefix)

    def _is_in(self, destination: dict[str, Any], prefix: str) -> bool:
        """Whether this very state dict already holds our tensors under another name."""
        if self._written is None or self._written[0] != id(destination) or self._written[1] == prefix:
            return False
        for name, tensor in self._own_tensors().items():
            held = destination.get(self._written[1] + name)
            return isinstance(held, Tensor) and held.untyped_storage()._cdata == tensor.untyped_storage()._cdata
        return False

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        present = any(key.startswith(prefix) for key in state_dict)
        first = self._loading is None or self._loading[0] is not missing_keys
        if not (first or present):
            return  # a further name of a module that was met under another
        absent: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, absent, unexpected_keys, error_msgs)
        leaves = {key[len(prefix) :]: key for key in absent}
        if first:
            missing_keys.extend(absent)
            self._loading = (missing_keys, leaves)
        elif self._loading is not None:
            for leaf in [leaf for leaf in self._loading[1] if leaf not in leaves]:
                missing_keys.remove(self._loading[1].pop(leaf))  # found under this name

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Tied:
        """Stacked filters (5-d) keep their layout: channels_last is for the weights made of them."""

        def on_rows(tensor: Tensor) -> Tensor:
            return fn(tensor.flatten(1)).view(tensor.shape) if tensor.ndim == 5 else fn(tensor)

        super()._apply(on_rows, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in self.transient}


def plain_layer(kind: type[M], sizes: Sequence[Any], weight: Tensor, bias: Tensor | None, **options: Any) -> M:
    """A layer of `torch.nn` that holds copies of ``weight`` and ``bias``."""
    options |= {"bias": bias is not None, "device": weight.device, "dtype": weight.dtype}
    layer: M = skip_init(kind, *sizes, **options)  # type: ignore[no-untyped-call]
    layer.load_state_dict({"weight": weight} if bias is None else {"weight": weight, "bias": bias})
    return layer


@torch.no_grad()
def set_to_mean(shared: nn.Module, layers: Sequence[nn.Module]) -> None:
    """Set the parameters of a layer to the mean of those that the layers have."""
    for name, parameter in shared.named_parameters(recurse=False):
        parameter.copy_(torch.stack([layer.get_parameter(name) for layer in layers]).mean(0))


def first_names(model: nn.Module) -> dict[str, Tensor]:
    """The state dict's own tensors, each once, under its first name."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if is_stored(name, tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor
    return unique


def extra_state(model: nn.Module) -> dict[str, Any]:
    """What the state dict holds besides parameters and buffers, as modules with ``get_extra_state`` give it."""
    return {name: value for name, value in model.state_dict().items() if not is_stored(name, value)}


def is_stored(name: str, value: object) -> bool:
    """Whether an entry of a state dict is a parameter or a buffer."""
    return isinstance(value, Tensor) and not name.endswith(EXTRA_STATE)


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tensor once, under its first name."""
    return {name: tensor.detach().contiguous() for name, tensor in first_names(model).items()}


def count_params(model: nn.Module) -> int:
    """Stored parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
