"""Weight sharing: several layers of the network use one weight.

In an isotropic network (all layers of one geometry) a group of ``rate`` layers can share the weights of its convolution,
or of its linear layer, as in a vision transformer.
Which layers form a group is the mapping; which part of the depth takes part is the distribution; how trained weights
of a group become one is the fusion.

Source: Lin et al., SPIN: An Empirical Evaluation on Sharing Parameters of Isotropic Networks, ECCV 2022, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Annotated, ClassVar, Literal, TypeAlias

import torch
from torch import Tensor, nn

from thriftnet.arguments import Depth, Index, PositiveShare, Seed, checked
from thriftnet.core.conv import (
    AnyConvolution,
    GeneratedConv1d,
    GeneratedConv2d,
    GeneratedConv3d,
    SharedConv1d,
    SharedConv2d,
    SharedConv3d,
    is_any_convolution,
    is_depthwise,
    signature,
)
from thriftnet.core.kinds import torch_class
from thriftnet.core.linear import GeneratedLinear, SharedLinear, is_linear
from thriftnet.core.sites import Replacement, Site, group_by
from thriftnet.core.technique import Example, Technique
from thriftnet.core.tied import Tied, set_to_mean
from thriftnet.errors import ConfigError, IncompatibleModelError, unknown_name
from thriftnet.kernels.dispatch import KernelChoice
from thriftnet.kernels.fusion import Fuser, choose, fuse

Layer: TypeAlias = AnyConvolution | nn.Linear

WORDS = "lists of at least two layer names or indices"
Mapping = Literal["sequential", "strided", "random"]
Distribution = Literal["uniform", "front", "middle", "back"]
Fusion = Literal["mean", "choose_first", "scalar_weighted_mean", "channel_weighted_mean"]


class Fused(Tied):
    """One weight, fused in every forward from the weights of the layers that share it; all of them are trained.

    ``weight = mean_j(scale_j * member_j)``; the scales start at 1. Biases get their plain mean. Under "choose_first"
    the first member is the weight. `fold` bakes the fused weight in.

    Source: SPIN, section 3.3 (weight fusion).
    """

    fusion: str
    members: nn.Parameter  # (R, O, I/groups, kh, kw), or (R, O, I) of linear layers
    biases: nn.Parameter | None  # (R, O)
    scales: nn.Parameter | None  # (R, 1) or (R, O)
    transient = (*Tied.transient, "fuser")

    def __init__(self, group: Sequence[Layer], fusion: str) -> None:
        super().__init__(group[0])
        self.fusion = fusion
        self.members = nn.Parameter(torch.stack([layer.weight.detach() for layer in group]))
        biases = [layer.bias.detach() for layer in group if layer.bias is not None]
        self.biases = nn.Parameter(torch.stack(biases)) if biases else None
        columns = {"scalar_weighted_mean": 1, "channel_weighted_mean": self.members.shape[1]}
        scales = self.members.new_ones(len(group), columns[fusion]) if fusion in columns else None
        self.scales = None if scales is None else nn.Parameter(scales)

    def _adopt_bias(self, like: AnyConvolution) -> None:
        """The bias is computed."""

    @cached_property
    def fuser(self) -> Fuser:
        """Computes the weight once for all users."""
        return Fuser()

    @property
    def weight(self) -> Tensor:
        """The fused weight."""
        if self.fusion == "choose_first":
            return self.members[0]
        if torch.compiler.is_compiling():
            return fuse(self.members, self.scales)
        return self.fuser.weight(self.members, self.scales)

    def kernel_choice(self, x: Tensor) -> KernelChoice:
        """Which implementation computes the weight now."""
        if self.fusion == "choose_first":
            return KernelChoice("fusion", "each", "the first member is the weight")
        return choose(self.members, self.scales)

    @property
    def bias(self) -> Tensor | None:
        """The fused bias."""
        if self.biases is None:
            return None
        return self.biases[0] if self.fusion == "choose_first" else self.biases.mean(0)

    @property
    def generation_macs(self) -> int:
        """Multiply-accumulates that fusing takes, per forward."""
        return 0 if self.fusion == "choose_first" else self.members.numel()


class FusedConv2d(Fused, GeneratedConv2d):  # type: ignore[override]
    """A convolution with the fused weight of several."""


class FusedConv1d(Fused, GeneratedConv1d):  # type: ignore[override]
    """A one-dimensional convolution with the fused weight of several."""


class FusedConv3d(Fused, GeneratedConv3d):  # type: ignore[override]
    """A three-dimensional convolution with the fused weight of several."""


class FusedLinear(Fused, GeneratedLinear):  # type: ignore[override, misc]
    """A linear layer with the fused weight of several."""


SHARED: dict[type[nn.Module], type[nn.Module]] = {  # what several layers become
    nn.Conv1d: SharedConv1d,
    nn.Conv2d: SharedConv2d,
    nn.Conv3d: SharedConv3d,
    nn.Linear: SharedLinear,
}
FUSED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: FusedConv1d,
    nn.Conv2d: FusedConv2d,
    nn.Conv3d: FusedConv3d,
    nn.Linear: FusedLinear,
}


@checked
@dataclass(frozen=True, kw_only=True)
class WeightSharing:
    """Let groups of equal convolutions, and linear layers if asked, use one weight.

    Only layers that agree in everything (channels, kernel, stride, padding, ..., bias or none) can share.
    Depthwise convolutions and norms keep their own, as in the paper.

    Args:
        rate: Layers per group. Where it does not divide a set of equal layers, the last layers of the set keep their own weight.
        mapping: Which layers form a group: neighbours ("sequential"), every n-th ("strided") or "random".
        distribution: Which part of the depth shares: all of it ("uniform"), or the "front", "middle" or "back".
        fusion: How the weights that the layers have become one. The weighted means train a factor per layer, or per
            layer and channel, so they keep all weights until `fold`; the others keep the result only.
        seed: For the random mapping; None: that of the training, else 0.
        portion: Fraction of the depth that shares when the distribution is not uniform.
        trained: Train all weights of a group and fuse them in every forward, whatever the fusion (the paper's weight
            fusion); `fold` bakes the result in.
        groups: Layers that share, as lists of names or of indices in depth; overrides rate and mapping.
        depthwise: Let depthwise convolutions share, too.
        linear: Let linear layers share, too, as those in the blocks of a vision transformer. Default: in networks where no
            convolutions can share.

    Example:
        >>> WeightSharing(rate=2, mapping="strided")
        WeightSharing(rate=2, mapping='strided', ...)

    Source: SPIN, section 3.
    """

    takes: ClassVar[str] = (
        "convolutions with a weight of their own (depthwise ones only with depthwise=True), and Linear (unless linear=False)"
    )

    rate: Depth = 2
    mapping: Mapping = "sequential"
    distribution: Distribution = "uniform"
    fusion: Fusion = "mean"
    seed: Seed | None = None
    portion: PositiveShare = 0.5
    trained: bool = False
    groups: Annotated[tuple[tuple[str | Index, ...], ...], WORDS] | None = None
    depthwise: bool = False
    linear: bool | None = None

    def __post_init__(self) -> None:
        if self.groups is not None and not all(len(group) > 1 for group in self.groups):
            raise ConfigError(f"groups={self.groups!r}: expected {WORDS}")

    @property
    def keeps_members(self) -> bool:
        """Whether all weights of a group are trained and fused in every forward."""
        return self.trained or self.fusion.endswith("weighted_mean")

    def accepts(self, module: nn.Module) -> bool:
        if is_any_convolution(module):
            return self.depthwise or not is_depthwise(module)
        return self.linear is not False and is_linear(module)

    def group(self, sites: Sequence[Site[Layer]]) -> list[list[Site[Layer]]]:
        convs = [site for site in sites if not isinstance(site.module, nn.Linear)]
        if self.groups is not None:
            return _named_groups(sites, convs if self.linear is None and convs else sites, self.groups)
        if self.linear is None and convs and (groups := self._groups(convs)):
            return groups
        groups = self._groups(sites)
        if sites and not groups:
            raise self._too_large(sites)
        return groups

    def _groups(self, sites: Sequence[Site[Layer]]) -> list[list[Site[Layer]]]:
        """Layers that share: of each set of equal ones, as many as the rate divides."""
        groups: list[list[Site[Layer]]] = []
        for equal in group_by(sites, key=lambda site: signature(site.module)):
            layers = self._part(equal)
            depth = len(layers) - len(layers) % self.rate
            slot = dict(zip((site.name for site in layers), shared_index(depth, self.rate, self.mapping, self.seed or 0)))
            groups += group_by(layers[:depth], key=lambda site: slot[site.name])
        return groups

    def choices(self, sites: Sequence[Site[Layer]]) -> list[tuple[list[Site[Layer]], list[Technique]]]:
        """Equal layers, with every rate that divides them: convolutions, or linear layers where the config takes those."""
        convs = [site for site in sites if not isinstance(site.module, nn.Linear)]
        only = self.linear is None and convs and replace(self, rate=2)._groups(convs)
        groups = group_by(convs if only else sites, key=lambda site: signature(site.module))
        return [
            (group, [replace(self, rate=rate) for rate in range(2, len(group) + 1) if len(group) % rate == 0])
            for group in groups
        ]

    def _part(self, layers: list[Site[Layer]]) -> list[Site[Layer]]:
        """The layers of the part of the depth that shares: a multiple of the rate, unless it is all."""
        if self.distribution == "uniform":
            return layers
        length = int(len(layers) * self.portion) // self.rate * self.rate
        start = {"front": 0, "middle": (len(layers) - length) // 2, "back": len(layers) - length}[self.distribution]
        return layers[start : start + length]

    def _too_large(self, sites: Sequence[Site[Layer]]) -> IncompatibleModelError:
        largest = max((self._part(equal) for equal in group_by(sites, key=lambda site: signature(site.module))), key=len)
        if len(largest) < 2:
            part = (
                ""
                if self.distribution == "uniform"
                else f" in the part of the depth that distribution={self.distribution!r} takes"
            )
            return IncompatibleModelError(
                f"{len(sites)} layers could share, but no two of them are equal{part}. LowRank() makes each layer small by itself"
            )
        return IncompatibleModelError(
            f"rate={self.rate} is too large: the largest set of equal layers (from {largest[0].name!r}) has {len(largest)}. "
            f"Use a rate of at most {len(largest)}"
        )

    def build(self, group: Sequence[Site[Layer]]) -> list[Replacement]:
        layers = [site.module for site in group]
        first = layers[0]
        shared: nn.Module
        if self.keeps_members:
            shared = FUSED[torch_class(first)](layers, self.fusion)
        else:
            shared = SHARED[torch_class(first)](first)
            if self.fusion == "mean":
                set_to_mean(shared, layers)
        return [(layer, shared) for layer in layers]


def shared_index(depth: int, rate: int, mapping: str = "sequential", seed: int = 0) -> list[int]:
    """Which of the ``depth / rate`` shared weights each layer uses.

    Example:
        >>> shared_index(6, 2), shared_index(6, 2, "strided")
        ([0, 0, 1, 1, 2, 2], [0, 1, 2, 0, 1, 2])

    Source: SPIN, section 3.2 (sharing mapping).
    """
    if depth % rate:
        raise ConfigError(f"rate={rate} does not divide the depth {depth}")
    if mapping == "strided":
        return [layer % (depth // rate) for layer in range(depth)]
    slots = [layer // rate for layer in range(depth)]
    if mapping == "sequential":
        return slots
    order = torch.randperm(depth, generator=torch.Generator().manual_seed(seed)).tolist()
    return [slots[place] for place in order]


def _named_groups(
    sites: Sequence[Site[Layer]], indexed: Sequence[Site[Layer]], wanted: Sequence[Sequence[str | int]]
) -> list[list[Site[Layer]]]:
    """Groups by names, or by indices into ``indexed``; each layer is in one group, with layers of its geometry."""
    by_name = {name: site for site in sites for name in site.names}
    groups: list[list[Site[Layer]]] = []
    used: set[str] = set()
    for keys in wanted:
        groups.append([])
        for key in keys:
            if isinstance(key, int) and not 0 <= key < len(indexed):
                raise ConfigError(
                    f"groups names layer {key}, but there are {len(indexed)} layers that can share (0 to {len(indexed) - 1})"
                )
            if isinstance(key, str) and key not in by_name:
                raise unknown_name("layer in groups", key, by_name)
            site = indexed[key] if isinstance(key, int) else by_name[key]
            if site.name in used:
                raise ConfigError(f"groups names layer {site.name!r} twice: name each layer once")
            first = groups[-1][0] if groups[-1] else site
            if signature(site.module) != signature(first.module):
                raise IncompatibleModelError(
                    f"layers {first.name!r} and {site.name!r} cannot share: {first.module} against {site.module}. "
                    "Put only equal layers into one of the groups"
                )
            used.add(site.name)
            groups[-1].append(site)
    return groups


EXAMPLES = (
    Example(config=WeightSharing(), params=2 * (8 * 8 * 9 + 8)),
    # the members are kept, with a scale per layer and channel or per layer; each of four uses fuses two members
    Example(
        config=WeightSharing(fusion="channel_weighted_mean"),
        params=4 * (8 * 8 * 9 + 8) + 4 * 8,
        generation_macs=4 * 2 * (8 * 8 * 9),
    ),
    Example(
        config=WeightSharing(mapping="strided", fusion="scalar_weighted_mean"),
        params=4 * (8 * 8 * 9 + 8) + 4,
        generation_macs=4 * 2 * (8 * 8 * 9),
    ),
)


def full_capacity(layers: int, entries: int) -> list[WeightSharing]:
    return [WeightSharing(rate=1), WeightSharing(rate=1, fusion="channel_weighted_mean")]
