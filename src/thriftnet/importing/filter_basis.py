"""The filter-basis project's files: ResNets, DenseNets, ResNeXts and MobileNetV2s, plain or with shared filters.

The shared filters of stage S stand at the top of the network, as ``shared_basis_S`` (or ``shared_basis_S_1`` and ``_2``), and are
repeated under the name of each block that uses them. A decomposed ``convK`` of a block is three modules: ``basis_convK`` (its
unique filters), ``basis_bnK`` and ``coeff_convK``.

Source: github.com/ssregibility/Net_RL2, models/cifar10, models/cifar100 and models/ilsvrc.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from thriftnet.errors import CheckpointError
from thriftnet.importing.evidence import (
    IMAGENET,
    IMAGENET_COLORS,
    UNKNOWN,
    Evidence,
    Recognised,
    in_zoo,
    normalisation,
    same,
)
from thriftnet.importing.layout import Layout, Rules, Slot, rename, renamed
from thriftnet.models.densenet import DEPTHS as DENSENETS
from thriftnet.models.densenet import DenseNet
from thriftnet.models.imagenet_resnet import DEPTHS as RESNETS
from thriftnet.models.mobilenetv2 import MobileNetV2
from thriftnet.models.resnext import DEPTHS as RESNEXTS
from thriftnet.models.resnext import PartlySharedConv2d, ResNeXt
from thriftnet.techniques.filter_basis import BasisConv2d, SharedBasis, SharedBasisConv2d

HINTS = {"original_sharing": "whether the last two dense blocks of a DenseNet share one basis, where its keys do not tell"}
CIFAR100 = normalisation((0.507, 0.487, 0.441), (0.267, 0.256, 0.276))

DECOMPOSED: Rules = (
    (r"\.conv(\d)\.norm\.", r".basis_bn\1."),
    (r"\.conv(\d)\.coefficients\.", r".coeff_conv\1."),
    (r"\.conv(\d)\.unique\.", r".basis_conv\1."),
    (r"\.downsample\.", ".shortcut."),
)
DENSE_ENDS: Rules = (
    (r"^bn\.", "features.bn."),
    (r"^fc\.", "linear."),
    *((rf"^transition{n + 1}\.bn\.", f"features.transition_layer_{n}.down_sample.0.") for n in range(3)),
    *((rf"^transition{n + 1}\.conv\.", f"features.transition_layer_{n}.down_sample.1.") for n in range(3)),
)
DENSE_BLOCKS: Rules = tuple((rf"^block{n + 1}\.", f"features.dense_block_layer_{n}.bottle_neck_layer_") for n in range(4))
DENSENET: Rules = (
    *DENSE_ENDS,
    (r"^block4\.", "features.dense_block3.bottle_neck_layer_"),
    *DENSE_BLOCKS,
    (r"(layer_\d+)\.bn1\.", r"\1.residual_function.0."),
    (r"(layer_\d+)\.conv1\.", r"\1.residual_function.2."),
    (r"(layer_\d+)\.bn2\.", r"\1.residual_function.3."),
    (r"(layer_\d+)\.conv2\.", r"\1.residual_function.5."),
)
DENSENET_SHARED: Rules = (*DENSE_ENDS, *DENSE_BLOCKS, *DECOMPOSED, (r"\.bn1\.", ".bn0."), (r"\.bn2\.", ".bn1."))
MOBILENET: Rules = (
    (r"^conv1\.", "pre.0."),
    (r"^bn1\.", "pre.1."),
    (r"^conv2\.", "conv1.0."),
    (r"^bn2\.", "conv1.1."),
    (r"^stage([17])\.0\.", r"stage\1."),
    (r"\.attention\.", ".chan_attention."),
)


def layout(model: nn.Module) -> Layout:
    """The place of each of the authors' tensors; of those that have several names, under the one at the top.

    In the authors' shared DenseNet ``shared_basis_4`` is used nowhere, and the last dense block uses ``shared_basis_3``. A
    network made with ``original_sharing`` has no place for the former; one with a basis per block takes all four.
    """
    rules = _rules(model)
    shared = {name: conv for name, conv in model.named_modules() if isinstance(conv, SharedBasisConv2d)}
    banks = {bank: name for name, bank in model.named_modules() if isinstance(bank, SharedBasis)}
    slots = {
        theirs: slot
        for theirs, slot in renamed(model, rules).items()
        if slot.key.rpartition(".")[0] not in (*shared, *banks.values())
    }
    convs = sorted({name.rpartition(".")[2] for name in shared})
    for name in shared:
        stage = int(_stage(name)) - (2 if isinstance(model, MobileNetV2) else 0)
        suffix = f"_{convs.index(name.rpartition('.')[2]) + 1}" if len(convs) > 1 else ""
        slots[f"shared_basis_{stage}{suffix}.weight"] = Slot(f"{name}.weight")
    for name, conv in model.named_modules():
        if isinstance(conv, BasisConv2d):
            filters, bank = conv.filters, banks[conv.filters.bank]
            if filters.bank.shared is not None:
                suffix = f"_{filters.base + 1}" if len(filters.bank.shared) > 1 else ""
                slots[f"shared_basis_{_stage(bank)}{suffix}.weight"] = Slot(f"{bank}.shared", (filters.base,))
            if filters.bank.unique is not None:
                slots[rename(f"{name}.unique.weight", rules)] = Slot(f"{bank}.unique", (filters.layer,))
    return slots


def _rules(model: nn.Module) -> Rules:
    """Their names of our tensors, shared filters aside."""
    if isinstance(model, DenseNet):
        return DENSENET_SHARED if isinstance(model.block1[0].conv2, BasisConv2d) else DENSENET
    if isinstance(model, ResNeXt):
        sharing = any(isinstance(module, PartlySharedConv2d) for module in model.modules())
        plain = "0" if sharing else "[0-9]+"
        indices = {"conv1": 0, "bn1": 1, "conv2": 3, "bn2": 4, "conv3": 6, "bn3": 7}  # with ReLUs between
        blocks = [(rf"^(layer\d\.{plain})\.{part}\.", rf"\1.residual_function.{n}.") for part, n in indices.items()]
        return (*blocks, *DECOMPOSED, (r"^fc\.", "linear."))
    if isinstance(model, MobileNetV2):
        return (*MOBILENET, (r"^fc\.", "conv2." if model.conv1.kernel_size == (1, 1) else "classifier.1."))
    return DECOMPOSED


def _stage(name: str) -> str:
    """The S of ``layerS.B.convK``, ``blockS...`` or ``stageS...``."""
    return name.partition(".")[0][-1]


def recognise(evidence: Evidence) -> Recognised | None:
    """A network of the filter-basis repository, or None."""
    first = "features.dense_block_layer_0.bottle_neck_layer_0"
    if evidence.has(f"{first}.bn0.weight") or evidence.has(f"{first}.residual_function.0.weight"):
        return _densenet(evidence)
    if evidence.has("layer1.0.residual_function.3.weight"):
        return _resnext(evidence)
    if evidence.has("pre.0.weight", "stage1.conv1.weight"):
        return _mobilenetv2(evidence)
    return _resnet(evidence) if is_resnet(evidence) else None


def is_resnet(evidence: Evidence) -> bool:
    """Whether a ResNet's keys are this project's: head ``fc``, and ``shortcut`` in four stages or none in three."""
    if not evidence.has("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer3.0.conv2.weight", "fc.weight"):
        return False
    projects = evidence.has("layer2.0.shortcut.0.weight")
    return projects == evidence.has("layer4.0.conv1.weight") and not evidence.has("layer2.0.downsample.0.weight")


def _resnet(evidence: Evidence) -> Recognised:
    evidence.deduplicate([(r"^layer(\d)\.\d+\.shared_basis((?:_\d)?)\.weight$", r"shared_basis_\1\2.weight")])
    ends = evidence.classes_and_channels("fc.weight", "conv1.weight")
    bases = 2 if evidence.has("shared_basis_1_1.weight") else int(evidence.has("shared_basis_1.weight"))
    if evidence.has("layer4.0.conv1.weight"):
        name, kwargs = _large_resnet(evidence, bases)
        preprocessing = _cifar100(ends) if "cifar" in name else IMAGENET
    else:
        name, kwargs = _small_resnet(evidence, bases)
        preprocessing = IMAGENET_COLORS if ends["num_classes"] == 10 else _cifar100(ends)
    return evidence.network(name, kwargs | ends, layout, preprocessing)


def _small_resnet(evidence: Evidence, bases: int) -> tuple[str, dict[str, Any]]:
    """A network of three stages."""
    depth = 6 * evidence.blocks_per_stage() + 2
    form, ranks = _form(evidence, bases)
    if not form:
        return in_zoo(f"resnet{depth}", f"a ResNet of depth {depth}"), {}
    known = depth if depth in (32, 56) else 32
    return f"resnet{known}_{form}", ranks | ({} if depth == known else {"depth": depth})


def _large_resnet(evidence: Evidence, bases: int) -> tuple[str, dict[str, Any]]:
    """A network of four stages."""
    depth, place = resnet_depth(evidence), resnet_place(evidence)
    what = f"a {'CIFAR' if place else 'ImageNet'} ResNet-{depth}"
    if RESNETS[depth][1]:
        return in_zoo(f"{place}resnet{depth}{('', '_shared_single', '_shared')[bases]}", what), {}
    form, ranks = _form(evidence, bases)
    if form == "shared_only" and not place:
        return in_zoo(f"resnet{depth}_{'double' if bases == 2 else 'single'}_shared", what), ranks | {"unique_rank": 0}
    name = f"{place}resnet{depth}{'_' if form else ''}{form}"
    return in_zoo(name, f"{what}, {form.replace('_', ' ')}" if form else what), ranks


def resnet_place(evidence: Evidence) -> str:
    """How names in the zoo start: "cifar_" for a ResNet of four stages with a 3 x 3 stem."""
    return "" if evidence.shape("conv1.weight", 4)[2] == 7 else "cifar_"


def resnet_depth(evidence: Evidence) -> int:
    """The depth of a ResNet of four stages with these blocks."""
    blocks = evidence.counts(r"^layer{}\.(\d+)\.", range(1, 5))
    bottleneck = evidence.has("layer1.0.conv3.weight")
    known = {depth: blocks_of for depth, (blocks_of, kind) in RESNETS.items() if kind == bottleneck}
    return _depth(known, blocks, "blocks per stage")


def _depth(known: Mapping[int, Any], found: Any, what: str) -> int:
    """The depth of the network that has what was found."""
    if found not in known.values():
        expected = ", ".join(f"{value} (depth {depth})" for depth, value in known.items())
        raise CheckpointError(f"its {what} are {found}: expected {expected}")
    return next(depth for depth, value in known.items() if value == found)


def _form(evidence: Evidence, bases: int) -> tuple[str, dict[str, Any]]:
    """What blocks share and what is their own, in the authors' words, with the ranks; ("", {}) for a plain network."""
    unique = evidence.has("layer1.1.basis_conv1.weight")
    if not bases and not unique:
        return "", {}
    own = {"unique_rank": evidence.shape("layer1.1.basis_conv1.weight", 4)[0] if unique else 0}
    if not bases:
        return "non_shared", own
    shared = {"shared_rank": evidence.shape(f"shared_basis_1{'_1' if bases == 2 else ''}.weight", 4)[0]}
    if not unique and (bases == 2 or evidence.has("layer4.0.conv1.weight")):
        return "shared_only", shared
    return "double_shared" if bases == 2 else "single_shared", shared | own


def _densenet(evidence: Evidence) -> Recognised:
    last = "features.dense_block_layer_3.bottle_neck_layer_0"
    kept = [*(f"shared_basis_{n + 1}.weight" for n in range(3)), f"{last}.shared_basis.weight"]
    evidence.deduplicate(
        [(rf"^features\.dense_block_layer_{n}\..*\.shared_basis\.weight$", name) for n, name in enumerate(kept)]
    )
    blocks = evidence.counts(r"^features\.dense_block(?:_layer_)?{}\.bottle_neck_layer_(\d+)\.", range(4))
    growth = evidence.shape("conv1.weight", 4)[0] // 2
    depth = _depth(DENSENETS, (blocks, growth), "layers per dense block and growth")
    unique = f"{last}.basis_conv2.weight"
    name, kwargs = _single_shared(evidence, f"cifar_densenet{depth}", unique if evidence.has(unique) else None)
    if "shared_rank" in kwargs:
        kwargs["original_sharing"] = _original_sharing(evidence, f"{last}.shared_basis.weight")
    return evidence.network(name, kwargs, layout, _cifar100(kwargs))


def _single_shared(evidence: Evidence, name: str, unique: str | None) -> tuple[str, dict[str, Any]]:
    """Name and arguments of a DenseNet or ResNeXt, with shared filters or without; ``unique`` is the key of a layer's own."""
    kwargs = evidence.classes_and_channels("linear.weight", "conv1.weight")
    if not evidence.has("shared_basis_1.weight"):
        return name, kwargs
    kwargs["shared_rank"] = evidence.shape("shared_basis_1.weight", 4)[0]
    kwargs["unique_rank"] = evidence.shape(unique, 4)[0] if unique else 0
    return f"{name}_single_shared", kwargs


def _original_sharing(evidence: Evidence, last: str) -> bool:
    """Whether the last dense block uses the third basis, as in the authors' code; the one it does not use is left out."""
    stored, third, fourth = evidence.tensors, "shared_basis_3.weight", "shared_basis_4.weight"
    used = stored.pop(last, None)
    if fourth not in stored:
        return True
    if used is None:
        third_is_used = bool(evidence.hint("original_sharing", None, True))
    else:
        third_is_used = third in stored and same(used, stored[third])
        if not third_is_used and not same(used, stored[fourth]):
            raise CheckpointError(f"the basis of the last dense block is neither {third} nor {fourth}: the file is damaged")
    if third_is_used:
        unused = stored.pop(fourth).numel()
        evidence.notes.append(
            f"shared_basis_4 ({unused:,} parameters) was left out: the last dense block uses the third basis."
        )
    return third_is_used


def _resnext(evidence: Evidence) -> Recognised:
    evidence.deduplicate([(r"^layer(\d)\.\d+\.shared_basis\.weight$", r"shared_basis_\1.weight")])
    blocks = evidence.counts(r"^layer{}\.(\d+)\.", range(1, 5))
    per_group = evidence.shape("layer1.0.residual_function.3.weight", 4)[1]
    depth = _depth(RESNEXTS, (blocks, per_group), "blocks per stage and channels per group")
    name, kwargs = _single_shared(evidence, f"cifar_resnext{depth}", "layer1.1.basis_conv2.weight")
    return evidence.network(name, kwargs, layout, _cifar100(kwargs))


def _mobilenetv2(evidence: Evidence) -> Recognised:
    double = any(".shared_basis2." in key or key == "shared_basis_1_2.weight" for key in evidence.tensors)
    conv = r"_\1" if double else ""
    evidence.deduplicate(
        [(rf"^stage{n + 2}\.\d+\.shared_basis(\d)\.weight$", f"shared_basis_{n}{conv}.weight") for n in range(1, 5)]
    )
    cifar = evidence.shape("pre.0.weight", 4)[2] == 1
    kwargs = evidence.classes_and_channels("conv2.weight" if cifar else "classifier.1.weight", "pre.0.weight")
    shared = double or evidence.has("shared_basis_1.weight")
    name = f"{'cifar_' if cifar else ''}mobilenetv2{'_shared' if shared else ''}{'_double' if double else ''}"
    preprocessing = _cifar100(kwargs) if cifar else IMAGENET
    if any(".chan_attention." in key for key in evidence.tensors):
        if name != "mobilenetv2_shared_double":
            raise CheckpointError(f"it has channel attention, which the zoo's {name} does not have")
        kwargs["eca"] = True
    return evidence.network(name, kwargs, layout, preprocessing)


def _cifar100(kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Of a network for small images: known for CIFAR-100 only."""
    return CIFAR100 if kwargs["num_classes"] == 100 else UNKNOWN
