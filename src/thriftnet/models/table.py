"""The literal table of the zoo. Counts are facts at 10 classes and 3x32x32 input, recomputed by a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any


@dataclass(frozen=True)
class ModelEntry:
    """One network of the zoo.

    Args:
        family: Module in `thriftnet.models` that builds it.
        function: Function in that module.
        paper: Where it comes from.
        params: Stored parameters.
        macs: Executed multiply-accumulates at batch 1.
        kwargs: Arguments that make this member of the family.
        fixed: Those of them that a user cannot change.
        input_size: (C, H, W) that params and MACs are for.
    """

    family: str
    function: str
    paper: str
    params: int
    macs: int
    kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    fixed: tuple[str, ...] = ()
    input_size: tuple[int, int, int] = (3, 32, 32)


RESNET = "He et al., Deep Residual Learning, CVPR 2016, section 4.2"
WRN = "Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016"


def _resnet(depth: int, params: int, macs: int) -> ModelEntry:
    return ModelEntry("resnet", "resnet", RESNET, params, macs, {"depth": depth}, ("depth",))


def _wrn(depth: int, width: int, params: int, macs: int) -> ModelEntry:
    return ModelEntry("wrn", "wrn", WRN, params, macs, {"depth": depth, "width": width}, ("depth", "width"))


MODELS: dict[str, ModelEntry] = {
    "resnet20": _resnet(20, 269722, 40551040),
    "resnet32": _resnet(32, 464154, 68862592),
    "resnet44": _resnet(44, 658586, 97174144),
    "resnet56": _resnet(56, 853018, 125485696),
    "resnet110": _resnet(110, 1727962, 252887680),
    "wrn": ModelEntry("wrn", "wrn", WRN, 36479194, 5243328768),
    "wrn16_4": _wrn(16, 4, 2748890, 392612352),
    "wrn28_10": _wrn(28, 10, 36479194, 5243328768),
    "wrn40_2": _wrn(40, 2, 2243546, 327599360),
    "wrn40_4": _wrn(40, 4, 8949210, 1298582016),
}
