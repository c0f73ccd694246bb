"""The literal table of the systems whose files are recognised, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from thriftnet.errors import CheckpointError, ConfigError, unknown_name
from thriftnet.importing import dsnet, filter_basis, plain, shiftresnet, soft_sharing, weight_sharing
from thriftnet.importing.evidence import Evidence, Recognised

GENERAL = {"system": "whose file it is, instead of recognising it"}


@dataclass(frozen=True)
class System:
    """A kind of file."""

    title: str  # its name for people
    recognise: Callable[[Evidence], Recognised | None]  # None: the tensors are another system's
    hints: Mapping[str, str]  # what a user may say where tensors do not tell, each with its meaning


SYSTEMS: dict[str, System] = {
    "shiftresnet": System("ShiftResNet (shifts)", shiftresnet.recognise, shiftresnet.HINTS),
    "soft-sharing": System("soft sharing (template banks)", soft_sharing.recognise, soft_sharing.HINTS),
    "filter-basis": System("Net_RL2 (filter bases)", filter_basis.recognise, filter_basis.HINTS),
    "weight-sharing": System("SPIN (weight sharing)", weight_sharing.recognise, weight_sharing.HINTS),
    "dsnet": System("DS-Net (slimmable)", dsnet.recognise, dsnet.HINTS),
    "resnet": System("plain ResNet", plain.recognise, plain.HINTS),
    "thriftnet": System("a network of the zoo, named by model=", plain.recognise_own, plain.OWN_HINTS),
}


def known_hints() -> set[str]:
    """The hints of all systems."""
    return {*GENERAL, *(name for system in SYSTEMS.values() for name in system.hints)}


def check_hints(hints: Mapping[str, Any]) -> None:
    """Raise a `ConfigError` for an unknown system or hint; with ``model``, all others are arguments of that network."""
    for name in hints if "model" not in hints else ():
        if name not in known_hints():
            raise unknown_name("hint", name, known_hints())
    system = hints.get("system")
    if system is not None and system not in SYSTEMS:
        raise unknown_name("system", str(system), SYSTEMS)


def recognise(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], hints: Mapping[str, Any]
) -> tuple[str, Recognised]:
    """The one system whose tensors these are, and the network that they show.

    Raises:
        CheckpointError: No system fits, or more than one.
        ConfigError: A hint that this system does not take.
    """
    asked = "thriftnet" if "model" in hints else hints.get("system")
    fits = {}
    for name in SYSTEMS if asked is None else (asked,):
        found = SYSTEMS[name].recognise(Evidence(tensors, metadata, hints))
        if found is not None:
            fits[name] = found
    if len(fits) != 1:
        raise CheckpointError(_unclear(tensors, list(fits), asked))
    name, found = fits.popitem()
    known = {**GENERAL, **SYSTEMS[name].hints}
    strange = [hint for hint in hints if hint not in known]
    if strange and name != "thriftnet":
        raise ConfigError(f"{strange[0]}= says nothing about a file of {SYSTEMS[name].title}: expected {', '.join(known)}")
    return name, found


def _unclear(tensors: Mapping[str, Tensor], fits: list[str], asked: str | None) -> str:
    shown = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in list(tensors.items())[:5])
    seen = f"it holds {len(tensors)} tensors: {shown}{', ...' if len(tensors) > 5 else ''}"
    known = ", ".join(f"{name} ({system.title})" for name, system in SYSTEMS.items())
    if fits:
        return f"several systems fit, {' and '.join(fits)}: say which with system=...; {seen}"
    if asked == "thriftnet":
        return f"system='thriftnet' needs the network's name as model=...; {seen}"
    if asked is not None:
        return f"it is no file of {asked}; {seen}. Leave system= out to have it recognised; known are {known}"
    return f"its system is not recognised; {seen}. Known are {known}. For a network of the zoo under our own keys, give model=..."
