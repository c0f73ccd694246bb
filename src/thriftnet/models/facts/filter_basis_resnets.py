"""ResNets, plain and with shared filter bases: for CIFAR-10, for CIFAR-100 and for ImageNet."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thriftnet.models.entry import ModelEntry, Published

RESNET = "He et al., Deep Residual Learning, CVPR 2016"
FILTER_BASIS = "Kang & Kim, Learning Deeply Shared Filter Bases, NeurIPS 2021"
FLOPS = "published FLOPs = 2 x (MACs + 2 BN elements)"
IMAGENET = (3, 224, 224)
UNPUBLISHED = Published()


def _plain(depth: int, stem: str, params: int, macs: int, note: str = "") -> ModelEntry:
    cifar = stem == "cifar"
    return ModelEntry(
        "imagenet_resnet",
        "imagenet_resnet",
        RESNET,
        params,
        macs,
        kwargs={"depth": depth, "stem": stem, "num_classes": 100 if cifar else 1000},
        fixed=("depth", "stem"),
        input_size=(3, 32, 32) if cifar else IMAGENET,
        aliases=(f"{'cifar100' if cifar else 'ilsvrc'}_ResNet{depth}",),
        note=note,
    )


def _shared(
    function: str,
    name: str,
    params: int,
    macs: int,
    kwargs: Mapping[str, Any],
    fixed: tuple[str, ...],
    published: Published = UNPUBLISHED,
    note: str = "",
) -> ModelEntry:
    """A network with shared bases; ``name`` is the authors' with their data set before it."""
    return ModelEntry(
        "basis_resnet",
        function,
        FILTER_BASIS,
        params,
        macs,
        technique="filter-basis",
        kwargs=kwargs,
        fixed=fixed,
        input_size=IMAGENET if name.startswith("ilsvrc") else (3, 32, 32),
        aliases=(name,),
        published=published,
        note=note,
    )


def _cifar10(
    depth: int, form: str, params: int, macs: int, published: Published = UNPUBLISHED, note: str = ""
) -> ModelEntry:
    kwargs, fixed = FORMS[form]
    name = f"cifar10_ResNet{depth}_{form}"
    return _shared("cifar10_resnet", name, params, macs, {"depth": depth, **kwargs}, fixed, published, note)


def _basic(
    depth: int, stem: str, form: str, params: int, macs: int, published: Published = UNPUBLISHED, **kwargs: int
) -> ModelEntry:
    of_form, fixed = FORMS[form]
    cifar = stem == "cifar"
    name = f"{'cifar100' if cifar else 'ilsvrc'}_ResNet{depth}_{form}"
    bases = {"bases": 2 if form == "DoubleShared" else 1}
    kwargs = {**of_form, **bases, "num_classes": 100 if cifar else 1000, **kwargs}
    place = {"depth": depth, "stem": stem}
    return _shared("basic_resnet", name, params, macs, {**kwargs, **place}, (*fixed, *place), published)


def _bottleneck(depth: int, form: str, params: int, macs: int) -> ModelEntry:
    kwargs = {"depth": depth, "shared": 1 if form == "SharedSingle" else 2}
    return _shared("bottleneck_resnet", f"ilsvrc_ResNet{depth}_{form}", params, macs, kwargs, ("depth", "shared"))


# the authors' form -> its arguments, and those of them that a user cannot change
FORMS: dict[str, tuple[dict[str, int], tuple[str, ...]]] = {
    "DoubleShared": ({"bases": 2}, ("bases",)),
    "SingleShared": ({"bases": 1}, ("bases",)),
    "SharedOnly": ({"bases": 2, "unique_rank": 0}, ("bases", "unique_rank")),
    "NonShared": ({"bases": 1, "shared_rank": 0, "unique_rank": 8}, ("bases", "shared_rank", "lambda_r")),
}

FILTER_BASIS_RESNETS: dict[str, ModelEntry] = {
    "resnet1202": ModelEntry(
        "resnet",
        "resnet",
        RESNET,
        19421274,
        2829238912,
        kwargs={"depth": 1202},
        fixed=("depth",),
        published=Published("19.4M", top1={"CIFAR-10": 92.07}),
    ),
    "resnet32_double_shared": _cifar10(
        32,
        "DoubleShared",
        245642,
        79086208,
        Published("0.24M", "0.16G", {"CIFAR-10": 93.07}, f"{FLOPS}; published parameters are cut off, not rounded"),
    ),
    "resnet32_single_shared": _cifar10(
        32,
        "SingleShared",
        197258,
        79086208,
        Published("0.20M", "0.16G", {"CIFAR-10": 92.57}, f"{FLOPS}; with shared_rank=8: 0.15M, 0.10G, 91.92 % on CIFAR-10"),
    ),
    "resnet32_shared_only": _cifar10(32, "SharedOnly", 218650, 75154048),
    "resnet32_non_shared": _cifar10(32, "NonShared", 293018, 43696768),
    "resnet56_double_shared": _cifar10(
        56,
        "DoubleShared",
        319226,
        145932928,
        Published("0.31M", "0.30G", {"CIFAR-10": 93.70}, f"{FLOPS}; published parameters are cut off, not rounded"),
    ),
    "resnet56_single_shared": _cifar10(
        56,
        "SingleShared",
        270842,
        145932928,
        Published(
            "0.22M",
            "0.30G",
            {"CIFAR-10": 92.54},
            f"{FLOPS}; 0.22M is a typing error for 0.27M; with shared_rank=8: 0.20M, 0.17G, 92.48 % on CIFAR-10",
        ),
    ),
    "resnet56_shared_only": _cifar10(56, "SharedOnly", 265242, 138068608),
    "resnet56_non_shared": _cifar10(56, "NonShared", 510746, 75154048),
    "cifar_resnet18": _plain(18, "cifar", 11220132, 555468800),
    "cifar_resnet34": _plain(34, "cifar", 21328292, 1159448576),
    "cifar_resnet18_single_shared": _basic(18, "cifar", "SingleShared", 6020512, 342607872),
    "cifar_resnet18_shared_only": _basic(18, "cifar", "SharedOnly", 5911652, 337364992),
    "cifar_resnet18_non_shared": _basic(18, "cifar", "NonShared", 5824132, 295421952),
    "cifar_resnet34_single_shared": _basic(
        34,
        "cifar",
        "SingleShared",
        6485844,
        520865792,
        Published(
            "6.49M",
            "1.05G",
            {"CIFAR-100": 77.36},
            f"{FLOPS}; with shared_rank=8: 5.87M, 0.79G, 76.89 %; with shared_rank=32: 7.73M, 1.55G, 78.21 % on CIFAR-100",
        ),
    ),
    "cifar_resnet34_shared_only": _basic(34, "cifar", "SharedOnly", 6201508, 505137152),
    "cifar_resnet34_non_shared": _basic(34, "cifar", "NonShared", 7235364, 379308032),
    "resnet18": _plain(18, "imagenet", 11689512, 1814073344),
    "resnet34": _plain(34, "imagenet", 21797672, 3663761408),
    "resnet50": _plain(50, "imagenet", 25557032, 4089184256),
    "resnet101": _plain(
        101, "imagenet", 44549160, 7801405440, "the authors define it, but their training script does not list it"
    ),
    "resnet34_single_shared": _basic(34, "imagenet", "SingleShared", 9436888, 3249508352, shared_rank=48),
    "resnet34_double_shared": _basic(
        34,
        "imagenet",
        "DoubleShared",
        9762776,
        2478804992,
        Published(
            "9.76M", "4.98G", {"ImageNet": 72.80}, f"{FLOPS}; with shared_rank=48: 11.79M, 6.52G, 73.33 % on ImageNet"
        ),
        shared_rank=32,
    ),
    "resnet50_shared": _bottleneck(50, "Shared", 18262056, 4089184256),
    "resnet50_shared_single": _bottleneck(50, "SharedSingle", 20506664, 4089184256),
    "resnet101_shared": _bottleneck(101, "Shared", 22770728, 7801405440),
    "resnet101_shared_single": _bottleneck(101, "SharedSingle", 29471784, 7801405440),
}
