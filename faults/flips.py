"""Every single bit of what describes a network or a run, changed: it is refused, or means the same."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

import thriftnet as tn
from faults.figure import Figure, Length, bits
from thriftnet.core.provenance import data_facts
from thriftnet.errors import ThriftnetError
from thriftnet.store import sealed
from thriftnet.store.model_file import RUN
from thriftnet.train import Recipe, checkpoints, train
from training import Net, source

REFUSED, SAME, OTHER = "refused in one line", "means the same", "means something else"
HOW = Recipe().replace(max_steps=2, batch_size=16, trackers=(), validation=0.25, ema_decay=0.5)


def measure(folder: Path, seed: int, length: Length) -> Figure:
    figure = Figure("Single bits changed", ["of what", "bits", "changes", REFUSED, SAME, OTHER])
    chance, run = random.Random(f"{seed}/flips"), folder / "run"
    model = tn.save(_described(), folder / "m", metadata={"class_names": ["a", "b", "c"]}) / "model.safetensors"
    _trained(run)
    (checkpoint,) = sorted((run / "checkpoints").iterdir())[-1:]
    limit = length.pick(40, None, None)
    _row(figure, "a model file's header and config", model, _header(model), limit, chance, lambda: _network(model))
    _row(figure, "run.json", run / RUN, None, limit, chance, lambda: sealed.read_json(run / RUN))
    _row(
        figure, "a checkpoint's header", checkpoint, _header(checkpoint), limit, chance, lambda: checkpoints.read(checkpoint)
    )
    sample = length.pick(5, 150, 3000)
    what = "a checkpoint's header, with a checksum that fits, at the start of the training"
    _row(figure, what, checkpoint, _header(checkpoint), sample, chance, lambda: _again(run), again=True)
    figure.notes.append(
        "The last row is someone who changes a checkpoint on purpose: numbers of the state may then be others. "
        "Nothing but one line of `ThriftnetError`, or a training that goes on, may come of it."
    )
    return figure


def _row(
    figure: Figure,
    what: str,
    path: Path,
    size: int | None,
    changes: int | None,
    chance: random.Random,
    read: Callable[[], Any],
    *,
    again: bool = False,
) -> None:
    """Change as many bits (None: all) among the first bytes of a file, each for itself, and read it."""
    data, sound = path.read_bytes(), read()
    total = 8 * (size or len(data))
    tried: Iterable[int] = range(total) if changes is None else sorted(chance.sample(range(total), changes))
    counts = {REFUSED: 0, SAME: 0, OTHER: 0}
    for bit in tried:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        if again:
            changed[sealed.CHECKSUM] = sealed.checksum(changed).encode()
        path.write_bytes(changed)
        try:
            found = SAME if read() == sound else OTHER
        except ThriftnetError as error:
            found = REFUSED
            figure.expect("\n" not in str(error) and str(error) != "", f"{what}, bit {bit}: it said {error}")
        except BaseException as error:
            found = OTHER
            figure.failures.append(f"{what}, bit {bit}: {type(error).__name__}: {error}"[:500])
        figure.expect(again or found != OTHER, f"{what}, bit {bit}: it was read as something else")
        counts[found] += 1
    path.write_bytes(data)
    figure.rows.append([what, total, sum(counts.values()), *counts.values()])


def _header(path: Path) -> int:
    """Bytes of a safetensors file before its tensors."""
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


def _described() -> torch.nn.Module:
    """A small network with a history and facts about its data."""
    model = tn.create_model("convmixer", dim=8, depth=2, patch_size=2, kernel_size=3, num_classes=3)
    return tn.convert(model, "soft-sharing(templates=2)")


def _network(path: Path) -> Any:
    model = tn.load(path)
    return bits(model), data_facts(model)


def _trained(run: Path) -> Any:
    """What the same command says of the network that was kept."""
    torch.manual_seed(0)
    result = train(HOW, source(), run, model=Net(), device="cpu")
    return result.top1, result.loss, result.weights_sha256


def _again(run: Path) -> Any:
    """As `_trained`, of a copy of the run."""
    copy = run.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    return _trained(shutil.copytree(run, copy))
