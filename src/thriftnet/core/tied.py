"""Modules that several users hold at once, stored once.

Sharing in thriftnet means: the same module object is registered in every user. Parameters, `.to`, deepcopy, DDP and
pickling are then plain PyTorch. Only the state dict needs care, because PyTorch writes a module once per name.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Tied(nn.Module):
    """Written into a state dict once, under the first name met; read from whichever of its names is present.

    Shape: any. A key missing under every name is reported as missing, under the first name.
    """

    _written: tuple[int, str] | None = None  # (state dict, prefix) of the latest writing
    _missed: tuple[list[str], list[str]] | None = None  # (missing list of this loading, what we added to it)
    _found: list[str] | None = None  # missing list of the loading in which a name was found

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
        seen_before = self._found is missing_keys or (self._missed is not None and self._missed[0] is missing_keys)
        if seen_before and not present:
            return  # a further name of a module that was met under another
        before = len(missing_keys)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        if present:
            self._found = missing_keys
            self._forgive(missing_keys)
        else:
            self._missed = (missing_keys, missing_keys[before:])

    def _forgive(self, missing_keys: list[str]) -> None:
        """Take back what an earlier name reported as missing: it has been found under this one."""
        if self._missed is not None and self._missed[0] is missing_keys:
            for key in self._missed[1]:
                missing_keys.remove(key)
            self._missed = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_written", "_missed", "_found")}
