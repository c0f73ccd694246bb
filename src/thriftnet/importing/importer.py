"""Networks from the files of the five original projects, and from plain state dicts in their layouts.

The system and the architecture are told by the names and shapes of the tensors; the network is built without memory first,
compared with the file tensor by tensor, and filled when all of them fit. Nothing in a file is run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thriftnet.core.provenance import add_data_facts
from thriftnet.core.tied import unique_tensors
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.files import sha256_of
from thriftnet.importing.extract import contents
from thriftnet.importing.files import read_file
from thriftnet.importing.layout import Layout, fill
from thriftnet.importing.recognised import Recognised
from thriftnet.importing.systems import SYSTEMS, check_hints, recognise
from thriftnet.models import create_model
from thriftnet.models.entry import IDENTITY

SLACK = 1 << 20  # numbers that a network may have beyond those that are stored, as counters that were left out
TOLD_BY_TENSORS = (
    "mapping",
    "rate",
    "fusion",
    "expansion",
    "reduction",
    "original_sharing",
)  # hints, checked where they are
LONG = 1000  # characters of metadata that are not kept in a folder
SHOWN = 5  # keys in a message


@dataclass(frozen=True)
class Source:
    """Where an imported network comes from.

    Args:
        system: Whose file it is, as "netrl2".
        format: "torch zip", "torch legacy" or "safetensors".
        file: Its path, as given.
    """

    system: str
    format: str
    file: str

    def __str__(self) -> str:
        return f"{self.file} ({self.format}), {self.system}: {SYSTEMS[self.system].title}"


@dataclass(frozen=True)
class ImportedCheckpoint:
    """A network from an author's file.

    Args:
        model: The network, filled, in eval mode on the CPU.
        source: System, format and file.
        metadata: What the file says of itself, JSON-ready: epoch, accuracy, configuration, arguments.
        notes: What was assumed, chosen or left out, a sentence each.
        preprocessing: What images the authors gave it: ``input_size`` and, where known, ``normalisation``.
    """

    model: nn.Module
    source: Source
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The network as `create_model` makes it, or its class where the zoo does not make it."""
        identity = getattr(self.model, IDENTITY, None)
        if identity is None:
            return type(self.model).__name__
        arguments = "".join(f", {key}={value!r}" for key, value in identity["kwargs"].items())
        return f"create_model({identity['name']!r}{arguments})"

    def __str__(self) -> str:
        params = sum(parameter.numel() for parameter in self.model.parameters())
        return "\n".join(
            [
                f"from    {self.source}",
                f"network {self.architecture}",
                f"params  {params:,}",
                *(f"note    {note}" for note in self.notes),
            ]
        )


def import_checkpoint(path: str | os.PathLike[str], **hints: Any) -> ImportedCheckpoint:
    """The network in a file of one of the original projects, or in a plain state dict with their keys.

    Args:
        path: A file of torch.save, old or new, or safetensors; its name does not matter.
        hints: What tensors do not tell and the file does not state: ``mapping``, ``activation``, ``strides``, ``ema``, ...;
            ``system`` forces one; ``model`` names a network of the zoo for its own keys.

    Raises:
        CheckpointError: The file is no checkpoint, of no known system, or does not fit the network that its tensors show.
        ConfigError: An unknown hint, or one that makes no sense here.
    """
    check_hints(hints)
    stored = read_file(path)
    try:
        found = contents(stored.content, hints)
        system, recognised = recognise(found.tensors, found.metadata, _plain(hints))
        _check_used(hints, recognised)
        model, notes = build(recognised)
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from None
    source = Source(system, stored.format, os.fspath(path))
    preprocessing = _preprocessing(model, recognised)
    add_data_facts(model, preprocessing)
    return ImportedCheckpoint(model, source, found.metadata, (*found.notes, *recognised.notes, *notes), preprocessing)


def folder_facts(imported: ImportedCheckpoint) -> dict[str, Any]:
    """What `save` keeps with an imported network: preprocessing, classes, the file and its hash, notes, short metadata."""
    source = imported.source
    return {
        **imported.preprocessing,
        "num_classes": getattr(imported.model, "num_classes", None),
        "source": {
            "system": source.system,
            "format": source.format,
            "file": Path(source.file).name,
            "sha256": sha256_of(source.file),
        },
        "notes": list(imported.notes),
        "checkpoint": {key: value for key, value in imported.metadata.items() if len(str(value)) <= LONG},
    }


def build(recognised: Recognised) -> tuple[nn.Module, list[str]]:
    """The recognised network, filled with the stored tensors, and notes about them.

    Raises:
        CheckpointError: Tensors are missing, unexpected, or of another shape or kind.
    """
    with torch.device("meta"):
        empty = _make(recognised)
    layout = recognised.layout(empty)
    ours = unique_tensors(empty)
    tensors, notes = _with_counters(recognised.tensors, layout)
    tensors |= {key: torch.zeros(ours[layout[key].key].shape) for key in recognised.absent if key in layout}
    check(tensors, ours, layout)
    persistent = set(empty.state_dict(keep_vars=True))
    if all(name in persistent for name, _ in chain(empty.named_parameters(), empty.named_buffers())):
        model = empty.to_empty(device="cpu")
    else:
        model = _make(recognised)
    fill(model, tensors, recognised.layout(model))
    kinds = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.is_floating_point()} - {"torch.float32"})
    if kinds:
        notes.append(f"Weights are stored as {' and '.join(kinds)}; the network has them as torch.float32.")
    if recognised.adapt is not None:
        delattr(model, IDENTITY)
    return model.eval(), notes


def check(theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], layout: Layout) -> None:
    """Raise unless every tensor has its place and every place its tensor; nothing is allocated.

    Raises:
        CheckpointError: Which do not fit, with both shapes.
    """
    problems = []
    unexpected = [key for key in theirs if key not in layout]
    missing = [key for key, slot in layout.items() if key not in theirs and slot.key in ours]
    for what, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            problems.append(f"{what}: {_listed(keys)}")
    wrong = []
    for key, tensor in theirs.items():
        if key in layout:
            slot = layout[key]
            target = ours[slot.key][slot.index] if slot.index else ours[slot.key]
            if _sides(tensor) != _sides(target):
                wrong.append(f"{key} has shape {tuple(tensor.shape)}, the network needs {tuple(target.shape)}")
            elif tensor.is_floating_point() != target.is_floating_point() or tensor.is_complex():
                wrong.append(f"{key} has numbers of kind {tensor.dtype}, the network needs {target.dtype}")
    problems += wrong[:SHOWN] + ([f"{len(wrong) - SHOWN} more differ"] if len(wrong) > SHOWN else [])
    if problems:
        raise CheckpointError(f"the tensors do not fit the network that they show: {'; '.join(problems)}")
    needed, stored = sum(tensor.numel() for tensor in ours.values()), _stored_numbers(theirs)
    if needed > stored + SLACK:
        raise CheckpointError(f"its tensors state {needed:,} numbers, but the file stores {stored:,}: it is damaged")


def _make(recognised: Recognised) -> nn.Module:
    try:
        model = create_model(recognised.name, **recognised.kwargs)
    except ConfigError as error:
        raise CheckpointError(f"it looks like {recognised.name}, which cannot be built: {error}") from None
    if recognised.adapt is not None:
        recognised.adapt(model)
    return model


def _with_counters(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors, with zeros for the norms' counters that torch did not have before version 0.4."""
    complete, added = dict(tensors), 0
    for key in layout:
        place, _, leaf = key.rpartition(".")
        if leaf == "num_batches_tracked" and key not in complete and f"{place}.running_var" in complete:
            complete[key] = torch.zeros((), dtype=torch.int64)
            added += 1
    note = (
        f"Counters of {added} norms (num_batches_tracked) start at 0: the file is from before torch 0.4, or left them out."
    )
    return complete, [note] if added else []


def _sides(tensor: Tensor) -> list[int]:
    """The shape without sides of 1, which the authors' layers have more or fewer of."""
    return [side for side in tensor.shape if side != 1]


def _stored_numbers(tensors: Mapping[str, Tensor]) -> int:
    """How many numbers lie in the storages of these tensors, each storage counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in tensors.values()}
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in storages.values())


def _listed(keys: list[str]) -> str:
    return ", ".join(keys[:SHOWN]) + (f", ... ({len(keys)} in all)" if len(keys) > SHOWN else "")


def _check_used(hints: Mapping[str, Any], recognised: Recognised) -> None:
    """Raise for a hint that the tensors contradict, or that plays no part in their network.

    Raises:
        ConfigError: With what the tensors show.
    """
    for name in TOLD_BY_TENSORS if "model" not in hints else ():
        value = hints.get(name)
        if value is not None and recognised.kwargs.get(name) != value:
            shown = (
                f"the tensors show {name}={recognised.kwargs[name]!r}"
                if name in recognised.kwargs
                else "it plays no part there"
            )
            raise ConfigError(f"{name}={value!r} does not go with this file's {recognised.name}: {shown}. Leave it out")


def _plain(hints: Mapping[str, Any]) -> dict[str, Any]:
    """Hints about the architecture."""
    return {name: value for name, value in hints.items() if name != "ema" and value is not None}


def _preprocessing(model: nn.Module, recognised: Recognised) -> dict[str, Any]:
    size = getattr(model, "default_cfg", {}).get("input_size")
    facts: dict[str, Any] = {} if size is None else {"input_size": list(size)}
    if recognised.colours is not None:
        facts["normalisation"] = {"mean": list(recognised.colours[0]), "std": list(recognised.colours[1])}
    return facts
