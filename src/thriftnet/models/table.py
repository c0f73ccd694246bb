"""The literal table of the zoo: every network by name. Counts are stored facts that a test recomputes."""

from __future__ import annotations

from thriftnet.models.entry import ModelEntry
from thriftnet.models.facts.backbones import BACKBONES
from thriftnet.models.facts.dsnet import SUPERNETS
from thriftnet.models.facts.filter_basis_others import FILTER_BASIS_OTHERS
from thriftnet.models.facts.filter_basis_resnets import FILTER_BASIS_RESNETS
from thriftnet.models.facts.shiftresnet import SHIFTRESNETS
from thriftnet.models.facts.spin import CONVMIXERS
from thriftnet.models.facts.swrn import SWRNS

MODELS: dict[str, ModelEntry] = {
    **BACKBONES,
    **FILTER_BASIS_OTHERS,
    **FILTER_BASIS_RESNETS,
    **SHIFTRESNETS,
    **SWRNS,
    **CONVMIXERS,
    **SUPERNETS,
}


def normalize_name(name: str) -> str:
    """The form in which names are compared: ``ResNet56_DoubleShared`` and ``resnet56_double_shared`` are the same."""
    return name.lower().replace("_", "").replace("-", "")


# every name and alias, in normal form -> the name in MODELS
NAMES: dict[str, str] = {normalize_name(alias): name for name, entry in MODELS.items() for alias in (*entry.aliases, name)}
