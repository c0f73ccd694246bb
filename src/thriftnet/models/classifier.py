"""The interface of every network of the zoo beside `forward`, named as in timm."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Annotated, Any

from torch import Tensor, nn

from thriftnet.arguments import ClassesOrNone, Range, check, checked
from thriftnet.errors import ConfigError
from thriftnet.models.table import IDENTITY


class Classifier(nn.Module):
    """A network with features, global average pooling and a linear head called ``fc``.

    Subclasses define `forward_features`: (N, C, H, W) images -> (N, D, h, w).
    """

    fc: nn.Module
    num_features: int
    dropout: nn.Module | None  # before the head

    def __init__(self, input_size: tuple[int, int, int], num_classes: int, first_conv: str = "conv1") -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, None
        self.default_cfg: dict[str, Any] = {
            "input_size": input_size,
            "num_classes": num_classes,
            "first_conv": first_conv,
            "classifier": "fc",
            "pool_size": None,
            "interpolation": "bilinear",
        }

    def forward_features(self, x: Tensor) -> Tensor:
        """The maps before pooling."""
        raise TypeError(f"{type(self).__name__} defines no forward_features")

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the maps, and classify them unless ``pre_logits``."""
        pooled = x.mean((2, 3))
        if pre_logits:
            return pooled
        logits: Tensor = self.fc(pooled if self.dropout is None else self.dropout(pooled))
        return logits

    def forward(self, x: Tensor) -> Tensor:
        channels = self.default_cfg["input_size"][0]
        if x.ndim != 4 or x.shape[1] != channels:
            raise ConfigError(
                f"layer {self.default_cfg['first_conv']!r} of {type(self).__name__} reads images (N, {channels}, H, W), "
                f"got {tuple(x.shape)}. Build the network with in_chans=..., or give images with {channels} channels"
            )
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.fc

    @checked
    def reset_classifier(self, num_classes: ClassesOrNone) -> None:
        """A new head for this many classes; 0 removes it."""
        like = next(self.parameters())
        self.num_classes = num_classes
        head = nn.Linear(self.num_features, num_classes).to(like) if num_classes else nn.Identity()
        self.fc = head.train(self.training)
        identity = getattr(self, IDENTITY, None)
        if identity is not None:
            setattr(self, IDENTITY, {**identity, "kwargs": {**identity["kwargs"], "num_classes": num_classes}})


def check_depth(depth: int, expected: Collection[int]) -> None:
    """Raise for a depth that the architecture does not come in, with the nearest one that it does."""
    if depth not in expected:
        nearest = min(expected, key=lambda known: abs(known - depth))
        raise ConfigError(f"depth={depth}: expected {', '.join(map(str, expected))}; nearest is {nearest}")


def blocks_of_depth(depth: int, others: int = 2, kind: str = "a ResNet of this kind") -> tuple[int, int, int]:
    """Blocks of each stage of a network of three stages: n for depth 6n + ``others``.

    Raises:
        ConfigError: An impossible depth, with the nearest possible ones.
    """
    check("depth", depth, Annotated[int, Range(6 + others, 10_000)])
    blocks, rest = divmod(depth - others, 6)
    if rest:
        below = depth - rest
        raise ConfigError(f"depth={depth}: {kind} has 6n + {others} layers; nearest are {below} and {below + 6}")
    return (blocks,) * 3


def check_ranks(shared_rank: int, unique_rank: int, entries: int, where: str = "") -> None:
    """Raise for more filters in a basis than a filter has entries."""
    if shared_rank + unique_rank > entries:
        larger, other = ("shared", unique_rank) if shared_rank > unique_rank else ("unique", shared_rank)
        nearest = f"{larger}_rank={entries - other}" if other <= entries else f"shared_rank={entries}, unique_rank=0"
        raise ConfigError(
            f"shared_rank={shared_rank} and unique_rank={unique_rank}: together they are at most {entries}, the entries of "
            f"a filter{where}; nearest is {nearest}"
        )


def make_stages(
    block: Callable[[int, int, int], nn.Module],
    ins: int,
    widths: Sequence[int],
    blocks: Sequence[int],
    strides: Sequence[int],
) -> list[nn.Sequential]:
    """Stages of equal blocks, each made from its input channels, output channels and stride; only the first of a stage strides."""
    stages = []
    for outs, number, stride in zip(widths, blocks, strides, strict=True):
        stages.append(nn.Sequential(block(ins, outs, stride), *(block(outs, outs, 1) for _ in range(number - 1))))
        ins = outs
    return stages


def projection(ins: int, outs: int, stride: int) -> nn.Module:
    """The shortcut of a block: 1 x 1 convolution and norm where the shape changes, else an identity."""
    if stride == 1 and ins == outs:
        return nn.Identity()
    return nn.Sequential(nn.Conv2d(ins, outs, 1, stride, bias=False), nn.BatchNorm2d(outs))
