"""thriftnet makes ConvNets small: the techniques of five papers, and low rank, as siblings, for any PyTorch network.

The names below load on first use; importing thriftnet imports neither torch nor anything else slow.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from thriftnet.techniques import TECHNIQUES, convert

__version__ = "0.1.0"

_PLACES = {
    "thriftnet.core.fold": ("eval_fold", "fold", "freeze"),
    "thriftnet.core.head": ("replace_head",),
    "thriftnet.core.penalty": ("param_groups", "penalty"),
    "thriftnet.core.plan": ("Plan",),
    "thriftnet.core.recalibrate": ("recalibrate",),
    "thriftnet.core.width": ("set_width", "width", "widths"),
    "thriftnet.dynamic.add_gate": ("add_gate",),
    "thriftnet.errors": (
        "CheckpointError",
        "ConfigError",
        "DataError",
        "ExportError",
        "IncompatibleModelError",
        "ThriftnetError",
    ),
    "thriftnet.store.model_file": ("load", "save"),
    "thriftnet.store.pretrained": ("from_pretrained", "push_to_hub"),
    "thriftnet.importing.importer": ("ImportedCheckpoint", "import_checkpoint"),
    "thriftnet.kernels.pack": ("pack",),
    "thriftnet.measure": ("Report", "inspect"),
    "thriftnet.models": ("create_model", "list_models"),
    "thriftnet.dynamic.network": ("DynamicNetwork",),
    "thriftnet.dynamic.search": ("search",),
    "thriftnet.planning": ("plan", "suggest"),
    "thriftnet.resolve": ("open_model",),
    "thriftnet.train.compress": ("compress",),
    "thriftnet.train.evaluate": ("evaluate",),
}


def _where() -> dict[str, str]:
    """The module of each public name that loads on first use."""
    places = {**_PLACES, **{TECHNIQUES.file(name): names for name, names in TECHNIQUES.public.items()}}
    return {name: place for place, names in places.items() for name in names}


__all__ = sorted((*_where(), "TECHNIQUES", "convert"))

if TYPE_CHECKING:
    from thriftnet import kernels as kernels
    from thriftnet.core.fold import eval_fold, fold, freeze
    from thriftnet.core.head import replace_head
    from thriftnet.core.penalty import param_groups, penalty
    from thriftnet.core.plan import Plan
    from thriftnet.core.recalibrate import recalibrate
    from thriftnet.core.width import set_width, width, widths
    from thriftnet.dynamic.add_gate import add_gate
    from thriftnet.dynamic.network import DynamicNetwork
    from thriftnet.dynamic.search import search
    from thriftnet.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        ExportError,
        IncompatibleModelError,
        ThriftnetError,
    )
    from thriftnet.importing.importer import ImportedCheckpoint, import_checkpoint
    from thriftnet.kernels.pack import pack
    from thriftnet.measure import Report, inspect
    from thriftnet.models import create_model, list_models
    from thriftnet.planning import plan, suggest
    from thriftnet.resolve import open_model
    from thriftnet.store.model_file import load, save
    from thriftnet.store.pretrained import from_pretrained, push_to_hub
    from thriftnet.techniques.filter_basis import BasisConv2d, BasisLinear, FilterBasis
    from thriftnet.techniques.low_rank import LowRank, LowRankConv2d, LowRankLinear
    from thriftnet.techniques.shift import DepthwiseShift2d, Shift, Shift2d, ShiftConv2d
    from thriftnet.techniques.slimmable import Slimmable
    from thriftnet.techniques.soft_sharing import (
        SConv2d,
        SLinear,
        SoftSharing,
        TemplateBank,
        fold_recurrence,
        recurrences,
        similarity,
    )
    from thriftnet.techniques.weight_sharing import WeightSharing
    from thriftnet.train.compress import compress
    from thriftnet.train.evaluate import evaluate


def __getattr__(name: str) -> Any:
    where = _where()
    if name in where:
        value = getattr(importlib.import_module(where[name]), name)
        globals()[name] = value
        return value
    if name == "kernels":
        return importlib.import_module("thriftnet.kernels")
    raise AttributeError(f"module 'thriftnet' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_where()})
