"""Networks of the zoo by what the tests look at together."""

from __future__ import annotations

from thriftnet.models.table import MODELS, ModelEntry


def of_families(*families: str, but: tuple[str, ...] = ()) -> dict[str, ModelEntry]:
    """The networks that these modules of `thriftnet.models` build."""
    return {name: entry for name, entry in MODELS.items() if entry.family in families and name not in but}


CIFAR_RESNETS = {name: e for name, e in of_families("resnet").items() if e.paper.startswith("He ") and name != "resnet1202"}
BACKBONES = CIFAR_RESNETS | of_families("wrn")
FILTER_BASIS_OTHERS = of_families("densenet", "resnext", "mobilenetv2")
FILTER_BASIS_RESNETS = of_families("basis_resnet", "imagenet_resnet") | {"resnet1202": MODELS["resnet1202"]}
SHIFTRESNETS = {name: entry for name, entry in MODELS.items() if entry.paper.startswith("Wu et al., Shift")}
SWRNS = of_families("swrn")
CONVMIXERS = of_families("convmixer")
SUPERNETS = of_families("dsnet")
