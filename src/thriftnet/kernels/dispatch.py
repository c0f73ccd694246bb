"""Which implementation of a kernel runs, and why: chosen by layout, size and device, or forced.

All implementations of a kernel compute the same; they differ in time and memory.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from thriftnet.core.module import ThriftyModule
from thriftnet.errors import unknown_name
from thriftnet.text import table

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "shift": ("planes", "windows", "depthwise", "triton", "fused"),
    "bank": ("together", "alone"),
    "fusion": ("once", "each"),
    "act-norm": ("in place", "separate"),
    "convolution": ("packed", "plain"),
}

# Of the process, as torch.backends.cudnn.enabled is: threads of autograd see it, and compiled graphs are guarded on it. torch 2.11
# compiles no ContextVar, and its marker for what it cannot read (assume_constant_result) takes seconds to import and sets no guard.
_forced: dict[str, str] = {}


@dataclass(frozen=True)
class KernelChoice:
    """An implementation that was picked.

    Args:
        kernel: One of `IMPLEMENTATIONS`.
        implementation: One of the kernel's implementations.
        reason: Why, in a few words.
    """

    kernel: str
    implementation: str
    reason: str


@contextmanager
def force(**implementations: str) -> Iterator[None]:
    """Make kernels run these implementations while the context is active, in all threads, even if others are faster.

    Args:
        implementations: ``shift="windows"``, ``bank="alone"``, ... as in `IMPLEMENTATIONS`.

    Raises:
        ConfigError: An unknown kernel or implementation. A kernel raises it when what is forced cannot run on its input.
    """
    global _forced
    for kernel, implementation in implementations.items():
        if kernel not in IMPLEMENTATIONS:
            raise unknown_name("kernel", kernel, IMPLEMENTATIONS)
        if implementation not in IMPLEMENTATIONS[kernel]:
            raise unknown_name(f"implementation of kernel {kernel}", implementation, IMPLEMENTATIONS[kernel])
    outer, _forced = _forced, {**_forced, **implementations}
    try:
        yield
    finally:
        _forced = outer


def forced(kernel: str) -> KernelChoice | None:
    """What `force` asks of a kernel; None if nothing."""
    implementation = _forced.get(kernel)
    return None if implementation is None else KernelChoice(kernel, implementation, "forced")


@dataclass(frozen=True)
class Explanation:
    """Which implementation each layer of a network runs; prints as a table.

    Args:
        rows: Name of each layer and its choice, in the order of their first call.
    """

    rows: tuple[tuple[str, KernelChoice], ...]

    def __str__(self) -> str:
        if not self.rows:
            return "no layer of this network runs a kernel with several implementations"
        rows = [[name, choice.kernel, choice.implementation, choice.reason] for name, choice in self.rows]
        return table(["layer", "kernel", "implementation", "because"], rows)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: asdict(choice) for name, choice in self.rows}


def explain(model: nn.Module, input: Tensor) -> Explanation:
    """Which implementation of its kernel each layer of ``model`` runs on ``input``, and why.

    A copy of the network runs in its current mode (training or eval, with or without gradients), so that each layer sees the
    layout, size and device that it meets in use.

    Example:
        >>> import torch
        >>> print(explain(nn.Sequential(nn.ReLU()), torch.zeros(1, 3, 8, 8)))
        no layer of this network runs a kernel with several implementations
    """
    network = copy.deepcopy(model)
    found: dict[str, KernelChoice] = {}

    def note(name: str, layer: Any, x: Tensor) -> None:
        found.setdefault(name, layer.kernel_choice(x))

    for name, module in network.named_modules():
        if isinstance(module, ThriftyModule) and callable(getattr(module, "kernel_choice", None)):
            module.register_forward_pre_hook(lambda layer, args, name=name: note(name, layer, args[0]))
    network(input)
    return Explanation(tuple(found.items()))
