"""Soft sharing: every layer's filters are a learned mix of a few shared templates.

Layers of equal geometry share one bank of templates; each keeps only its mixing coefficients. Where two layers learn
the same mix, the network has discovered a loop: it is implicitly recurrent.

Source: Savarese & Maire, Learning Implicitly Recurrent CNNs Through Parameter Sharing, ICLR 2019, section 3.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.arguments import Channels, KernelSide, Padding, PositiveShare, Steps, Templates, checked
from thriftnet.core.conv import (
    AnyConvolution,
    GeneratedConv1d,
    GeneratedConv2d,
    GeneratedConv3d,
    geometry,
    is_any_convolution,
    is_pointwise,
    signature,
)
from thriftnet.core.convert import tie
from thriftnet.core.kinds import Kind, torch_class
from thriftnet.core.linear import GeneratedLinear, is_linear
from thriftnet.core.sites import Replacement, Site, group_by
from thriftnet.core.technique import Example, Technique, steps
from thriftnet.core.tied import Tied, set_to_mean
from thriftnet.errors import IncompatibleModelError
from thriftnet.kernels.bank import Mixer, alone
from thriftnet.kernels.dispatch import KernelChoice
from thriftnet.memory import needs

if TYPE_CHECKING:
    from typing_extensions import Self

Layer: TypeAlias = AnyConvolution | nn.Linear
AnySides: TypeAlias = Annotated[KernelSide | tuple[KernelSide, ...], "an integer from 1 to 1,024, or some"]


@checked
class TemplateBank(Tied):
    """Filters that several layers mix.

    Args:
        num_templates: Number of templates ``T``.
        in_planes: Input channels per group ``I`` of the convolutions served.
        out_planes: Output channels ``O``.
        kernel_size: Side of the square kernels ``k``, or ``(kh, kw)``; ``(k,)`` of one-dimensional ones, and ``()`` of linear
            layers.

    State dict: ``templates`` (T, O, I, kh, kw); of linear layers (T, O, I).
    """

    transient = (*Tied.transient, "mixer")

    def __init__(self, num_templates: Templates, in_planes: Channels, out_planes: Channels, kernel_size: AnySides) -> None:
        super().__init__()
        sides = (kernel_size, kernel_size) if isinstance(kernel_size, int) else kernel_size
        needs(4 * num_templates * in_planes * out_planes * math.prod(sides), "a bank of these sizes")
        self.templates = nn.Parameter(torch.empty(num_templates, out_planes, in_planes, *sides))  # (T, O, I, kh, kw)
        for template in self.templates.detach():
            nn.init.kaiming_normal_(template)

    def mix(self, coefficients: Tensor) -> Tensor:
        """Filters for one layer: ``coefficients`` (T,) -> (O, I, kh, kw)."""
        return alone(coefficients, self.templates)

    @cached_property
    def mixer(self) -> Mixer:
        """Computes the weights of all layers of the bank together."""
        return Mixer()

    def extra_repr(self) -> str:
        templates, outs, ins, *sides = self.templates.shape
        return f"{templates}, {ins}, {outs}, kernel_size={tuple(sides)}"


class Mixed(Kind):
    """A layer whose weight is mixed from a bank."""

    no_decay = ("coefficients",)  # section 4: trained without weight decay

    @classmethod
    def replacing(cls, like: Layer, bank: TemplateBank, coefficients: Tensor) -> Self:
        """The layer that replaces ``like``, with its geometry, bias and widths."""
        layer = cls.__new__(cls)
        layer._replace(like, bank, coefficients)
        return layer

    def _replace(self, like: Layer, bank: TemplateBank, coefficients: Tensor) -> None:
        super().__init__(like)
        self.bank = bank
        self.coefficients = nn.Parameter(coefficients)  # (T,)
        bank.mixer.join(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.bank.mixer.join(self)

    @property
    def weight(self) -> Tensor:
        """The mix."""
        if torch.compiler.is_compiling():  # one operation in the graph
            return self.bank.mix(self.coefficients)
        return self.bank.mixer.weight(self, self.bank.templates)

    def kernel_choice(self, x: Tensor) -> KernelChoice:
        """Which implementation computes the weight now."""
        return self.bank.mixer.choose(self, self.bank.templates)

    @property
    def generation_macs(self) -> int:
        """Multiply-accumulates that mixing takes, per forward."""
        return self.bank.templates.numel()


@checked
class SLinear(Mixed, GeneratedLinear):  # type: ignore[override]
    """A linear layer whose weight is mixed from a bank.

    Shape: as `nn.Linear`.

    State dict: ``coefficients`` (T,), ``bias`` (O,), ``bank.templates`` under the bank's first name only.
    """


@checked
class SConv2d(Mixed, GeneratedConv2d):  # type: ignore[override]
    """A convolution whose filters are mixed from a bank.

    Its coefficients start as a random direction of length 1, so that mixed filters have the templates' variance.

    Shape: as `nn.Conv2d`.

    Args:
        bank: The templates; their geometry is the convolution's.
        stride: Step of the convolution.
        padding: Zeros, or what ``padding_mode`` says, on every side.
        dilation: Spacing of the kernel.
        groups: Groups of channels; the bank holds filters of ``in_channels / groups``.
        bias: Whether to add a trained bias.
        padding_mode: As in `nn.Conv2d`.

    State dict: ``coefficients`` (T,), ``bias`` (O,), ``bank.templates`` under the bank's first name only.
    """

    def __init__(
        self,
        bank: TemplateBank,
        stride: Steps = 1,
        padding: Literal["valid", "same"] | Padding | tuple[Padding, Padding] = 1,
        *,
        dilation: Steps = 1,
        groups: Channels = 1,
        bias: bool = False,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
    ) -> None:
        templates, outs, ins, kh, kw = bank.templates.shape
        options: dict[str, Any] = {"bias": False, "padding_mode": padding_mode, "device": "meta"}
        like = nn.Conv2d(ins * groups, outs, (kh, kw), stride, padding, dilation, groups, **options)
        self._replace(like, bank, F.normalize(torch.randn(templates), dim=0).to(bank.templates))
        if bias:
            self.bias = nn.Parameter(bank.templates.new_zeros(outs))


class SConv1d(Mixed, GeneratedConv1d):  # type: ignore[override]
    """A one-dimensional convolution whose filters are mixed from a bank.

    Shape: as `nn.Conv1d`.

    State dict: as of `SConv2d`.
    """


class SConv3d(Mixed, GeneratedConv3d):  # type: ignore[override]
    """A three-dimensional convolution whose filters are mixed from a bank.

    Shape: as `nn.Conv3d`.

    State dict: as of `SConv2d`.
    """


MIXED: dict[type[nn.Module], type[Mixed]] = {
    nn.Conv1d: SConv1d,
    nn.Conv2d: SConv2d,
    nn.Conv3d: SConv3d,
    nn.Linear: SLinear,
}


@checked
@dataclass(frozen=True, kw_only=True)
class SoftSharing:
    """Share templates among the layers of equal geometry.

    Args:
        templates: Templates per bank: an integer, or a ratio of the layers in the group. With as many as a group has layers the
            function is unchanged; fewer save parameters in proportion. Groups with fewer layers than that are left alone, and with a
            ratio below 1 those in which a bank saves nothing.
        init: "weights" fits templates and coefficients to the weights the layers have, in the least-squares sense;
            "random" initialises as the paper does: Kaiming templates, orthogonal coefficients.
        pointwise: Take 1 x 1 convolutions, too.
        linear: Take linear layers, too.

    Example:
        >>> SoftSharing(templates=2)
        SoftSharing(templates=2, init='weights', pointwise=True, linear=True)

    Source: Savarese & Maire, section 3.
    """

    takes: ClassVar[str] = (
        "convolutions with a weight of their own (1 x 1 unless pointwise=False), and Linear (unless linear=False)"
    )

    templates: Templates | PositiveShare = 0.5
    init: Literal["weights", "random"] = "weights"
    pointwise: bool = True
    linear: bool = True

    def accepts(self, module: nn.Module) -> bool:
        if is_linear(module):
            return self.linear
        return is_any_convolution(module) and (self.pointwise or not is_pointwise(module))

    def group(self, sites: Sequence[Site[Layer]]) -> list[list[Site[Layer]]]:
        groups = group_by(sites, key=lambda site: geometry(site.module))
        shareable = [group for group in groups if self._can_share(group)]
        if groups and not shareable:
            raise self._refusal(max(groups, key=len))
        return shareable

    def choices(self, sites: Sequence[Site[Layer]]) -> list[tuple[list[Site[Layer]], list[Technique]]]:
        """Layers of equal geometry, with every number of templates."""
        groups = group_by(sites, key=lambda site: geometry(site.module))
        return [(group, [replace(self, templates=t) for t in steps(1, len(group) - 1)]) for group in groups]

    def count(self, layers: int) -> int:
        """Templates of a bank that serves so many layers."""
        return self.templates if isinstance(self.templates, int) else max(1, int(layers * self.templates))

    def _can_share(self, group: Sequence[Site[Layer]]) -> bool:
        layers, templates, entries = len(group), self.count(len(group)), group[0].module.weight.numel()
        saves = templates * (entries + layers) < layers * entries
        return layers >= max(2, templates) and (saves or self.templates == 1.0 or isinstance(self.templates, int))

    def _refusal(self, largest: Sequence[Site[Layer]]) -> IncompatibleModelError:
        size, names = len(largest), ", ".join(repr(site.name) for site in largest[:3])
        if size < 2:
            return IncompatibleModelError(
                "a bank serves at least 2 layers, but no two layers have the same geometry. LowRank() makes each layer small by itself"
            )
        return IncompatibleModelError(
            f"templates={self.templates} is too many: the largest group of equal layers has {size} ({names}, ...), "
            f"and a bank serves at least 2 layers, with no more templates than layers. Use templates < {size} to save parameters"
        )

    def build(self, group: Sequence[Site[Layer]]) -> list[Replacement]:
        weights = torch.stack([site.module.weight.detach() for site in group])  # (L, O, I, kh, kw) or (L, O, I)
        templates = self.count(len(group))
        outs, ins, *sides = weights.shape[1:]
        bank = TemplateBank(templates, ins, outs, tuple(sides)).to(weights)
        if self.init == "weights":
            fitted, coefficients = best_fit(weights, templates)
            bank.templates.data.copy_(fitted)
        else:
            coefficients = nn.init.orthogonal_(torch.empty(len(group), templates)).to(weights)
        kind = MIXED[torch_class(group[0].module)]
        rows = zip(group, coefficients, strict=True)
        return [(site.module, kind.replacing(site.module, bank, row.clone())) for site, row in rows]


def best_fit(weights: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Templates and coefficients nearest to trained weights (L, ...) in the least-squares sense (Eckart-Young).

    Returns:
        Templates (T, ...) and orthonormal coefficient columns (L, T), so that ``coefficients @ templates`` is the best
        rank-T approximation.
    """
    if weights.is_meta:  # being loaded: only shapes matter
        return weights.new_empty(rank, *weights.shape[1:]), weights.new_empty(len(weights), rank)
    flat = weights.flatten(1).double()  # (L, n), n is large: work on the small Gram matrix
    _, vectors = torch.linalg.eigh(flat @ flat.T)
    coefficients = vectors[:, -rank:].flip(1)  # (L, T), largest first
    templates = coefficients.T @ flat
    return templates.view(rank, *weights.shape[1:]).to(weights), coefficients.to(weights)


@dataclass(frozen=True)
class LayerSimilarity:
    """How alike the layers of one bank are.

    Args:
        layers: Names, in depth order.
        matrix: Magnitude of the cosine between their coefficients, (L, L), in [0, 1].
    """

    layers: tuple[str, ...]
    matrix: Tensor


@checked
def similarity(model: nn.Module) -> dict[str, LayerSimilarity]:
    """The layer similarity matrix of each bank, by the bank's name.

    Raises:
        IncompatibleModelError: The network has no bank.

    Source: Savarese & Maire, section 3.3.
    """
    result = {}
    for bank, layers in _layers_of_banks(model).items():
        rows = F.normalize(torch.stack([layer.coefficients.detach() for _, layer in layers]), dim=1)
        result[bank] = LayerSimilarity(tuple(name for name, _ in layers), (rows @ rows.T).abs().clamp(max=1))
    return result


@checked
def recurrences(model: nn.Module, threshold: PositiveShare = 0.99) -> list[list[str]]:
    """The names of layers that have learned the same mix, a list for each loop; empty if there is none.

    Two layers agree when ``2 <a, b> / (|a|^2 + |b|^2) >= threshold``, which is 1 only for equal coefficients (the cosine
    alone would also tie scaled copies, whose function differs). They must agree in stride, padding and so on, too.

    Raises:
        ConfigError: A threshold outside (0, 1].
        IncompatibleModelError: The network has no bank.
    """
    found: list[list[str]] = []
    for layers in _layers_of_banks(model).values():
        loops: list[list[tuple[str, Mixed]]] = []
        for name, layer in layers:
            scores = [min(agreement(layer, other) for _, other in loop) for loop in loops]
            best = max(range(len(scores)), key=scores.__getitem__, default=-1)
            if scores and scores[best] >= threshold:
                loops[best].append((name, layer))
            else:
                loops.append([(name, layer)])
        found += [[name for name, _ in loop] for loop in loops if len(loop) > 1]
    return found


@checked
def fold_recurrence(model: nn.Module, threshold: PositiveShare = 0.99) -> nn.Module:
    """Make implicit recurrence explicit: the layers of each of the `recurrences` become one layer, used several times.

    It gets the mean of their coefficients and biases.

    Raises:
        ConfigError: A threshold outside (0, 1].
        IncompatibleModelError: No bank, or no two layers that agree.
    """
    loops = recurrences(model, threshold)
    if not loops:
        pairs = (pair for layers in _layers_of_banks(model).values() for pair in combinations(layers, 2))
        closest = max((agreement(one, other) for (_, one), (_, other) in pairs), default=0.0)
        raise IncompatibleModelError(
            f"no two layers agree to threshold={threshold}: the closest pair reaches {closest:.3f}. Use a lower threshold"
        )
    tied = tie(model, loops)
    for names in loops:
        set_to_mean(tied.get_submodule(names[0]), [model.get_submodule(name) for name in names])
    return tied


def agreement(one: Mixed, other: Mixed) -> float:
    """How nearly two layers are the same layer, in [-1, 1]; 0 for layers that cannot be one module."""
    if signature(one) != signature(other):  # type: ignore[arg-type]  # a convolution or linear layer
        return 0.0
    a, b = one.coefficients.detach().double(), other.coefficients.detach().double()
    return float(2 * a.dot(b) / (a.dot(a) + b.dot(b)).clamp_min(1e-300))


def _layers_of_banks(model: nn.Module) -> dict[str, list[tuple[str, Mixed]]]:
    banks: dict[int, tuple[str, list[tuple[str, Mixed]]]] = {}
    names = {id(module): name for name, module in model.named_modules() if isinstance(module, TemplateBank)}
    for name, module in model.named_modules():
        if isinstance(module, Mixed):
            banks.setdefault(id(module.bank), (names[id(module.bank)], []))[1].append((name, module))
    if not banks:
        raise IncompatibleModelError(f"{type(model).__name__} has no template bank: convert it with SoftSharing(...) first")
    return dict(banks.values())


EXAMPLES = (
    Example(
        config=SoftSharing(templates=2),
        params=2 * (8 * 8 * 9) + 4 * (2 + 8),
        generation_macs=4 * 2 * (8 * 8 * 9),  # each layer mixes both templates
    ),
)


def full_capacity(layers: int, entries: int) -> list[SoftSharing]:
    return [SoftSharing(templates=layers)]
