"""Layers of several widths. Width belongs to the base layers, so that slimming composes with every technique.

Source: Yu et al., Slimmable Neural Networks, ICLR 2019, section 3 (switchable widths, one set of weights).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, TypeAlias

import torch
from torch import Tensor, nn

from thriftnet.arguments import Index, Range, checked
from thriftnet.core.module import ThriftyModule
from thriftnet.errors import ConfigError, IncompatibleModelError

Width: TypeAlias = Annotated[Annotated[float, Range(-1e9, 1e9)] | str, "a ratio such as 0.5, or a name such as 'largest'"]
Runs: TypeAlias = tuple[tuple[int, int], ...]  # start and end of channels that are used
ENDS = ("smallest", "largest")  # understood by every slimmable network


@dataclass(frozen=True)
class WidthSpec:
    """Input and output channels of a layer in each of the network's sub-networks, narrowest first.

    Args:
        widths: Names of the sub-networks: ratios in (0, 1], ascending; or text, where no single ratio fits all layers. A network
            whose "largest" is not the last in its list of sub-networks, as DS-Net's, has it as one more at the end.
        ins: Input channels of each.
        outs: Output channels of each.
        bn_sets: Index of the batch-norm statistics that each uses, the widest ones last. Default: one set each.
        slot: A common name for layers that must have equally many output channels. Default: the layer's own name.
        in_runs, out_runs: Start and end of the channels that each uses, where they are not the first ones.
    """

    widths: tuple[Width, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    bn_sets: tuple[int, ...] | None = None
    slot: str = field(default="", compare=False)
    in_runs: tuple[Runs, ...] = ()
    out_runs: tuple[Runs, ...] = ()

    def take_ins(self, tensor: Tensor, index: int, dim: int) -> Tensor:
        """The inputs of the sub-network at ``index``, along an axis of a weight."""
        return take(tensor, dim, self.in_runs[index] if self.in_runs else ((0, self.ins[index]),))

    def take_outs(self, tensor: Tensor, index: int, dim: int = 0) -> Tensor:
        """The outputs of the sub-network at ``index``, along an axis of a weight."""
        return take(tensor, dim, self.out_runs[index] if self.out_runs else ((0, self.outs[index]),))

    def bn_set(self, index: int) -> int:
        """Index of the batch-norm statistics that the sub-network at ``index`` uses."""
        return range(len(self.widths))[index] if self.bn_sets is None else self.bn_sets[index]

    def narrower_bn_sets(self) -> dict[int, int]:
        """Index of a sub-network that uses each set of batch-norm statistics, without the widest."""
        users = {self.bn_set(index): index for index in range(len(self.widths))}
        widest = max(users)
        return {bn_set: index for bn_set, index in sorted(users.items()) if bn_set != widest}


class WidthAware(ThriftyModule):
    """A layer that can run at several widths; until `set_width_spec` is called it has one.

    The class attributes say how a part of a network gets a width of its own, see `width_slots`.
    """

    width_spec: WidthSpec | None = None
    width_index: int = -1  # into width_spec.widths; the last is the widest

    channel_axis: ClassVar[int] = -3  # of its input
    standalone: ClassVar[bool] = False  # whether it can have a width of its own, apart from the rest of the network

    @property
    def chooses_outs(self) -> bool:
        """Whether its width is free to choose: outputs do not have to match inputs."""
        return True

    def set_width_spec(self, width_spec: WidthSpec | None) -> None:
        """Give the layer its widths, and select the widest; None makes it a layer of one width."""
        self.width_spec = width_spec
        self.width_index = -1

    def set_width_index(self, index: int) -> None:
        """Select a width by its index."""
        self.width_index = index

    def adopt_widths(self, like: nn.Module) -> None:
        """Take over the widths of the layer it replaces, and the selected one."""
        if isinstance(like, WidthAware) and like.width_spec is not None:
            self.set_width_spec(like.width_spec)
            self.set_width_index(like.width_index)

    def active_ins(self, full: int) -> int:
        """Input channels at the selected width, of ``full``."""
        return full if self.width_spec is None else self.width_spec.ins[self.width_index]

    def active_outs(self, full: int) -> int:
        """Output channels at the selected width, of ``full``."""
        return full if self.width_spec is None else self.width_spec.outs[self.width_index]

    def width_for(self, ins: int, index: int) -> tuple[WidthSpec, int]:
        """The widths of this layer, and the one to select, if it reads ``ins`` channels and has the width at ``index``.

        Raises:
            ConfigError: It cannot read that many channels.
        """
        spec = self.width_spec
        if spec is None or ins not in spec.ins:
            expected = "one width" if spec is None else f"{sorted({*spec.ins})} channels"
            raise ConfigError(f"{type(self).__name__} reads {expected}, got {ins}")
        outs = spec.outs[index] if self.chooses_outs else ins * spec.outs[index] // spec.ins[index]
        read, made = spec.ins.index(ins), index % len(spec.widths)
        runs = spec.in_runs[read : read + 1], spec.out_runs[made : made + 1] if outs == spec.outs[made] else ()
        return WidthSpec(("own",), (ins,), (outs,), in_runs=runs[0], out_runs=runs[1]), 0


def take(tensor: Tensor, dim: int, runs: Runs) -> Tensor:
    """These entries of a tensor along one axis."""
    parts = [tensor.narrow(dim, start, end - start) for start, end in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def channels_of(layer: nn.Module) -> tuple[int, int]:
    """Input and output channels of a layer."""
    if isinstance(layer, nn.LayerNorm):
        return layer.normalized_shape[0], layer.normalized_shape[0]
    same = [(name, name) for name in ("num_features", "num_channels", "channels")]
    for ins, outs in (("in_channels", "out_channels"), ("in_features", "out_features"), *same):
        if hasattr(layer, ins):
            return getattr(layer, ins), getattr(layer, outs)
    raise IncompatibleModelError(f"{type(layer).__name__} has no attribute with its number of channels")


def slimmable_layers(model: nn.Module) -> Iterator[WidthAware]:
    """Every layer of ``model`` that has several widths."""
    return (m for m in model.modules() if isinstance(m, WidthAware) and m.width_spec is not None)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; on exit, every module's mode and every layer's width are restored."""
    modes = [(module, module.training) for module in model.modules()]
    selected = [(layer, layer.width_index) for layer in slimmable_layers(model)]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
        for layer, index in selected:
            layer.set_width_index(index)


@checked
def widths(model: nn.Module) -> tuple[Width, ...]:
    """The widths that ``model`` can run at, as `set_width` takes them, ascending; empty for a network of one width.

    Ratios, or names: DS-Net's sub-networks are "0", "1", ... and "largest".
    """
    return next((layer.width_spec.widths for layer in slimmable_layers(model) if layer.width_spec is not None), ())


@checked
def width(model: nn.Module) -> Width:
    """The width that ``model`` runs at now (1.0 for a network of one width)."""
    layer = next(slimmable_layers(model), None)
    return 1.0 if layer is None else widths(model)[layer.width_index]


@checked
def set_width(model: nn.Module, width: Width | None = None, *, index: Index | None = None) -> None:
    """Let ``model`` run at one of its widths from now on.

    Args:
        model: A network converted by `Slimmable`, or slimmable by itself.
        width: A ratio that the network has, "smallest" or "largest", or another name in `widths`.
        index: Instead of a width: index into the network's list of sub-networks, narrowest first. DS-Net's "largest" is
            not in that list: its last sub-network is narrower.

    Raises:
        IncompatibleModelError: The network has one width only.
        ConfigError: It has no such width; the message lists those it has.

    Example:
        >>> from thriftnet.models import create_model
        >>> from thriftnet.techniques import convert
        >>> model = convert(create_model("resnet20"), "slimmable(widths=(0.25, 0.5, 1.0))")
        >>> set_width(model, 0.5)
        >>> set_width(model, index=1)
        >>> width(model)
        0.5
    """
    select_width(model, width_index(require_widths(model), width, index))


def select_width(model: nn.Module, selected: int) -> None:
    """Let ``model`` run at the width at this index of `widths`."""
    for layer in slimmable_layers(model):
        layer.set_width_index(selected)


def require_widths(model: nn.Module) -> tuple[Width, ...]:
    """The widths of a slimmable network.

    Raises:
        IncompatibleModelError: It has one width only.
    """
    available = widths(model)
    if not available:
        raise IncompatibleModelError(
            f"{type(model).__name__} has one width only. Make it slimmable first: convert(model, Slimmable(widths=(0.5, 1.0)))"
        )
    return available


def width_index(available: tuple[Width, ...], width: Width | None = None, index: int | None = None) -> int:
    """Index into `widths` of a width, which is given by ratio or name, or by its index in the list of sub-networks.

    Raises:
        ConfigError: Neither is given, or both; or there is no such width: the message lists those there are.
    """
    if (width is None) == (index is None):
        raise ConfigError(f"width={width!r}, index={index!r}: give a width or an index, one of the two")
    listed = len(available) - sum(each in ENDS for each in available)
    if index is not None:
        if isinstance(index, int) and not isinstance(index, bool) and -listed <= index < listed:
            return index % listed
        raise ConfigError(f"no width at index={index!r}: expected {_expected(available, listed)}")
    if isinstance(width, str):
        named = {"smallest": 0, "largest": len(available) - 1, **{each: i for i, each in enumerate(available)}}
        if width in named:
            return named[width]
    elif isinstance(width, int | float) and not isinstance(width, bool):
        for i, each in enumerate(available):
            if isinstance(each, float) and abs(each - width) < 1e-9:
                return i
    number = float(width) if isinstance(width, int | float) else 0.5
    hint = f". Did you mean index={number:g}?" if number.is_integer() and 0 <= number < listed else ""
    raise ConfigError(f"no width {width!r}: expected {_expected(available, listed)}{hint}")


def _expected(available: tuple[Width, ...], listed: int) -> str:
    """The widths of a network for messages."""
    ratios = "".join(f"{format_width(each)}, " for each in available if not isinstance(each, str))
    return f"{ratios}'smallest', 'largest', or an index: index=0 to {listed - 1} (--width-index on the command line)"


def format_width(width: Width) -> str:
    """A width for messages.

    Example:
        >>> format_width(0.5), format_width("largest")
        ('0.5', 'largest')
    """
    return width if isinstance(width, str) else f"{width:g}"


def exact_share(channels: int, width: Width) -> int:
    """``width`` of ``channels``; 0 if that is not an integer >= 1, or ``width`` is not a ratio.

    Only exact shares are taken, so that sums of channels (concatenation) and products (flattening) stay consistent.

    Example:
        >>> exact_share(64, 0.25), exact_share(10, 0.25)
        (16, 0)
    """
    if isinstance(width, str):
        return 0
    share = round(channels * width)
    return share if abs(share - channels * width) < 1e-6 else 0
