"""What a network allocates while it is built is added up, and refused before it is allocated."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from thriftnet.memory import needs

FACTORIES = (torch.empty, torch.zeros, torch.ones, torch.rand, torch.randn)
INITIALISERS = {getattr(nn.init, name) for name in dir(nn.init) if name.endswith("_") and not name.startswith("_")}
SMALL = 1 << 28  # bytes that are allocated before anything is asked


def build_within_memory(build: Callable[[], nn.Module], what: str) -> nn.Module:
    """The network that a function builds, which is called once more for one that is large: on the meta device, to see how large.

    Raises:
        ConfigError: It does not fit into memory; next to nothing has been allocated.
    """
    before = torch.get_rng_state()
    try:
        with _Counting(SMALL):
            return build()
    except _LargeError:
        torch.set_rng_state(before)
    with torch.device("meta"), _Counting(None) as counted:
        build()
    needs(counted.size, what)
    return build()


class _LargeError(BaseException):  # no error that a builder should handle
    """Another tensor goes beyond the limit."""


class _Counting(TorchFunctionMode):
    """Adds up the bytes of tensors that are made by their size; without a limit, nothing is initialised."""

    def __init__(self, limit: int | None) -> None:
        super().__init__()
        self.limit = limit
        self.size = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in FACTORIES:
            sides = args[0] if len(args) == 1 and not isinstance(args[0], int) else args
            self.size += prod(sides) * (kwargs.get("dtype") or torch.get_default_dtype()).itemsize
            if self.limit is not None and self.size > self.limit:
                raise _LargeError
        if self.limit is None and func in INITIALISERS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
