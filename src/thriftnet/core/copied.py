"""Copies of networks, for verbs that leave the one they are given as it is."""

from __future__ import annotations

import copy

from torch import nn

from thriftnet.errors import IncompatibleModelError, first_line


def copied(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """A copy of a network; ``inplace``, the network itself.

    Raises:
        IncompatibleModelError: It holds what cannot be copied, such as a lock, or would silently lose something.
    """
    if inplace:
        return model
    kind = type(model).__name__
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks:
            raise IncompatibleModelError(
                f"{kind} cannot be copied: parameter {name!r} has a hook on its gradient, which copies lose. Remove it first"
            )
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever a network holds
        raise IncompatibleModelError(
            f"{kind} cannot be copied: {first_line(error).rstrip('.')}. Use inplace=True, or take out what cannot be copied"
        ) from error
