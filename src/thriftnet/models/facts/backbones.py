"""Plain backbones."""

from __future__ import annotations

from thriftnet.models.entry import ModelEntry

RESNET = "He et al., Deep Residual Learning, CVPR 2016"
WRN = "Zagoruyko & Komodakis, Wide Residual Networks, BMVC 2016"


def _resnet(depth: int, params: int, macs: int) -> ModelEntry:
    return ModelEntry("resnet", "resnet", RESNET, params, macs, kwargs={"depth": depth}, fixed=("depth",))


def _wrn(depth: int, width: int, params: int, macs: int) -> ModelEntry:
    return ModelEntry("wrn", "wrn", WRN, params, macs, kwargs={"depth": depth, "width": width}, fixed=("depth", "width"))


BACKBONES: dict[str, ModelEntry] = {
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
