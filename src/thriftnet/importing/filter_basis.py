"""The filter-basis project's files: ResNets, DenseNets, ResNeXts and MobileNetV2s, plain or with shared filters.

The authors repeat a shared filter bank under the name of each block that uses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from thriftnet.errors import CheckpointError
from thriftnet.importing.filter_basis_others import densenet_layout, mobilenetv2_layout, resnext_layout
from thriftnet.importing.filter_basis_resnet import resnet_layout
from thriftnet.importing.recognised import (
    IMAGENET,
    Colours,
    Recognised,
    Tensors,
    counts,
    deduplicate,
    in_zoo,
    resolve_hint,
    same,
    shape,
    shared_arguments,
)
from thriftnet.models.densenet import DEPTHS as DENSENETS
from thriftnet.models.imagenet_resnet import DEPTHS as RESNETS
from thriftnet.models.resnext import DEPTHS as RESNEXTS

HINTS = {"original_sharing": "whether the last two dense blocks of a DenseNet share one basis, where its keys do not tell"}
CIFAR100: Colours = ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))
LAST = "features.dense_block_layer_3.bottle_neck_layer_"


def recognise(tensors: Tensors, metadata: Mapping[str, Any], hints: Mapping[str, Any]) -> Recognised | None:
    """A network of the filter-basis repository, or None."""
    if "features.dense_block_layer_0.bottle_neck_layer_0.bn0.weight" in tensors:
        return _densenet(tensors, hints)
    if "features.dense_block_layer_0.bottle_neck_layer_0.residual_function.0.weight" in tensors:
        return _densenet(tensors, hints)
    if "layer1.0.residual_function.3.weight" in tensors:
        return _resnext(tensors)
    if {"pre.0.weight", "stage1.conv1.weight"} <= set(tensors):
        return _mobilenetv2(tensors)
    return _resnet(tensors) if is_theirs(tensors) else None


def is_theirs(tensors: Tensors) -> bool:
    """Whether a ResNet's keys are this project's: head ``fc``, and ``shortcut`` in four stages or none in three."""
    if not {"conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer3.0.conv2.weight", "fc.weight"} <= set(tensors):
        return False
    projects = "layer2.0.shortcut.0.weight" in tensors
    return projects == ("layer4.0.conv1.weight" in tensors) and "layer2.0.downsample.0.weight" not in tensors


def _resnet(tensors: Tensors) -> Recognised:
    stored = deduplicate(tensors, ((r"layer(\d)\.\d+\.shared_basis((?:_\d)?)\.weight", r"shared_basis_\1\2.weight"),))
    stages = 4 if "layer4.0.conv1.weight" in stored else 3
    blocks = counts(stored, r"^layer{}\.(\d+)\.", range(1, stages + 1))
    classes, channels = shape(stored, "fc.weight", 2)[0], shape(stored, "conv1.weight", 4)[1]
    bases = 2 if "shared_basis_1_1.weight" in stored else int("shared_basis_1.weight" in stored)
    if stages == 3:
        name, kwargs = _small(stored, blocks, bases)
        colours = IMAGENET if classes == 10 else CIFAR100 if classes == 100 else None
    else:
        name, kwargs = _large(stored, blocks, bases)
        cifar = "cifar" in name
        colours = (CIFAR100 if classes == 100 else None) if cifar else IMAGENET
    return Recognised(name, kwargs | shared_arguments(classes, channels), resnet_layout, stored, (), colours)


def _small(stored: Tensors, blocks: tuple[int, ...], bases: int) -> tuple[str, dict[str, Any]]:
    """A network of three stages."""
    if len(set(blocks)) != 1:
        raise CheckpointError(f"its stages have {blocks} blocks: possible are equally many in all three")
    depth = 6 * blocks[0] + 2
    form = _form(stored, bases)
    if form is None:
        return in_zoo(f"resnet{depth}", f"a ResNet of depth {depth}"), {}
    known = depth if depth in (32, 56) else 32
    return f"resnet{known}_{form}", _ranks(stored, form, bases) | ({} if depth == known else {"depth": depth})


def _large(stored: Tensors, blocks: tuple[int, ...], bases: int) -> tuple[str, dict[str, Any]]:
    """A network of four stages."""
    bottleneck = "layer1.0.conv3.weight" in stored
    place = "" if shape(stored, "conv1.weight", 4)[2] == 7 else "cifar_"
    depth = depth_of(blocks, bottleneck)
    what = f"a {'CIFAR' if place else 'ImageNet'} ResNet-{depth}"
    if bottleneck:
        form = {0: "", 1: "_shared_single", 2: "_shared"}[bases]
        return in_zoo(f"{place}resnet{depth}{form}", what), {}
    form_of = _form(stored, bases)
    if form_of is None:
        return in_zoo(f"{place}resnet{depth}", what), {}
    kwargs = _ranks(stored, form_of, bases)
    name = f"{place}resnet{depth}_{form_of}"
    if form_of == "shared_only" and not place:
        name, kwargs = f"resnet{depth}_{'double' if bases == 2 else 'single'}_shared", kwargs | {"unique_rank": 0}
    return in_zoo(name, f"{what}, {form_of.replace('_', ' ')}"), kwargs


def depth_of(blocks: tuple[int, ...], bottleneck: bool) -> int:
    """The depth of a ResNet with these blocks.

    Raises:
        CheckpointError: There is none.
    """
    for depth, (known, kind) in RESNETS.items():
        if (known, kind) == (blocks, bottleneck):
            return depth
    possible = ", ".join(f"{known} ({depth})" for depth, (known, kind) in RESNETS.items() if kind == bottleneck)
    raise CheckpointError(f"its stages have {blocks} blocks: possible are {possible}")


def _form(stored: Tensors, bases: int) -> str | None:
    """The authors' form of the network: what its blocks share and what is their own; None for a plain one."""
    unique = "layer1.1.basis_conv1.weight" in stored
    if not bases:
        return "non_shared" if unique else None
    if not unique and (bases == 2 or "layer4.0.conv1.weight" in stored):
        return "shared_only"
    return "double_shared" if bases == 2 else "single_shared"


def _ranks(stored: Tensors, form: str, bases: int) -> dict[str, Any]:
    first = "shared_basis_1_1.weight" if bases == 2 else "shared_basis_1.weight"
    ranks = {} if form == "non_shared" else {"shared_rank": shape(stored, first, 4)[0]}
    if "layer1.1.basis_conv1.weight" in stored:
        return ranks | {"unique_rank": shape(stored, "layer1.1.basis_conv1.weight", 4)[0]}
    return ranks if form == "shared_only" else ranks | {"unique_rank": 0}


def _densenet(tensors: Tensors, hints: Mapping[str, Any]) -> Recognised:
    stored = deduplicate(
        tensors,
        (
            (r"features\.dense_block_layer_0\..*\.shared_basis\.weight", "shared_basis_1.weight"),
            (r"features\.dense_block_layer_1\..*\.shared_basis\.weight", "shared_basis_2.weight"),
            (r"features\.dense_block_layer_2\..*\.shared_basis\.weight", "shared_basis_3.weight"),
            (r"features\.dense_block_layer_3\..*\.shared_basis\.weight", f"{LAST}0.shared_basis.weight"),
        ),
    )
    shared = "shared_basis_1.weight" in stored
    blocks = counts(stored, r"^features\.dense_block(?:_layer_)?{}\.bottle_neck_layer_(\d+)\.", range(4))
    growth = shape(stored, "conv1.weight", 4)[0] // 2
    depths = [depth for depth, known in DENSENETS.items() if known == (blocks, growth)]
    if not depths:
        possible = ", ".join(f"{layers} with {width} ({depth})" for depth, (layers, width) in DENSENETS.items())
        raise CheckpointError(f"its dense blocks have {blocks} layers that add {growth} channels: possible are {possible}")
    classes = shape(stored, "linear.weight", 2)[0]
    kwargs = shared_arguments(classes, shape(stored, "conv1.weight", 4)[1])
    notes: list[str] = []
    if shared:
        unique = f"{LAST}0.basis_conv2.weight"
        kwargs["shared_rank"] = shape(stored, "shared_basis_1.weight", 4)[0]
        kwargs["unique_rank"] = shape(stored, unique, 4)[0] if unique in stored else 0
        kwargs["original_sharing"] = _last_basis(stored, hints, notes)
    name = f"cifar_densenet{depths[0]}{'_single_shared' if shared else ''}"
    colours = CIFAR100 if classes == 100 else None
    return Recognised(name, kwargs, densenet_layout, stored, tuple(notes), colours)


def _last_basis(stored: dict[str, Any], hints: Mapping[str, Any], notes: list[str]) -> bool:
    """Whether the last dense block uses the third basis, as in the authors' code; the one it does not use is removed."""
    used, third, fourth = stored.pop(f"{LAST}0.shared_basis.weight", None), "shared_basis_3.weight", "shared_basis_4.weight"
    if fourth not in stored:
        return True
    if used is None:
        third_is_used = bool(resolve_hint("original_sharing", None, hints, True, notes))
    else:
        third_is_used = third in stored and same(used, stored[third])
        if not third_is_used and not same(used, stored[fourth]):
            raise CheckpointError(f"the basis of the last dense block is neither {third} nor {fourth}: the file is damaged")
    if third_is_used:
        unused = stored.pop(fourth)
        notes.append(
            f"shared_basis_4 ({unused.numel():,} parameters) was left out: the last dense block uses the third basis."
        )
    return third_is_used


def _resnext(tensors: Tensors) -> Recognised:
    stored = deduplicate(tensors, ((r"layer(\d)\.\d+\.shared_basis\.weight", r"shared_basis_\1.weight"),))
    blocks = counts(stored, r"^layer{}\.(\d+)\.", range(1, 5))
    per_group = shape(stored, "layer1.0.residual_function.3.weight", 4)[1]
    depths = [depth for depth, known in RESNEXTS.items() if known == (blocks, per_group)]
    if not depths:
        possible = ", ".join(f"{known} with {width} ({depth})" for depth, (known, width) in RESNEXTS.items())
        raise CheckpointError(
            f"its stages have {blocks} blocks with {per_group} channels per group: possible are {possible}"
        )
    classes = shape(stored, "linear.weight", 2)[0]
    kwargs = shared_arguments(classes, shape(stored, "conv1.weight", 4)[1])
    name = f"cifar_resnext{depths[0]}"
    if "shared_basis_1.weight" in stored:
        name += "_single_shared"
        kwargs["shared_rank"] = shape(stored, "shared_basis_1.weight", 4)[0]
        kwargs["unique_rank"] = shape(stored, "layer1.1.basis_conv2.weight", 4)[0]
    return Recognised(name, kwargs, resnext_layout, stored, (), CIFAR100 if classes == 100 else None)


def _mobilenetv2(tensors: Tensors) -> Recognised:
    double = any(".shared_basis2." in key or key == "shared_basis_1_2.weight" for key in tensors)
    rules = [
        (rf"stage{stage}\.\d+\.shared_basis(\d)\.weight", rf"shared_basis_{stage - 2}{'_{}' if double else ''}.weight")
        for stage in (3, 4, 5, 6)
    ]
    stored = deduplicate(tensors, tuple((pattern, key.replace("_{}", r"_\1")) for pattern, key in rules))
    cifar = shape(stored, "pre.0.weight", 4)[2] == 1
    head = "conv2.weight" if cifar else "classifier.1.weight"
    if head not in stored:
        raise CheckpointError(f"{head} is missing")
    classes = stored[head].shape[0] if stored[head].ndim else 0
    kwargs = shared_arguments(classes, shape(stored, "pre.0.weight", 4)[1])
    shared = double or "shared_basis_1.weight" in stored
    name = f"{'cifar_' if cifar else ''}mobilenetv2{'_shared' if shared else ''}{'_double' if double else ''}"
    if any(".chan_attention." in key for key in stored):
        if name != "mobilenetv2_shared_double":
            raise CheckpointError(f"it has channel attention, which the zoo's {name} does not have")
        kwargs["eca"] = True
    colours = (CIFAR100 if classes == 100 else None) if cifar else IMAGENET
    return Recognised(name, kwargs, mobilenetv2_layout, stored, (), colours)
