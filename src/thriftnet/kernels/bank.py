"""Template banks: the weights of all layers of a bank in one matrix product, forward and backward.

Layer l's weight is ``sum_t a[l, t] * template_t``. Layer by layer, that reads all templates once per layer and direction. Together
it is one product of (L, T) and (T, n), computed in chunks of n that stay in the processor's cache.

The first layer that asks computes the weights of all layers; the others take theirs from it. Nothing kept can grow stale: a weight
that was handed out is held by a weak reference only, and all of them are dropped when a parameter changed, when gradients have
flown back, or when a layer asks a second time (as the next forward does).
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from thriftnet.kernels.dispatch import KernelChoice, forced
from thriftnet.kernels.versions import Version, check_unchanged, is_plain, version

MIN_LAYERS = 4  # from which one product is faster than one per layer
CHUNK = 65536  # columns of the templates that one product on a CPU reads


class User(Protocol):
    """A layer that mixes the bank: it has coefficients (T,)."""

    coefficients: nn.Parameter


@dataclass(eq=False)
class MixedWeights:
    """The weights of all layers, computed at once; in dicts, by the layer's id."""

    templates: Version  # what they were then
    coefficients: dict[int, Version]  # likewise
    waiting: dict[int, Tensor] = field(default_factory=dict)  # weights that nobody has asked for yet
    given: dict[int, weakref.ref[Tensor]] = field(default_factory=dict)  # weights that somebody may still hold

    def take(self, layer: User, templates: Tensor) -> Tensor | None:
        """The weight of a layer, if it is there and still what it should be."""
        key = id(layer)
        known = self.coefficients.get(key)
        if known is None or not (known.holds(layer.coefficients) and self.templates.holds(templates)):
            return None
        weight = self.waiting.pop(key, None)
        if weight is not None:
            self.given[key] = weakref.ref(weight)
            return weight
        return self.given[key]() if key in self.given else None

    def end(self) -> None:
        """Forget everything."""
        for held in (self.coefficients, self.waiting, self.given):
            held.clear()


class Mixer:
    """Computes the weights of a bank's layers together. It belongs to one bank, and no copy or file has it."""

    def __init__(self) -> None:
        self._layers: dict[int, weakref.ref[User]] = {}
        self._round: MixedWeights | None = None

    def join(self, layer: User) -> None:
        """Add a layer. All must be there from the start: rounding depends on the rows of a product, and a resumed training must
        repeat the bits."""
        key = id(layer)
        if key not in self._layers:
            self._layers[key] = weakref.ref(layer, lambda _: self._layers.pop(key, None))

    def weight(self, layer: User, templates: nn.Parameter) -> Tensor:
        """The layer's weight, (O, I, kh, kw)."""
        self.join(layer)
        if self.choose(layer, templates).implementation == "alone":
            return alone(layer.coefficients, templates)
        weight = None if self._round is None else self._round.take(layer, templates)
        if weight is None:
            self._round = self._begin(layer, templates)
            weight = self._round.take(layer, templates)
        return alone(layer.coefficients, templates) if weight is None else weight

    def choose(self, layer: User, templates: Tensor) -> KernelChoice:
        """Together or alone."""
        if torch.compiler.is_compiling() or torch.compiler.is_exporting():
            return KernelChoice("bank", "alone", "a compiled or exported graph holds one operation for each layer")
        if not can_join(templates, layer.coefficients):
            return KernelChoice("bank", "alone", "bank and coefficients are not plain parameters of one type and device")
        choice = forced("bank")
        if choice is not None:
            return choice
        if not torch.is_grad_enabled():
            return KernelChoice("bank", "alone", "without gradients; eval_fold or fold spares all of it")
        if len(self._layers) < MIN_LAYERS:
            return KernelChoice(
                "bank", "alone", f"{len(self._layers)} layers: one product for all pays off from {MIN_LAYERS}"
            )
        return KernelChoice("bank", "together", f"one product for {len(self._layers)} layers")

    def _begin(self, layer: User, templates: nn.Parameter) -> MixedWeights:
        """Compute the weights of all layers that can be computed with this one."""
        if self._round is not None:
            self._round.end()
        known = [found for ref in self._layers.values() if (found := ref()) is not None]
        layers = [other for other in known if other is layer or can_join(templates, other.coefficients)]
        begun = MixedWeights(version(templates), {id(other): version(other.coefficients) for other in layers})
        weights = TogetherFunction.apply(begun, templates, *(other.coefficients for other in layers))
        begun.waiting.update(zip(map(id, layers), weights))
        return begun


def can_join(templates: Tensor, coefficients: Tensor) -> bool:
    """Whether a layer's weight can be computed together with others: from plain parameters of one type and device."""
    return (
        is_plain(templates)
        and is_plain(coefficients)
        and (templates.device, templates.dtype) == (coefficients.device, coefficients.dtype)
        and templates.is_contiguous()
    )


def alone(coefficients: Tensor, templates: Tensor) -> Tensor:
    """The weight of one layer by one matrix-vector product."""
    mixed: Tensor = torch.tensordot(coefficients, templates, dims=1)
    return mixed


class TogetherFunction(torch.autograd.Function):
    """All weights from (T, O, I, kh, kw) templates and one (T,) row of coefficients per layer.

    It keeps the parameters themselves and no copies, so that gradients can flow through it more than once.
    """

    @staticmethod
    def forward(ctx: Any, begun: MixedWeights, templates: Tensor, *coefficients: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.begun = weakref.ref(begun)
        ctx.templates, ctx.coefficients = templates, coefficients
        ctx.versions = [version(parameter) for parameter in (templates, *coefficients)]
        mixed = templates.new_empty(len(coefficients), templates[0].numel())
        mix(torch.stack(coefficients), templates.flatten(1), mixed)
        return tuple(row.view(templates.shape[1:]) for row in mixed.unbind())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        begun = ctx.begun()
        if begun is not None:
            begun.end()
        check_unchanged(ctx.versions)
        used = [place for place, grad in enumerate(grads) if grad is not None]
        rows = [grad.flatten() for grad in grads if grad is not None]
        if not rows:
            return (None,) * (2 + len(grads))
        matrix, templates = torch.stack([ctx.coefficients[place] for place in used]), ctx.templates.flatten(1)
        if torch.is_grad_enabled():  # of a gradient that is differentiated in turn
            stacked = torch.stack(rows)
            for_templates, for_matrix = matrix.T @ stacked, stacked @ templates.T
        else:
            for_templates = torch.empty_like(templates)
            for_matrix = mix_backward(rows, matrix, templates, for_templates)
        found: list[Tensor | None] = [None] * len(grads)
        for place, row in zip(used, for_matrix.unbind()):
            found[place] = row if ctx.needs_input_grad[2 + place] else None
        return None, for_templates.view(ctx.templates.shape) if ctx.needs_input_grad[1] else None, *found


def mix(matrix: Tensor, templates: Tensor, out: Tensor) -> None:
    """Write ``matrix @ templates``, of (L, T) and (T, n), into ``out`` (L, n), in chunks of n."""
    for start, stop in chunks(templates):
        torch.mm(matrix, templates[:, start:stop], out=out[:, start:stop])


def mix_backward(grads: Sequence[Tensor], matrix: Tensor, templates: Tensor, for_templates: Tensor) -> Tensor:
    """Gradients of ``matrix @ templates``, of (L, T) and (T, n), from those of its L rows, (n,) each, in one pass over n.

    That of the templates goes into ``for_templates``, that of the matrix is returned.
    """
    transposed, for_matrix = matrix.T.contiguous(), torch.zeros_like(matrix)
    for start, stop in chunks(templates):
        chunk = torch.stack([grad[start:stop] for grad in grads])
        torch.mm(transposed, chunk, out=for_templates[:, start:stop])
        for_matrix.addmm_(chunk, templates[:, start:stop].T)
    return for_matrix


def chunks(templates: Tensor) -> list[tuple[int, int]]:
    """First and last + 1 column of each chunk; one chunk on a GPU."""
    size = templates.shape[1]
    step = CHUNK if templates.device.type == "cpu" else size
    return [(start, min(start + step, size)) for start in range(0, size, step)]
