"""Wide ResNets with soft sharing: swrn<depth>_<width>_<templates>."""

from __future__ import annotations

from thriftnet.models.entry import ModelEntry, Published

SOFT = "Savarese & Maire, Learning Implicitly Recurrent CNNs Through Parameter Sharing, ICLR 2019"
NOTE = "the authors' pooling works at 32 x 32 only; here it is global. At depth 10 the authors also store banks that nothing uses"
STATED = Published(note="the authors' repository states no counts")


def _swrn(depth: int, width: int, templates: int, params: int, macs: int) -> ModelEntry:
    return ModelEntry(
        "swrn",
        "swrn",
        SOFT,
        params,
        macs,
        "soft-sharing",
        {"depth": depth, "width": width, "templates": templates},
        ("depth", "width", "templates"),
        published=STATED,
        note=NOTE,
        baseline="wrn",
        baseline_kwargs={"depth": depth, "width": width},
    )


SWRNS: dict[str, ModelEntry] = {
    "swrn": ModelEntry(
        "swrn", "swrn", SOFT, 36479302, 5243328768, "soft-sharing", published=STATED, note=NOTE, baseline="wrn"
    ),
    "swrn16_1_2": _swrn(16, 1, 2, 175078, 26657408),
    "swrn16_4_2": _swrn(16, 4, 2, 2748902, 392612352),
    "swrn28_2_2": _swrn(28, 2, 2, 693502, 214353152),
    "swrn28_4_6": _swrn(28, 4, 6, 5849158, 845597184),
    "swrn28_10_1": _swrn(28, 10, 1, 12287212, 5243328768),
    "swrn28_10_2": _swrn(28, 10, 2, 17125630, 5243328768),
    "swrn28_10_6": _swrn(28, 10, 6, 36479302, 5243328768),
    "swrn40_2_1": _swrn(40, 2, 1, 501752, 327599360),
    "swrn40_4_2": _swrn(40, 4, 2, 2756118, 1298582016),
}
