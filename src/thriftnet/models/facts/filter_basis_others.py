"""DenseNets, ResNeXts and MobileNetV2s, plain and with shared filter bases."""

from __future__ import annotations

from typing import Any

from thriftnet.models.entry import ModelEntry, Published

DENSENET = "Huang et al., Densely Connected Convolutional Networks, CVPR 2017"
RESNEXT = "Xie et al., Aggregated Residual Transformations, CVPR 2017"
MOBILENETV2 = "Sandler et al., MobileNetV2, CVPR 2018"
FILTER_BASIS = "Kang & Kim, Learning Deeply Shared Filter Bases, NeurIPS 2021"

FLOPS = "published FLOPs = 2 x (MACs + 2 BN elements)"
NONE = Published()
CIFAR_STEM = (
    "the stem is 1 x 1 with a padding of 1, so that 32 x 32 images become 34 x 34 maps: kept, as results depend on it"
)
BIASES = (
    "as the authors built it: biases before the norms of stem and head, and a 1 x 1 convolution in the first block as in all "
    "others; 2400 parameters more than usual"
)


def _densenet(depth: int, params: int, macs: int) -> ModelEntry:
    kwargs = {"depth": depth}
    return ModelEntry(
        "densenet",
        "densenet",
        DENSENET,
        params,
        macs,
        kwargs=kwargs,
        fixed=("depth",),
        aliases=(f"DenseNet{depth}", f"cifar100_DenseNet{depth}"),
    )


def _densenet_shared(depth: int, params: int, macs: int, published: Published = NONE) -> ModelEntry:
    return ModelEntry(
        "densenet",
        "densenet_shared",
        FILTER_BASIS,
        params,
        macs,
        technique="filter-basis",
        kwargs={"depth": depth},
        fixed=("depth",),
        aliases=(f"DenseNet{depth}_SingleShared", f"cifar100_DenseNet{depth}_SingleShared"),
        published=published,
        baseline=f"cifar_densenet{depth}",
        note="each dense block has its own basis; the authors' last block uses the third's (original_sharing=True)",
    )


def _resnext(depth: int, params: int, macs: int) -> ModelEntry:
    kwargs = {"depth": depth}
    return ModelEntry(
        "resnext",
        "resnext",
        RESNEXT,
        params,
        macs,
        kwargs=kwargs,
        fixed=("depth",),
        aliases=(f"ResNext{depth}", f"cifar100_ResNext{depth}"),
    )


def _resnext_shared(depth: int, params: int, macs: int, **more: Any) -> ModelEntry:
    return ModelEntry(
        "resnext",
        "resnext_shared",
        FILTER_BASIS,
        params,
        macs,
        technique="filter-basis",
        fixed=("depth",),
        aliases=(f"ResNext{depth}_SingleShared", f"cifar100_ResNext{depth}_SingleShared"),
        baseline=f"cifar_resnext{depth}",
        **more,
    )


def _mobilenetv2(function: str, name: str, params: int, macs: int, **more: Any) -> ModelEntry:
    """One of the networks; ``name`` is the authors' with their data set before it."""
    cifar, shared = function.startswith("cifar_"), "shared" in function
    return ModelEntry(
        "mobilenetv2",
        function,
        FILTER_BASIS if shared else MOBILENETV2,
        params,
        macs,
        technique="filter-basis" if shared else "",
        input_size=(3, 32, 32) if cifar else (3, 224, 224),
        aliases=(name,),
        baseline=function.partition("_shared")[0] if shared else "",
        **more,
    )


FILTER_BASIS_OTHERS: dict[str, ModelEntry] = {
    "cifar_densenet121": _densenet(121, 7048548, 888442880),
    "cifar_densenet161": _densenet(161, 26681188, 2467749504),
    "cifar_densenet169": _densenet(169, 12643172, 1059949056),
    "cifar_densenet201": _densenet(201, 18277220, 1364061696),
    "cifar_densenet121_single_shared": _densenet_shared(
        121,
        5084504,
        704212992,
        Published(
            "5.08M",
            "1.43G",
            {"CIFAR-100": 77.85},
            f'published as "DenseNet121-S64U4", but these are the counts of shared_rank=16, unique_rank=1 (64 and 4 give '
            f"5606708 parameters); they include 18432 of a basis that the authors' network does not use, and ours does; {FLOPS}",
        ),
    ),
    "cifar_densenet161_single_shared": _densenet_shared(161, 20523232, 1839789696),
    "cifar_densenet169_single_shared": _densenet_shared(169, 9835912, 862865920),
    "cifar_densenet201_single_shared": _densenet_shared(201, 14907816, 1149840896),
    "cifar_resnext50": _resnext(50, 23177124, 1344151552),
    "cifar_resnext101": _resnext(101, 86939556, 5322448896),
    "cifar_resnext50_single_shared": _resnext_shared(
        50,
        19333380,
        1179000832,
        kwargs={"depth": 50},
        published=Published(
            "19.3M",
            "2.38G",
            {"CIFAR-100": 79.91},
            f'published as "ResNeXt50-S16U1", but these are the counts of shared_rank=64, unique_rank=4 (16 and 1 cannot be '
            f"built); {FLOPS} + 2 x 835584 elements of the ReLUs in the stages' first blocks",
        ),
    ),
    "cifar_resnext101_single_shared": _resnext_shared(
        101,
        66262692,
        4584775680,
        kwargs={"depth": 101, "shared_rank": 128, "unique_rank": 8},
        note="ours: the authors share filters in ResNeXt-50 only; ranks are multiples of 8 here",
    ),
    "cifar_mobilenetv2": _mobilenetv2("cifar_mobilenetv2", "cifar100_MobileNetV2", 2428004, 67356736, note=CIFAR_STEM),
    "cifar_mobilenetv2_shared": _mobilenetv2(
        "cifar_mobilenetv2_shared",
        "cifar100_MobileNetV2_Shared",
        2163812,
        67356736,
        published=Published("2.16M", "0.14G", {"CIFAR-100": 72.30}, FLOPS),
        note=CIFAR_STEM,
    ),
    "cifar_mobilenetv2_shared_double": _mobilenetv2(
        "cifar_mobilenetv2_shared_double", "cifar100_MobileNetV2_SharedDouble", 1899620, 67356736, note=CIFAR_STEM
    ),
    "mobilenetv2": _mobilenetv2("mobilenetv2", "ilsvrc_MobileNetV2", 3507272, 313619328, note=BIASES),
    "mobilenetv2_shared": _mobilenetv2(
        "mobilenetv2_shared",
        "ilsvrc_MobileNetV2_Shared",
        3243080,
        313619328,
        published=Published("3.24M", "0.66G", {"ImageNet": 72.39}, FLOPS),
        note=BIASES,
    ),
    "mobilenetv2_shared_double": _mobilenetv2(
        "mobilenetv2_shared_double",
        "ilsvrc_MobileNetV2_SharedDouble",
        2978888,
        313619328,
        note="the authors' code has channel attention in it (eca=True), which adds 17 parameters",
    ),
}
