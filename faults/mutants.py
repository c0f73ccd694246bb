"""Figure 3: changed files of every format open as what they were, or are refused with file and reason."""

from __future__ import annotations

import os
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from faults import guided, structures
from faults.figure import Bits, Figure, Length, bits
from faults.samples import Sample, make_samples
from faults.watch import (
    CONSTANT,
    FAILED,
    LONGEST,
    OTHER,
    REFUSED,
    SAME,
    TIMES,
    VALUES,
    Judgement,
    in_this_process,
    in_workers,
    judge,
    return_memory,
)
from test_torchfile_hostile import mutant

MIB = 1 << 20
TAIL = 4000  # bytes at the end, where archives have their directory
COLUMNS = (SAME, VALUES, OTHER, REFUSED, FAILED)
BATCH = 250  # of hypothesis' files, in one process


def measure(folder: Path, seed: int, length: Length) -> Figure:
    figure = Figure("Changed files", ["made from", "files", *COLUMNS, "MiB taken at most"])
    return_memory()
    quick = length is Length.QUICK
    samples = make_samples(folder, quick)
    sound = [bits(sample.open(sample.put(sample.data, folder))) for sample in samples]
    changed = Changed(samples, sound, folder, seed)
    count, batches, runs = length.pick((240, 1, 0), (20_000, 16, 5_000), (100_000, 16, 200_000))
    workers = 1 if quick else os.cpu_count() or 1
    size = 40 if quick else BATCH
    with in_this_process():
        _add(figure, "bytes", in_workers(count, changed.of_bytes, _new(folder, "bytes"), workers))
        structured = in_workers(batches, lambda index: changed.structure(index, size), _new(folder, "structure"), workers)
        _add(figure, "structure (hypothesis)", structured)
    again = [index for index in range(0, count, 40) if samples[index % len(samples)].format.startswith("torch")]
    isolated = in_workers(len(again), lambda index: changed.of_bytes(again[index]), _new(folder, "isolated"), workers)
    _add(figure, "bytes, again, each described by a process of its own", isolated)
    if runs:
        judgements, note = guided.judgements(samples, _new(folder, "guided"), seed, runs)
        _add(figure, "guided by coverage (atheris)", judgements)
        figure.notes += [note] if note else []
    total = sum(row[1] for row in figure.rows)
    figure.notes += [
        f"{total:,} files made from {len(samples)} sound ones, of {len(samples[0].data):,} to "
        f"{max(len(sample.data) for sample in samples):,} bytes.",
        "Files of torch.save are described in the process that opens them, except those of the rows that say otherwise.",
        f"Failures would be: any exception but CheckpointError, one that lacks the file's name or has several lines, no answer "
        f"after {LONGEST} s, more memory than {TIMES} x the file + {CONSTANT / MIB:.0f} MiB, a crash, and other tensors where "
        "checksums cover them.",
    ]
    return figure


class Changed:
    """Makes changed files, always the same ones for a seed, and judges them.

    Args:
        samples: Sound files.
        sound: Their tensors.
        folder: Where to write.
        seed: Of what is changed.
    """

    def __init__(self, samples: list[Sample], sound: list[Bits], folder: Path, seed: int) -> None:
        self.samples, self.sound, self.folder, self.seed = samples, sound, folder, seed
        self.states = structures.states_of(samples, folder)

    def of_bytes(self, index: int) -> list[Judgement]:
        """Number so and so: bits flipped, bytes replaced, cut off, cut out, or taken from other files."""
        chance = random.Random(f"{self.seed}/bytes/{index}")
        which = index % len(self.samples)
        sample = self.samples[which]
        others = [other.data for other in self.samples]
        keep = max(0, len(sample.data) - TAIL) if chance.random() < 0.2 else 0
        data = sample.data[:keep] + mutant(sample.data[keep:], others, chance)
        return [self._judge(which, data, f"bytes/{index}")]

    def structure(self, batch: int, size: int) -> list[Judgement]:
        """As many files whose parts fit each other in form, but say something else."""
        made = structures.draw(self.samples, self.states, self.seed, batch, size)
        return [self._judge(which, data, f"structure/{batch}/{index}") for index, (which, data) in enumerate(made)]

    def _judge(self, which: int, data: bytes, label: str) -> Judgement:
        own = self.folder / f"of{os.getpid()}"
        own.mkdir(exist_ok=True)
        found = judge(self.samples[which], data, own, self.sound[which])
        if found.outcome != FAILED:
            return found
        reason = f"{self.samples[which].name} ({found.format}), {label}: {found.reason}"
        return Judgement(found.format, FAILED, reason, found.memory, found.spare)


def _new(folder: Path, name: str) -> Path:
    (folder / name).mkdir()
    return folder / name


def _add(figure: Figure, how: str, judgements: Iterable[Judgement]) -> None:
    """A row for each format, and the failures."""
    counts: dict[str, Counter[str]] = {}
    memory: dict[str, int] = {}
    for found in judgements:
        counts.setdefault(found.format, Counter())[found.outcome] += 1
        memory[found.format] = max(memory.get(found.format, 0), found.memory or 0)
        figure.expect(found.outcome != FAILED, f"{how}: {found.reason}")
    for kind, outcomes in sorted(counts.items()):
        taken = round(memory[kind] / MIB, 1)
        figure.rows.append([f"{kind}; {how}", outcomes.total(), *(outcomes[column] for column in COLUMNS), taken])
