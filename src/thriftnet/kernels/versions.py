"""Whether a parameter is still what it was when something was computed from it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import Tensor, nn


class Version(NamedTuple):
    """A parameter, and the state in which it was seen."""

    parameter: Tensor
    changes: int  # how often it had been changed in place
    place: int  # of its values in memory
    trains: bool

    def holds(self, parameter: Tensor) -> bool:
        """Whether ``parameter`` is the one that was seen, unchanged."""
        return parameter is self.parameter and version(parameter)[1:] == self[1:]


def version(parameter: Tensor) -> Version:
    """The state that a parameter is in now."""
    return Version(parameter, parameter._version, parameter.data_ptr(), parameter.requires_grad)


def is_plain(parameter: Tensor) -> bool:
    """Whether a tensor is a parameter with memory and a version, not a transform's or replica's substitute."""
    return type(parameter) is nn.Parameter and not parameter.is_meta and not parameter.is_inference()


def check_unchanged(seen: Iterable[Version]) -> None:
    """Raise, as torch does, when a parameter that a gradient needs was changed in place since the forward."""
    for before in seen:
        if before.parameter._version != before.changes:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a parameter "
                f"{tuple(before.parameter.shape)} is at version {before.parameter._version}, expected version {before.changes}. "
                "Call backward before the optimizer's step"
            )
