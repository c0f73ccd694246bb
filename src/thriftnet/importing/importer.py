"""Networks from the files of the five original projects, and from plain state dicts in their layouts.

The names and shapes of the tensors show the system and the architecture; the network is built without memory first, compared
with the file tensor by tensor, and filled when all of them fit. Nothing in a file is run.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thriftnet.arguments import as_path, checked
from thriftnet.core.provenance import add_data_facts, stated_input_size
from thriftnet.core.tied import count_params, unique_tensors
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.files import sha256_of
from thriftnet.importing.evidence import Recognised
from thriftnet.importing.extract import contents
from thriftnet.importing.files import read_file
from thriftnet.importing.layout import Layout, check, fill
from thriftnet.importing.systems import SYSTEMS, check_hints, recognise
from thriftnet.models import create_model
from thriftnet.models.table import IDENTITY

SLACK = 1 << 20  # numbers that a network may have beyond those stored, as counters that were left out
# hints that the tensors may contradict
SHOWN_BY_TENSORS = ("mapping", "rate", "fusion", "expansion", "reduction", "original_sharing")
LONG = 1000  # characters, from which metadata is not saved with the network


@dataclass(frozen=True)
class Source:
    """Where an imported network comes from.

    Args:
        system: Whose file it is, as "filter-basis".
        format: "torch zip", "torch legacy" or "safetensors".
        file: Its path, as given.
    """

    system: str
    format: str
    file: str

    def __str__(self) -> str:
        return f"{self.file} ({self.format}), {self.system}: {SYSTEMS[self.system].title}"


@checked
@dataclass(frozen=True)
class ImportedCheckpoint:
    """A network from an author's file.

    Args:
        model: The network, filled, in eval mode on the CPU.
        source: System, format and file.
        metadata: What the file says of itself, JSON-ready: epoch, accuracy, configuration, arguments.
        notes: What was assumed, chosen or left out, a sentence each.
        preprocessing: How the authors prepare images in evaluation: ``input_size`` and, where known, ``normalisation``,
            ``crop_pct`` and ``eval_interpolation``.
    """

    model: nn.Module
    source: Source
    metadata: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        """The call of `create_model` that makes the network, or its class if the zoo does not have it."""
        identity = getattr(self.model, IDENTITY, None)
        if identity is None:
            return type(self.model).__name__
        arguments = "".join(f", {key}={value!r}" for key, value in identity["kwargs"].items())
        return f"create_model({identity['name']!r}{arguments})"

    def __str__(self) -> str:
        lines = [f"from    {self.source}", f"network {self.architecture}", f"params  {count_params(self.model):,}"]
        return "\n".join(lines + [f"note    {note}" for note in self.notes])


@checked
def import_checkpoint(path: str | os.PathLike[str], **hints: Any) -> ImportedCheckpoint:
    """Read the network in a file of one of the original projects, or in a plain state dict with their keys.

    Args:
        path: A file of torch.save, old or new, or safetensors; its name does not matter.
        hints: What neither the tensors nor the file tell: ``mapping``, ``activation``, ``strides``, ``ema``, ...;
            ``system`` forces one; ``model`` names a network of the zoo for its own keys.

    Raises:
        CheckpointError: The file is no checkpoint, of no known system, or does not fit the network that its tensors show.
        ConfigError: An unknown hint, or one that does not go with this file.
    """
    check_hints(hints)
    content, format = read_file(as_path(path))
    about_network = {name: value for name, value in hints.items() if name != "ema" and value is not None}
    try:
        found = contents(content, hints)
        system, recognised = recognise(found.tensors, found.metadata, about_network)
        if "model" not in hints:
            _check_used(about_network, recognised)
        model, notes = build(recognised)
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from None
    size = stated_input_size(model)
    preprocessing = {**({} if size is None else {"input_size": list(size)}), **recognised.preprocessing}
    add_data_facts(model, preprocessing)
    return ImportedCheckpoint(
        model=model,
        source=Source(system, format, os.fspath(path)),
        metadata=found.metadata,
        notes=(*found.notes, *recognised.notes, *notes),
        preprocessing=preprocessing,
    )


def folder_facts(imported: ImportedCheckpoint) -> dict[str, Any]:
    """What `save` keeps with an imported network: preprocessing, classes, the file and its hash, notes, short metadata."""
    file = imported.source.file
    return {
        **imported.preprocessing,
        "num_classes": getattr(imported.model, "num_classes", None),
        "source": {**asdict(imported.source), "file": Path(file).name, "sha256": sha256_of(file)},
        "notes": list(imported.notes),
        "checkpoint": {key: value for key, value in imported.metadata.items() if len(str(value)) <= LONG},
    }


def build(recognised: Recognised) -> tuple[nn.Module, list[str]]:
    """The recognised network, filled with the stored tensors if all of them fit, and notes about them."""
    with torch.device("meta"):
        empty = _make(recognised)
    layout, ours = recognised.layout(empty), unique_tensors(empty)
    tensors, notes = _with_counters(recognised.tensors, layout)
    tensors |= {key: torch.zeros(layout[key].of(ours).shape) for key in recognised.absent if key in layout}
    check(empty, tensors, layout)
    needed, stored = sum(tensor.numel() for tensor in ours.values()), _stored_numbers(tensors)
    if needed > stored + SLACK:
        raise CheckpointError(f"its tensors state {needed:,} numbers, but the file stores {stored:,}: it is damaged")
    persistent = set(empty.state_dict(keep_vars=True))
    computed = any(name not in persistent for name, _ in empty.named_buffers())
    model = _make(recognised) if computed else empty.to_empty(device="cpu")
    fill(model, tensors, recognised.layout(model))
    kinds = sorted({str(tensor.dtype) for tensor in tensors.values() if tensor.is_floating_point()} - {"torch.float32"})
    if kinds:
        notes.append(f"Weights are stored as {' and '.join(kinds)}; the network has them as torch.float32.")
    if recognised.adapt is not None:
        delattr(model, IDENTITY)
    return model.eval(), notes


def _make(recognised: Recognised) -> nn.Module:
    try:
        model = create_model(recognised.name, **recognised.kwargs)
    except ConfigError as error:
        raise CheckpointError(f"it looks like {recognised.name}, which cannot be built: {error}") from None
    if recognised.adapt is not None:
        recognised.adapt(model)
    return model


def _with_counters(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors, with zeros for the norms' counters, which torch did not have before version 0.4."""
    added = [
        key
        for key in layout
        if key.endswith(".num_batches_tracked") and key not in tensors and f"{key.rpartition('.')[0]}.running_var" in tensors
    ]
    note = f"Counters of {len(added)} norms (num_batches_tracked) start at 0: the file is from before torch 0.4, or left them out."
    return {**tensors, **{key: torch.zeros((), dtype=torch.int64) for key in added}}, [note] if added else []


def _stored_numbers(tensors: Mapping[str, Tensor]) -> int:
    """How many numbers the storages of these tensors hold, each storage counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor for tensor in tensors.values()}
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in storages.values())


def _check_used(hints: Mapping[str, Any], recognised: Recognised) -> None:
    """Raise a `ConfigError` for a hint that the tensors contradict, or that plays no part in their network."""
    for name in (name for name in SHOWN_BY_TENSORS if name in hints):
        shown, value = recognised.kwargs.get(name), hints[name]
        if shown != value:
            why = f"the tensors show {name}={shown!r}" if name in recognised.kwargs else "it plays no part there"
            raise ConfigError(f"{name}={value!r} does not go with this file's {recognised.name}: {why}. Leave it out")
