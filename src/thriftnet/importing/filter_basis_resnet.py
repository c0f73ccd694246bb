"""The filter-basis authors' ResNets (CIFAR-10, CIFAR-100, ILSVRC): which of their tensors is which of ours.

They keep the shared bases of stage S at the top of the network (``shared_basis_S``, or ``shared_basis_S_1`` and ``_2``),
and three modules for each decomposed convolution ``convK`` of a block: ``basis_convK`` (unique filters), ``basis_bnK`` and
``coeff_convK``. ImageNet files carry the prefix ``module.``, which does not belong to the layout.
"""

from __future__ import annotations

import re

from torch import nn

from thriftnet.core.tied import unique_tensors
from thriftnet.importing.layout import Slot
from thriftnet.techniques.filter_basis import BasisConv2d, SharedBasis, SharedConv2d

RENAMED = (
    (r"\.conv(\d)\.norm\.", r".basis_bn\1."),
    (r"\.conv(\d)\.coefficients\.", r".coeff_conv\1."),
    (r"\.downsample\.", ".shortcut."),
)


def resnet_layout(model: nn.Module) -> dict[str, Slot]:
    """The place of each of the authors' tensors, each once, under its name at the top where it has several.

    Args:
        model: A ResNet of the zoo, plain or with filter bases.
    """
    layout: dict[str, Slot] = {}
    for key in unique_tensors(model):
        owner = model.get_submodule(key.rpartition(".")[0])
        if not isinstance(owner, SharedBasis):
            layout[_their_key(model, key, owner)] = Slot(key)
    first_name = {id(module): name for name, module in model.named_modules() if isinstance(module, SharedBasis)}
    for name, module in model.named_modules():
        if isinstance(module, BasisConv2d):
            layout.update(_filters(name, module, first_name[id(module.filters.bank)]))
    return layout


def _their_key(model: nn.Module, key: str, owner: nn.Module) -> str:
    """The authors' key of a tensor that is not in a basis."""
    if isinstance(owner, SharedConv2d):
        kinds = sorted({name.split(".")[-1] for name, module in model.named_modules() if isinstance(module, SharedConv2d)})
        suffix = "" if len(kinds) == 1 else f"_{kinds.index(key.split('.')[-2]) + 1}"
        return f"shared_basis_{_stage(key)}{suffix}.weight"
    for ours, theirs in RENAMED:
        key = re.sub(ours, theirs, key)
    return key


def _filters(name: str, conv: BasisConv2d, bank_name: str) -> dict[str, Slot]:
    """Shared and unique filters of one convolution, ``layerS.B.convK``."""
    bank, slots = conv.filters.bank, {}
    if bank.shared is not None:
        suffix = "" if len(bank.shared) == 1 else f"_{conv.filters.base + 1}"
        slots[f"shared_basis_{_stage(name)}{suffix}.weight"] = Slot(f"{bank_name}.shared", (conv.filters.base,))
    if bank.unique is not None:
        theirs = re.sub(r"\.conv(\d)$", r".basis_conv\1.weight", name)
        slots[theirs] = Slot(f"{bank_name}.unique", (conv.filters.layer,))
    return slots


def _stage(name: str) -> str:
    """The S of ``layerS.B.convK``."""
    return name.removeprefix("layer").partition(".")[0]
