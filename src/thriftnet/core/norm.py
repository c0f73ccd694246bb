"""Normalisation that may be tied and have several widths: separate statistics per width, one shared affine."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from thriftnet.core.tied import Tied
from thriftnet.core.width import WidthAware, WidthSpec
from thriftnet.errors import ConfigError, IncompatibleModelError

T = TypeVar("T", Tensor, Tensor | None)

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class PlainNorm(Tied, WidthAware):
    """Base of the norms of several widths. They use the first channels of weight and bias, and have as many outputs as inputs."""

    standalone: ClassVar[bool] = True
    plain: ClassVar[type[nn.Module]]  # what it folds into
    weight: nn.Parameter
    bias: nn.Parameter

    @property
    def chooses_outs(self) -> bool:
        return False

    def width_for(self, ins: int, index: int) -> tuple[WidthSpec, int]:
        spec = self.width_spec
        fitting = [] if spec is None else [i for i, outs in enumerate(spec.outs) if outs == ins]
        if spec is None or not fitting:
            available = "one width" if spec is None else f"statistics for {sorted({*spec.outs})} channels"
            raise ConfigError(f"{type(self).__name__} has {available}, got {ins}")
        return spec, index if index in fitting else fitting[0]

    @abstractmethod
    def active_sizes(self) -> tuple[int, ...]:
        """Sizes of the plain norm at the selected width, its channels last."""

    def active(self) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias at the selected width."""
        spec = self.width_spec
        if spec is None or self.weight is None:
            return self.weight, self.bias
        weight = spec.take_outs(self.weight, self.width_index)
        return weight, None if self.bias is None else spec.take_outs(self.bias, self.width_index)

    def statistics(self) -> dict[str, Tensor | None]:
        """Running statistics of the selected width."""
        return {}

    @torch.no_grad()
    def fold(self) -> nn.Module:
        """The plain norm that computes the same, at the selected width."""
        sizes = self.active_sizes()
        norm = self.plain(*sizes, **_options(self))
        statistics = {name: _first(value, sizes[-1]) for name, value in self.statistics().items()}
        state = {**dict(zip(("weight", "bias"), self.active(), strict=True)), **statistics}
        norm.load_state_dict({name: value for name, value in state.items() if value is not None})
        return norm.train(self.training)


class PlainBatchNorm2d(PlainNorm, nn.BatchNorm2d):
    """A batch norm as `nn.BatchNorm2d`; in addition it may be tied and have several widths.

    Weight and bias are shared by all widths. Each width has its own statistics, unless its `WidthSpec` says which ones share:
    the widest under the usual names, narrower ones as ``running_mean_0``, ``running_var_0``, ... narrowest first.

    Source: Yu et al., Slimmable Neural Networks, ICLR 2019, section 3.3.
    """

    plain: ClassVar[type[nn.Module]] = nn.BatchNorm2d

    def __init__(self, like: nn.BatchNorm2d) -> None:
        super().__init__(like.num_features, **_options(like))
        self.load_state_dict(like.state_dict())
        self.train(like.training)

    def set_width_spec(self, width_spec: WidthSpec | None) -> None:
        super().set_width_spec(width_spec)
        add_statistics(self, width_spec)

    def statistics(self) -> dict[str, Tensor | None]:
        """Running mean, variance and batch count of the selected width."""
        if self.running_mean is None:
            return dict.fromkeys(STATISTICS)
        suffix = statistics_suffix(self.width_spec, self.width_index)
        return {name: getattr(self, name + suffix) for name in STATISTICS}

    def active_sizes(self) -> tuple[int, ...]:
        return (self.active_outs(self.num_features),)

    def forward(self, input: Tensor) -> Tensor:
        (channels,) = self.active_sizes()
        mean, var, count = self.statistics().values()
        momentum = self.momentum
        if self.training and mean is not None and var is not None and count is not None:
            count.add_(1)
            momentum = 1.0 / float(count) if momentum is None else momentum
        return F.batch_norm(
            input,
            _first(mean, channels),
            _first(var, channels),
            *self.active(),
            self.training or mean is None,
            0.0 if momentum is None else momentum,
            self.eps,
        )


class PlainGroupNorm(PlainNorm, nn.GroupNorm):
    """A group norm as `nn.GroupNorm`; at a narrower width it keeps its channels per group and has fewer groups."""

    plain: ClassVar[type[nn.Module]] = nn.GroupNorm

    def __init__(self, like: nn.GroupNorm) -> None:
        super().__init__(like.num_groups, like.num_channels, **_options(like))
        self.load_state_dict(like.state_dict())

    def active_sizes(self) -> tuple[int, ...]:
        channels = self.active_outs(self.num_channels)
        return channels // (self.num_channels // self.num_groups), channels

    def forward(self, input: Tensor) -> Tensor:
        return F.group_norm(input, self.active_sizes()[0], *self.active(), self.eps)


class PlainLayerNorm(PlainNorm, nn.LayerNorm):
    """A layer norm over the last axis as `nn.LayerNorm`; in addition it may be tied and have several widths."""

    channel_axis: ClassVar[int] = -1
    plain: ClassVar[type[nn.Module]] = nn.LayerNorm

    def __init__(self, like: nn.LayerNorm) -> None:
        super().__init__(like.normalized_shape, **_options(like))
        self.load_state_dict(like.state_dict())

    def active_sizes(self) -> tuple[int, ...]:
        return (self.active_outs(self.normalized_shape[0]),)

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.active_sizes(), *self.active(), self.eps)


@torch.no_grad()
def add_statistics(norm: nn.modules.batchnorm._BatchNorm, width_spec: WidthSpec | None) -> None:
    """Give a batch norm statistics for each width that is narrower than the widest, and remove those of former widths."""
    for name in [name for name in norm._buffers if name not in STATISTICS and name.startswith(STATISTICS)]:
        delattr(norm, name)
    if width_spec is None or norm._buffers["running_mean"] is None:
        return
    for bn_set, index in width_spec.narrower_bn_sets().items():
        for name in STATISTICS:
            values = norm.get_buffer(name)
            norm.register_buffer(
                f"{name}_{bn_set}", (width_spec.take_outs(values, index) if values.ndim else values).clone()
            )
    if width_spec.out_runs:  # the widest set is updated in place: its values come first, whichever the channels are
        for name in ("running_mean", "running_var"):
            taken = width_spec.take_outs(norm.get_buffer(name), -1).clone()
            norm.get_buffer(name)[: len(taken)] = taken


def statistics_suffix(width_spec: WidthSpec | None, index: int) -> str:
    """Behind the names of a batch norm's statistics for a width; "" for the widest."""
    narrower = width_spec is not None and width_spec.bn_set(index) != width_spec.bn_set(-1)
    return f"_{width_spec.bn_set(index)}" if width_spec is not None and narrower else ""


def _first(tensor: T, channels: int) -> T:
    """The first channels; a number, such as a count of batches, is unchanged."""
    return tensor if tensor is None or not tensor.ndim else tensor[:channels]


def _options(norm: nn.Module) -> dict[str, Any]:
    """Constructor arguments of a norm except its channels."""
    names = ("eps", "momentum", "affine", "track_running_stats", "elementwise_affine")
    options = {name: getattr(norm, name) for name in names if hasattr(norm, name)}
    if norm.weight is not None and getattr(norm, "bias", None) is None:
        options["bias"] = False
    like = first_tensor(norm)
    return options if like is None else {**options, "device": like.device, "dtype": like.dtype}


def scale_and_shift(norm: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """Scale and shift, each (C,), by which a batch norm in eval mode computes ``x * scale + shift`` at the selected width."""
    mean, var = norm.running_mean, norm.running_var
    weight: Tensor | None = norm.weight
    bias: Tensor | None = norm.bias
    if isinstance(norm, PlainBatchNorm2d):
        (channels,) = norm.active_sizes()
        mean, var, _ = (_first(value, channels) for value in norm.statistics().values())
        weight, bias = norm.active()
    if mean is None or var is None:
        raise IncompatibleModelError(f"{norm} keeps no running statistics, so it cannot be folded into a convolution")
    scale = (var + norm.eps).rsqrt()
    scale = scale if weight is None else weight * scale
    return scale, (0.0 if bias is None else bias) - mean * scale


def first_tensor(module: nn.Module) -> Tensor | None:
    """The first floating-point parameter or buffer of a module, for its type and device."""
    return next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), None)
