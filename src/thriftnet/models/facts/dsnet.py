"""DS-Net's supernets."""

from __future__ import annotations

from thriftnet.models.entry import ModelEntry, Published

DSNET = "Li et al., Dynamic Slimmable Network, CVPR 2021"

# (published millions of multiply-adds, published top-1 on ImageNet, our multiply-accumulates) of sub-networks 0 to 13
SUBNETWORKS: tuple[tuple[int, float, int], ...] = (
    (133, 70.1, 132004224),
    (153, 70.4, 151995200),
    (175, 70.8, 174193920),
    (200, 71.2, 198600384),
    (226, 71.6, 225214592),
    (255, 72.0, 254036544),
    (286, 72.4, 285066240),
    (319, 72.7, 318303680),
    (355, 73.0, 353748864),
    (393, 73.3, 391401792),
    (433, 73.6, 431262464),
    (475, 73.9, 473330880),
    (519, 74.1, 517607040),
    (565, 74.6, 564090944),
)
PUBLISHED = Published(
    flops="133M to 565M",
    top1={f"ImageNet, sub-network {number}": top1 for number, (_, top1, _) in enumerate(SUBNETWORKS)},
    note="published MAdds = MACs + inputs of every average pooling, those of channel attention among them, for sub-networks "
    "0 to 13; our MACs are those of 'largest', which is wide in all stages and none of these",
)
NOTE = (
    "static widths; theirs must be set again before every forward, draws the gate's choice at random even in eval mode, and "
    "cannot reset its classifier; blocks with shortcuts get a projection wherever any sub-network's widths change"
)

SUPERNETS: dict[str, ModelEntry] = {
    "dsnet": ModelEntry(
        "dsnet", "dsnet", DSNET, 7676204, 817617376, "slimmable", input_size=(3, 224, 224), published=PUBLISHED, note=NOTE
    ),
    "slimmable_mobilenetv1": ModelEntry(
        "dsnet",
        "slimmable_mobilenetv1",
        DSNET,
        7676204,
        817617376,
        "slimmable",
        input_size=(3, 224, 224),
        aliases=("slimmable_mbnet_v1_bn_uniform", "dsnet_mobilenetv1"),
        published=PUBLISHED,
        note=NOTE,
    ),
}
