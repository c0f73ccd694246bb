"""DS-Net's slimmable supernets: MobileNets whose stages have a choice of widths.

A sub-network has the smallest widths up to the stage with the gate, and its own widths from that stage on, where a gate may
choose it per image. Only "largest" is wide everywhere; it is not in the list of numbered sub-networks.

Source: Li et al., Dynamic Slimmable Network, CVPR 2021, section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from thriftnet.arguments import (
    Channels,
    Classes,
    Depth,
    Expansion,
    ImageChannels,
    KernelSide,
    Natural,
    ProperShare,
    Step,
    check,
    checked,
)
from thriftnet.core.conv import PlainConv2d
from thriftnet.core.linear import PlainLinear
from thriftnet.core.width import WidthAware, WidthSpec
from thriftnet.errors import ConfigError
from thriftnet.models.classifier import Classifier
from thriftnet.models.dsnet_blocks import (
    GATE_CHOICES,
    BlockOptions,
    StageSpec,
    WidestDropout,
    Widths,
    make_stage,
    names_of,
    slim_conv,
    slim_norm,
)

ACTIVATIONS: dict[str, type[nn.Module]] = {"swish": nn.SiLU, "relu": nn.ReLU}

StageRow: TypeAlias = Sequence[Any]  # widths, blocks, kernel size, stride, kind, gate

MOBILENETV1: tuple[StageRow, ...] = (
    ((32, 88), 1, 3, 1, "ds", False),
    ((48, 168), 2, 3, 2, "ds", False),
    ((96, 264), 2, 3, 2, "ds", False),
    (tuple(range(224, 641, 32)), 6, 3, 2, "ds", True),
    (tuple(range(736, 1153, 32)), 2, 3, 2, "ds", False),
)


@checked
class DSNet(Classifier):
    """A slimmable supernet: stem, stages, optionally a 1 x 1 head, global average pooling, dropout at "largest", linear classifier.

    Sub-network c has the smallest widths up to the stage with the gate and the c-th from that stage on; without a gate, the
    c-th everywhere. "largest" has the last widths everywhere.

    It starts at "largest"; ``set_width(model, index=3)`` selects a sub-network, ``freeze(model, index=3)`` extracts one.

    After the gate "largest" has the width and the batch-norm statistics of the last sub-network. The authors recalibrate
    the numbered ones only: ``recalibrate(model, loader, indices=range(14))``.

    Shape: (N, in_chans, H, W) -> (N, num_classes), for any H and W.

    Args:
        stem: Widths of the stem, ascending.
        stages: For each stage its widths, blocks, kernel size, stride, kind ("ds" or "ir") and whether it holds the gate.
        head: Channels of a 1 x 1 convolution before pooling, 0 for none.
        se_ratio: Reduced features of the channel attention, as a fraction of the widest channels.
        skip: Give blocks shortcuts.
        activation: "swish" or "relu".
        num_classes, in_chans: Outputs, and channels of the image.
        drop_rate: Dropout before the classifier, at "largest" only.
        gate_choices: Indices of the sub-networks that the gate chooses among. Default: the first four, as in the authors' code.

    Raises:
        ConfigError: An argument out of range, or stages with different numbers of widths.

    Source: Li et al., section 3.
    """

    def __init__(
        self,
        stem: Sequence[Channels] = (16, 24),
        stages: Sequence[StageRow] = MOBILENETV1,
        head: Natural = 0,
        se_ratio: Expansion = 0.25,
        skip: bool = False,
        activation: Literal["swish", "relu"] = "swish",
        num_classes: Classes = 1000,
        in_chans: ImageChannels = 3,
        drop_rate: ProperShare = 0.0,
        gate_choices: tuple[Natural, ...] | None = None,
    ) -> None:
        rows = [read_stage(number, spec) for number, spec in enumerate(stages)]
        ins, *widths = sub_networks([_ascending("stem", stem), *(row.widths for row in rows)], [row.gate for row in rows])
        options = BlockOptions(se_ratio, ACTIVATIONS[activation], skip, _choices(gate_choices, len(ins) - 1))
        super().__init__((in_chans, 224, 224), num_classes, "stem")
        self.stem: nn.Module = slim_conv(Widths((in_chans,) * len(ins)), ins, 3, 2)
        self.norm = slim_norm(ins)
        self.act = options.activation()
        self.stages = nn.Sequential()
        for row, outs in zip(rows, widths, strict=True):
            self.stages.append(make_stage(row, ins, outs, options))
            ins = outs
        self.head: nn.Sequential | None = None
        if head:
            outs = Widths((head,) * len(ins))
            self.head = nn.Sequential(slim_conv(ins, outs), slim_norm(outs), options.activation())
            ins = outs
        self.num_features, self._features = ins[-1], ins
        self.dropout = WidestDropout(drop_rate, ins)
        self.fc = self._classifier(num_classes)
        self._initialise()

    def _classifier(self, num_classes: int) -> PlainLinear:
        linear = PlainLinear(nn.Linear(self.num_features, num_classes))
        linear.set_width_spec(
            WidthSpec(names_of(self._features), tuple(self._features), (num_classes,) * len(self._features))
        )
        return linear

    def _initialise(self) -> None:
        """Convolutions normal by fan-out, classifier uniform."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | PlainConv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Linear):
                nn.init.uniform_(module.weight, -(module.out_features**-0.5), module.out_features**-0.5)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.stages(self.act(self.norm(self.stem(x))))
        return x if self.head is None else self.head(x)

    def reset_classifier(self, num_classes: int) -> None:
        """A new classifier for this many classes, for all widths of the network; 0 removes it."""
        if isinstance(self.fc, nn.Linear) and not isinstance(self.stem, WidthAware):
            self.num_features = self.fc.in_features  # of a frozen sub-network
        super().reset_classifier(num_classes)
        if num_classes and isinstance(self.stem, WidthAware):
            like = next(self.parameters())
            self.fc = self._classifier(num_classes).to(like)
            self.fc.set_width_index(self.stem.width_index)


def read_stage(number: int, spec: StageRow) -> StageSpec:
    """A stage from the row the user wrote."""
    where = f"stage {number}"
    if not isinstance(spec, list | tuple) or len(spec) != 6:
        raise ConfigError(f"{where} is {spec!r}: write it as (widths, blocks, kernel_size, stride, 'ds' or 'ir', gate)")
    widths, blocks, kernel_size, stride, kind, gate = spec
    check(f"blocks of {where}", blocks, Depth)
    check(f"kernel_size of {where}", kernel_size, KernelSide)
    check(f"stride of {where}", stride, Step)
    check(f"kind of {where}", kind, Literal["ds", "ir"])
    check(f"gate of {where}", gate, bool)
    if kernel_size % 2 == 0:
        raise ConfigError(
            f"kernel_size={kernel_size} of {where}: expected an odd number, such as {kernel_size - 1} or {kernel_size + 1}"
        )
    return StageSpec(_ascending(where, widths), blocks, kernel_size, stride, kind, gate)


def sub_networks(widths: Sequence[tuple[int, ...]], gates: Sequence[bool]) -> list[Widths]:
    """Channels of the stem and the stages in each sub-network, "largest" last.

    Args:
        widths: Widths of the stem and of each stage.
        gates: For each stage whether it holds the gate; at most one does.
    """
    if not gates or sum(gates) > 1:
        raise ConfigError(f"{len(gates)} stages with {sum(gates)} gates: expected one stage or more, and at most one gate")
    first = gates.index(True) + 1 if any(gates) else 0
    count = len(widths[first])
    for index, choices in enumerate(widths[first:], first):
        if len(choices) != count:
            name = f"stage {index - 1}" if index else "stem"
            raise ConfigError(f"{name} has {len(choices)} widths, but the network has {count} sub-networks: give it {count}")
    still = [(choices[0],) * count + (choices[-1],) for choices in widths[:first]]
    every = still + [(*choices, choices[-1]) for choices in widths[first:]]
    return [Widths(channels, f"stages.{index - 1}" if index else "stem") for index, channels in enumerate(every)]


def _choices(choices: Sequence[int] | None, count: int) -> tuple[int, ...]:
    """The sub-networks that a gate chooses among."""
    if choices is None:
        return tuple(number for number in GATE_CHOICES if number < count)
    if not _is_ascending(choices, 0) or len(choices) < 2 or choices[-1] >= count:
        raise ConfigError(
            f"gate_choices={choices!r}: expected two or more indices of sub-networks from 0 to {count - 1}, ascending, as (0, {count - 1})"
        )
    return tuple(choices)


def _ascending(where: str, widths: Sequence[int]) -> tuple[int, ...]:
    if not _is_ascending(widths, 1):
        raise ConfigError(f"widths {widths!r} of {where}: expected integers >= 1 in ascending order, as (16, 24)")
    return tuple(widths)


def _is_ascending(values: object, least: int) -> bool:
    """Whether they are integers >= ``least``, each larger than the one before it."""
    given = list(values) if isinstance(values, list | tuple | range) else []
    return bool(given) and all(type(v) is int and v >= least for v in given) and given == sorted(set(given))
