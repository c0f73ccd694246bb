"""ShiftResNets and the networks that their paper compares them with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thriftnet.models.entry import ModelEntry, Published

SHIFT = "Wu et al., Shift: A Zero FLOP, Zero Parameter Alternative to Spatial Convolutions, CVPR 2018"
OURS = "ours: the original only names it"
POOLING = "the authors' pooling works at 32 x 32 only; here it is global"
STEM = "published FLOPs = MACs + 147,456: the stem was counted with 64 output channels and one input channel"
README = "in its text the README gives {} % on CIFAR-100 for this network; its table has that for {}"
BY_REDUCTION = "published CIFAR-100 top-1 by reduction{}: "
UNSTATED = Published()
PLAIN: Mapping[str, Any] = {"shortcut": "projection"}


def _shift(
    depth: int, expansion: float, params: int, macs: int, published: Published, aliases: tuple[str, ...] = ()
) -> ModelEntry:
    return ModelEntry(
        "shiftresnet",
        "shiftresnet",
        SHIFT,
        params,
        macs,
        "shift",
        {"depth": depth, "expansion": expansion},
        ("depth",),
        aliases=aliases,
        published=published,
        note=POOLING,
        baseline=f"resnet{depth}",
        baseline_kwargs=PLAIN,
    )


def _compared(
    function: str, depth: int, params: int, macs: int, published: Published = UNSTATED, note: str = OURS
) -> ModelEntry:
    return ModelEntry(
        "depthwise_resnet",
        function,
        SHIFT,
        params,
        macs,
        kwargs={"depth": depth},
        fixed=("depth",),
        published=published,
        note=note,
        baseline=f"resnet{depth}",
        baseline_kwargs={**PLAIN, "reduction": 1.0},
    )


def _projection(depth: int, params: int, macs: int, published: Published) -> ModelEntry:
    kwargs = {"depth": depth, **PLAIN}
    fixed = ("depth", "shortcut")
    return ModelEntry("resnet", "resnet", SHIFT, params, macs, "", kwargs, fixed, published=published, note=POOLING)


def _stated(params: str, cifar10: float, cifar100: float, flops: str = "", *notes: str) -> Published:
    return Published(params, flops, {"CIFAR-10": cifar10, "CIFAR-100": cifar100}, "; ".join(notes))


def _by_reduction(figures: Mapping[float, float], mode: str = "") -> str:
    return BY_REDUCTION.format(mode) + ", ".join(f"{reduction:g}: {top1}" for reduction, top1 in figures.items())


def _depthwise(figures: Mapping[float, float]) -> Published:
    return Published(note=_by_reduction(figures))


BLOCK = " of reduction_mode='block'"

SHIFTRESNETS: dict[str, ModelEntry] = {
    "resnet20_projection": _projection(
        20,
        272474,
        40813184,
        _stated(
            "0.27M", 91.35, 66.25, "40,960,640", STEM, _by_reduction({7.2: 50.23, 2.8: 60.72, 1.5: 65.59, 0.98: 68.3}, BLOCK)
        ),
    ),
    "resnet56_projection": _projection(
        56,
        855770,
        125747840,
        _stated("0.86M", 92.01, 69.27, "", _by_reduction({7.6: 58.7, 2.9: 66.89, 1.5: 70.49, 0.98: 71.57}, BLOCK)),
    ),
    "resnet110_projection": _projection(
        110,
        1730714,
        253149824,
        _stated("1.73M", 92.46, 72.11, "", _by_reduction({7.8: 65.79, 2.9: 70.22, 1.5: 72.21, 0.98: 72.67}, BLOCK)),
    ),
    "resnet20_block28": ModelEntry(
        "resnet",
        "resnet",
        SHIFT,
        96206,
        14049920,
        kwargs={"depth": 20, **PLAIN, "reduction": 2.8, "reduction_mode": "block"},
        fixed=("depth", "shortcut", "reduction", "reduction_mode"),
        published=_stated("96,206", 88.81, 60.72, "14,197,376", STEM, README.format(68.3, "reduction 0.98")),
        note=POOLING,
        baseline="resnet20",
        baseline_kwargs=PLAIN,
    ),
    "shiftresnet20": _shift(20, 1.0, 34906, 5948032, _stated("0.03M", 85.78, 55.05)),
    "shiftresnet20_e3": _shift(
        20,
        3.0,
        95642,
        16433792,
        _stated("95,642", 89.56, 65.83, "16,581,248", STEM, README.format(70.77, "expansion 9")),
        ("shiftresnet20_3.0",),
    ),
    "shiftresnet20_e6": _shift(20, 6.0, 186746, 32162432, _stated("0.19M", 91.07, 69.73), ("shiftresnet20_6.0",)),
    "shiftresnet20_e9": _shift(20, 9.0, 277850, 47891072, _stated("0.28M", 91.79, 70.77), ("shiftresnet20_9.0",)),
    "shiftresnet56": _shift(56, 1.0, 102106, 15385216, _stated("0.10M", 89.69, 63.2)),
    "shiftresnet56_e3": _shift(56, 3.0, 294554, 44745344, _stated("0.29M", 92.48, 69.77), ("shiftresnet56_3.0",)),
    "shiftresnet56_e6": _shift(56, 6.0, 583226, 88785536, _stated("0.58M", 93.49, 72.33), ("shiftresnet56_6.0",)),
    "shiftresnet56_e9": _shift(56, 9.0, 871898, 132825728, _stated("0.87M", 93.17, 73.43), ("shiftresnet56_9.0",)),
    "shiftresnet110": _shift(110, 1.0, 202906, 29540992, _stated("0.20M", 90.67, 68.01)),
    "shiftresnet110_e3": _shift(110, 3.0, 592922, 87212672, _stated("0.59M", 92.42, 72.1), ("shiftresnet110_3.0",)),
    "shiftresnet110_e6": _shift(110, 6.0, 1177946, 173720192, _stated("1.18M", 93.03, 73.17), ("shiftresnet110_6.0",)),
    "shiftresnet110_e9": _shift(110, 9.0, 1762970, 260227712, _stated("1.76M", 93.36, 73.71), ("shiftresnet110_9.0",)),
    "depthwiseresnet20": _compared(
        "depthwise_resnet", 20, 38602, 7053952, _depthwise({1.12: 61.32, 0.38: 64.51, 0.19: 65.38, 0.125: 65.59}), POOLING
    ),
    "depthwiseresnet56": _compared(
        "depthwise_resnet", 56, 113194, 18039424, _depthwise({1.12: 65.3, 0.37: 66.49, 0.19: 67.46, 0.124: 67.75}), POOLING
    ),
    "depthwiseresnet110": _compared(
        "depthwise_resnet", 110, 225082, 34517632, _depthwise({1.1: 65.8, 0.37: 67.22, 0.19: 68.11, 0.123: 68.39}), POOLING
    ),
    "shuffleresnet20": _compared("shuffle_resnet", 20, 16330, 2790016),
    "shuffleresnet56": _compared("shuffle_resnet", 56, 42538, 6697600),
    "shuffleresnet110": _compared("shuffle_resnet", 110, 81850, 12558976),
    "mobileresnet20": _compared("mobile_resnet", 20, 35850, 6460032),
    "mobileresnet56": _compared("mobile_resnet", 56, 110442, 17445504),
    "mobileresnet110": _compared("mobile_resnet", 110, 222330, 33923712),
}
