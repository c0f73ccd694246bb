"""Layouts of the filter-basis project's DenseNets, ResNeXts and MobileNetV2s.

Source: github.com/ssregibility/Net_RL2, models/cifar100 and models/ilsvrc.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from thriftnet.importing.layout import Slot
from thriftnet.models.densenet import DenseNet
from thriftnet.models.mobilenetv2 import BLOCKS, MobileNetV2
from thriftnet.models.resnext import PartlySharedConv2d, ResNeXt
from thriftnet.techniques.filter_basis import BasisConv2d, SharedBasis, SharedConv2d


def densenet_layout(model: DenseNet) -> dict[str, Slot]:
    """DenseNets, plain or with shared bases.

    In the authors' shared network ``shared_basis_4`` is used nowhere, and the last dense block uses ``shared_basis_3``. A
    network made with ``original_sharing`` has no place for the former; one with a basis per block takes all four.
    """
    layout = _modules(model, {"conv1": "conv1", "features.bn": "bn", "linear": "fc"})
    banks: dict[SharedBasis, str] = {}
    for number, block in enumerate((model.block1, model.block2, model.block3, model.block4)):
        plain_last = number == 3 and isinstance(block[0].conv2, nn.Conv2d)
        theirs = f"features.dense_block{'' if plain_last else '_layer_'}{number}"
        for place, layer in enumerate(block):
            their, our = f"{theirs}.bottle_neck_layer_{place}", f"block{number + 1}.{place}"
            if isinstance(layer.conv2, BasisConv2d):
                bank = layer.conv2.filters.bank
                if bank not in banks:
                    banks[bank] = f"{our}.conv2.filters.bank"
                    layout[f"shared_basis_{number + 1}.weight"] = Slot(f"{banks[bank]}.shared", (0,))
                names = {
                    "bn0": "bn1",
                    "conv1": "conv1",
                    "bn1": "bn2",
                    "basis_bn2": "conv2.norm",
                    "coeff_conv2": "conv2.coefficients",
                }
                if bank.unique is not None:
                    layout[f"{their}.basis_conv2.weight"] = Slot(f"{banks[bank]}.unique", (layer.conv2.filters.layer,))
            else:
                names = {f"residual_function.{i}": ours for i, ours in {0: "bn1", 2: "conv1", 3: "bn2", 5: "conv2"}.items()}
            layout |= _modules(model, names, their, our)
        if number < 3:
            names = {"down_sample.0": "bn", "down_sample.1": "conv"}
            layout |= _modules(model, names, f"features.transition_layer_{number}", f"transition{number + 1}")
    return layout


def resnext_layout(model: ResNeXt) -> dict[str, Slot]:
    """ResNeXts, plain or with shared filters."""
    layout = _modules(model, {"conv1": "conv1", "bn1": "bn1", "linear": "fc"})
    plain = {0: "conv1", 1: "bn1", 3: "conv2", 4: "bn2", 6: "conv3", 7: "bn3"}
    for stage, layer in enumerate((model.layer1, model.layer2, model.layer3, model.layer4), 1):
        for place, block in enumerate(layer):
            name = f"layer{stage}.{place}"
            if isinstance(block.conv2, PartlySharedConv2d):
                names = {key: key for key in ("conv1", "bn1", "bn2", "conv3", "bn3")} | {"basis_conv2": "conv2.unique"}
                layout[f"shared_basis_{stage}.weight"] = Slot(f"layer{stage}.1.conv2.shared.weight")
            else:
                names = {f"residual_function.{i}": ours for i, ours in plain.items()}
            layout |= _modules(model, names, name, name)
            if isinstance(block.shortcut, nn.Sequential):
                layout |= _modules(model, {"0": "0", "1": "1"}, f"{name}.shortcut", f"{name}.shortcut")
    return layout


def mobilenetv2_layout(model: MobileNetV2) -> dict[str, Slot]:
    """MobileNetV2s for CIFAR or ImageNet, plain or with shared convolutions, with or without channel attention."""
    head = "conv2" if model.conv1.kernel_size == (1, 1) else "classifier.1"
    layout = _modules(model, {"pre.0": "conv1", "pre.1": "bn1", "conv1.0": "conv2", "conv1.1": "bn2", head: "fc"})
    for stage in range(1, len(BLOCKS) + 1):
        layer = model.get_submodule(f"stage{stage}")
        for place, block in enumerate(layer.children()):
            their = f"stage{stage}" if BLOCKS[stage - 1] == 1 else f"stage{stage}.{place}"
            both = isinstance(block.conv3, SharedConv2d)
            names = {name: name for name, child in block.named_children() if not isinstance(child, SharedConv2d)}
            layout |= _modules(model, names, their, f"stage{stage}.{place}")
            for number, conv in enumerate(("conv1", "conv3"), 1):
                if isinstance(block.get_submodule(conv), SharedConv2d):
                    theirs = f"shared_basis_{stage - 2}" + (f"_{number}" if both else "")
                    layout[f"{theirs}.weight"] = Slot(f"stage{stage}.1.{conv}.weight")
    return {key.replace(".attention.", ".chan_attention."): slot for key, slot in layout.items()}


def _modules(model: nn.Module, names: Mapping[str, str], theirs: str = "", ours: str = "") -> dict[str, Slot]:
    """The tensors of modules that differ in name only.

    Args:
        model: Our network.
        names: Their name of each module -> ours, both within the following.
        theirs: Their name of the module that holds them.
        ours: Our name of it.
    """
    layout = {}
    for their, our in names.items():
        prefix, place = f"{theirs}.{their}".lstrip("."), f"{ours}.{our}".lstrip(".")
        for key in model.get_submodule(place).state_dict():
            layout[f"{prefix}.{key}"] = Slot(f"{place}.{key}")
    return layout
