"""The literal table of the systems whose files are recognised, and the choice among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from thriftnet.errors import CheckpointError, ConfigError, unknown
from thriftnet.interop.authors import (
    dsnet_files,
    netrl2_files,
    plain_files,
    shiftresnet_files,
    softsharing_files,
    spin_files,
)
from thriftnet.interop.authors.recognised import Recognised, Tensors

GENERAL = {"system": "which system's file it is, where it should not be told by its tensors"}


@dataclass(frozen=True)
class System:
    """A kind of file.

    Args:
        title: What it is, for people.
        recognise: Gives the architecture that the tensors show, None for another system's tensors.
        hints: What a user may say where tensors do not tell, and what it is.
    """

    title: str
    recognise: Callable[[Tensors, Mapping[str, Any], Mapping[str, Any]], Recognised | None]
    hints: Mapping[str, str]


SYSTEMS: dict[str, System] = {
    "shiftresnet": System("ShiftResNet (shifts)", shiftresnet_files.recognise, shiftresnet_files.HINTS),
    "softsharing": System("soft sharing (template banks)", softsharing_files.recognise, softsharing_files.HINTS),
    "netrl2": System("Net_RL2 (filter bases)", netrl2_files.recognise, netrl2_files.HINTS),
    "spin": System("SPIN (weight sharing)", spin_files.recognise, spin_files.HINTS),
    "dsnet": System("DS-Net (slimmable)", dsnet_files.recognise, dsnet_files.HINTS),
    "resnet": System("plain ResNet", plain_files.recognise, plain_files.HINTS),
    "thriftnet": System("a network of the zoo, named by model=", plain_files.recognise_own, plain_files.OWN_HINTS),
}


def all_hints() -> dict[str, str]:
    """Every hint, and what it is."""
    return GENERAL | {name: text for system in SYSTEMS.values() for name, text in system.hints.items()}


def check_hints(hints: Mapping[str, Any]) -> None:
    """Raise for a hint that no system takes; with ``model``, what is left goes to the network.

    Raises:
        ConfigError: An unknown hint, with the possible ones, or an unknown system.
    """
    for name in hints if "model" not in hints else ():
        if name not in all_hints():
            raise unknown("hint", name, all_hints())
    system = hints.get("system")
    if system is not None and system not in SYSTEMS:
        raise unknown("system", str(system), SYSTEMS)


def recognise(tensors: Tensors, metadata: Mapping[str, Any], hints: Mapping[str, Any]) -> tuple[str, Recognised]:
    """The one system whose tensors these are, and the network that they show.

    Raises:
        CheckpointError: No system fits, or more than one.
        ConfigError: A hint that this system does not take.
    """
    asked = "thriftnet" if "model" in hints else hints.get("system")
    fits = {}
    for name, system in SYSTEMS.items():
        if asked in (None, name):
            found = system.recognise(tensors, metadata, hints)
            if found is not None:
                fits[name] = found
    if len(fits) != 1:
        raise CheckpointError(_unclear(tensors, list(fits), asked))
    name, found = next(iter(fits.items()))
    strange = [hint for hint in hints if hint not in {**GENERAL, **SYSTEMS[name].hints}] if name != "thriftnet" else []
    if strange:
        possible = ", ".join({**GENERAL, **SYSTEMS[name].hints})
        raise ConfigError(f"{strange[0]}= says nothing about a file of {SYSTEMS[name].title}: possible are {possible}")
    return name, found


def _unclear(tensors: Tensors, fits: list[str], asked: object) -> str:
    shown = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in list(tensors.items())[:5])
    seen = f"it holds {len(tensors)} tensors: {shown}{', ...' if len(tensors) > 5 else ''}"
    known = ", ".join(f"{name} ({system.title})" for name, system in SYSTEMS.items())
    if len(fits) > 1:
        return f"several systems fit, {' and '.join(fits)}: say which with system=...; {seen}"
    if asked == "thriftnet":
        return f"system='thriftnet' needs the network's name as model=...; {seen}"
    if asked is not None:
        return f"it is no file of {asked}; {seen}. Leave system= out to have it recognised; known are {known}"
    return f"its system is not recognised; {seen}. Known are {known}. Of a network of the zoo under our own keys, give model=..."
