"""Which form of a kernel runs, and why: chosen by layout, size and device, or forced.

All forms of a kernel compute the same; they differ in time and memory. A form that cannot run where it is forced raises.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from thriftnet.errors import unknown_name
from thriftnet.text import table

FORMS: dict[str, tuple[str, ...]] = {
    "shift": ("planes", "windows", "depthwise", "triton", "fused"),
    "bank": ("together", "alone"),
    "fusion": ("once", "each"),
    "act-norm": ("in place", "separate"),
    "convolution": ("packed", "plain"),
}

_FORCED: ContextVar[dict[str, str] | None] = ContextVar("thriftnet_forced_forms", default=None)


@dataclass(frozen=True)
class Choice:
    """A form that was picked.

    Args:
        kernel: One of `FORMS`.
        form: One of its forms.
        reason: Why, in a few words.
    """

    kernel: str
    form: str
    reason: str


@contextmanager
def force(**forms: str) -> Iterator[None]:
    """Let kernels take these forms, wherever this context is active, whatever would be faster.

    Args:
        forms: ``shift="windows"``, ``bank="alone"``, ... as in `FORMS`.

    Raises:
        ConfigError: An unknown kernel or form, with those that exist.
    """
    check_forms(forms)
    token = _FORCED.set({**(_FORCED.get() or {}), **forms})
    try:
        yield
    finally:
        _FORCED.reset(token)


def check_forms(forms: dict[str, str]) -> None:
    """Raise for a kernel or form that does not exist."""
    for kernel, form in forms.items():
        if kernel not in FORMS:
            raise unknown_name("kernel", kernel, FORMS)
        if form not in FORMS[kernel]:
            raise unknown_name(f"form of kernel {kernel}", form, FORMS[kernel])


def forced(kernel: str) -> Choice | None:
    """What `force` says about a kernel here; None where it says nothing."""
    form = _forced_form(kernel)
    return None if form is None else Choice(kernel, form, "forced")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _forced_form(kernel: str) -> str | None:
    """Looked up while a graph is compiled: the compiler of torch 2.11 does not read context variables."""
    return (_FORCED.get() or {}).get(kernel)


class Explained(Protocol):
    """A layer that runs a kernel."""

    def kernel_choice(self, x: Tensor) -> Choice:
        """The form that it takes for this input."""
        ...


@dataclass(frozen=True)
class Explanation:
    """Which form each layer of a network takes; prints as a table.

    Args:
        rows: Name of the layer and its choice, in the order in which they run first.
    """

    rows: tuple[tuple[str, Choice], ...]

    def __str__(self) -> str:
        if not self.rows:
            return "no layer of this network runs a kernel that has several forms"
        return table(["layer", "kernel", "form", "because"], [[name, c.kernel, c.form, c.reason] for name, c in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {name: {"kernel": c.kernel, "form": c.form, "reason": c.reason} for name, c in self.rows}


def explain(model: nn.Module, input: Tensor) -> Explanation:
    """Which form of its kernel each layer of ``model`` takes for ``input``, and why.

    A copy of the network runs, in the mode it is in (training or eval, with gradients or without), so that layout, size and
    device are those that each layer meets.

    Example:
        >>> import torch
        >>> print(explain(nn.Sequential(nn.ReLU()), torch.zeros(1, 3, 8, 8)))
        no layer of this network runs a kernel that has several forms
    """
    network = copy.deepcopy(model)
    found: dict[str, Choice] = {}

    def note(name: str, layer: Explained, x: Tensor) -> None:
        found.setdefault(name, layer.kernel_choice(x))

    for name, module in network.named_modules():
        if callable(getattr(type(module), "kernel_choice", None)):
            layer = cast(Explained, module)
            module.register_forward_pre_hook(lambda _, args, name=name, layer=layer: note(name, layer, args[0]))
    network(input)
    return Explanation(tuple(found.items()))
