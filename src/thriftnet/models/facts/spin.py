"""SPIN's ConvMixers: plain, with shared pointwise weights, and with fused ones."""

from __future__ import annotations

from thriftnet.models.entry import ModelEntry, Published

SPIN = "Lin et al., SPIN: An Empirical Evaluation on Sharing Parameters of Isotropic Networks, ECCV 2022"
SIZE = (3, 224, 224)
MACS = 5004834816
NOTE = (
    "as the authors train it, not as in the ConvMixer paper: shortcut around the pointwise part too, activation before norm, "
    "biases in all convolutions, dropout; their code refuses every kernel larger than 1 and every model without fusion"
)
SHARED_NOTE = NOTE + "; a rate that does not divide the depth fails an assertion there; the random mapping works here"
FUSED_NOTE = "fusion follows the mapping; theirs always fuses neighbours, even where the strided mapping shares others"
BYTES = "published sizes are MiB of the stored file: 4 bytes per parameter, norm statistics and the archive's overhead"

CONVMIXERS: dict[str, ModelEntry] = {
    "convmixer": ModelEntry(
        "convmixer",
        "convmixer",
        SPIN,
        20465896,
        MACS,
        input_size=SIZE,
        published=Published("79MB", top1={"ImageNet": 76.32}, note=BYTES),
        note=NOTE,
    ),
    "convmixer_768_32": ModelEntry(
        "convmixer",
        "convmixer",
        SPIN,
        20465896,
        MACS,
        kwargs={"dim": 768, "depth": 32},
        fixed=("dim", "depth"),
        input_size=SIZE,
        aliases=("convmixer_768_32_14_3",),
        published=Published("79MB", top1={"ImageNet": 76.32}, note=BYTES),
        note=NOTE,
    ),
    "ws_convmixer": ModelEntry(
        "convmixer",
        "ws_convmixer",
        SPIN,
        11016424,
        MACS,
        "weight-sharing",
        input_size=SIZE,
        aliases=("ws_convmixer_768_32_14_3",),
        published=Published("43MB", top1={"ImageNet": 74.27}, note=BYTES),
        note=SHARED_NOTE,
        baseline="convmixer",
    ),
    "wfws_convmixer": ModelEntry(
        "convmixer",
        "wfws_convmixer",
        SPIN,
        20465896,
        MACS,
        "weight-sharing",
        input_size=SIZE,
        aliases=("wf_ws_convmixer", "wfws_convmixer_768_32_14_3"),
        published=Published(
            "43MB", top1={"ImageNet": 75.21}, note=f"{BYTES}; of the fused network: fold gives its 11,016,424 parameters"
        ),
        note=FUSED_NOTE,
        baseline="convmixer",
    ),
}
