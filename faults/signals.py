"""Signals at random moments of a training; taken up again, it ends as if nothing had happened, bit by bit.

A moment is a function call: the n-th one that the training makes, whatever else the machine does.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

import thriftnet as tn
from faults.figure import Bits, Figure, Length, bits, ended, forked
from faults.trainings import RECIPE
from thriftnet.train import Recipe, TrainResult, run_folder, train
from thriftnet.train.interrupts import Interrupted
from thriftnet.train.loop import Progress
from training import Net, metrics, source

KINDS = {"SIGINT": signal.SIGINT, "SIGTERM": signal.SIGTERM, "SIGHUP": signal.SIGHUP}
LAST = 2  # steps that get signals of their own
HOW = Recipe().replace(**{**RECIPE, "checkpoint_every": 3})
AFTER = 400  # function calls in which a second signal follows
Facts = tuple[dict[str, Any], list[dict[str, object]], Bits]


def measure(folder: Path, seed: int, length: Length) -> Figure:
    with patch.object(run_folder, "run_curves", lambda rows: "<svg></svg>"):  # else most calls would be those that draw
        return _measure(folder, seed, length)


def _measure(folder: Path, seed: int, length: Length) -> Figure:
    figure = Figure(
        "Signals during a training, evaluation and keeping included",
        [
            "signal",
            "moments",
            f"within the last {LAST} steps",
            "stopped in one line",
            "finished",
            "killed",
            "equal in the end",
        ],
    )
    wanted = facts_of(folder / "whole", train_here(folder / "whole"))
    begins, calls = _calls(folder / "counted")
    chance = random.Random(f"{seed}/signals")
    moments, late = length.pick((2, 1), (40, 16), (120, 48))
    kinds = [(name, times) for times in (1, 2) for name in KINDS]
    rows = {kind: [0] * 6 for kind in kinds}
    for trial in range(moments):
        kind, is_late = kinds[trial % len(kinds)], trial < late
        place, row = folder / f"run{trial}", rows[kind]
        at = chance.randint(begins if is_late else 1, calls)
        outcome = _signalled(place, KINDS[kind[0]], at, chance.randint(1, AFTER) if kind[1] == 2 else None)
        found = facts_of(place, train_here(place))
        for index, counts in enumerate((True, is_late, *(outcome == each for each in ("stopped", "finished", "killed")))):
            row[index] += counts
        row[5] += found == wanted
        said = f"{kind[0]} x {kind[1]} at call {at} of {calls}"
        figure.expect(outcome in ("stopped", "finished", "killed"), f"{said}: it ended with {outcome}")
        for name, one, other in zip(("result", "metrics", "kept network"), found, wanted, strict=True):
            figure.expect(one == other, f"{said}, {outcome}: another {name} in the end: {one!r:.200}, not {other!r:.200}")
    figure.rows += [[f"{name}{', twice' * (times == 2)}", *row] for (name, times), row in rows.items() if row[0]]
    figure.notes.append(
        f"A training makes {calls:,} function calls, {calls - begins:,} of them in its last {LAST} steps and after them; a second "
        f'signal comes up to {AFTER} calls after the first. "Killed": before the training looks out for signals, or after.'
    )
    return figure


def train_here(folder: Path, on_progress: Callable[[Progress], None] = lambda progress: None) -> TrainResult:
    torch.manual_seed(0)
    return train(HOW, source(), folder, model=Net(dropout=0.3), device="cpu", on_progress=on_progress)


def facts_of(folder: Path, result: TrainResult) -> Facts:
    """What a training leaves and says, without places and times."""
    line = {name: value for name, value in result.to_dict().items() if name not in ("run", "seconds", "resumed_from")}
    return line, metrics(folder), bits(tn.load(folder / "model", model=Net(dropout=0.3)))


@contextmanager
def _each_call(act: Callable[[], None]) -> Iterator[None]:
    """Do something at each function call of this thread."""
    sys.setprofile(lambda frame, event, argument: act() if event == "call" else None)
    try:
        yield
    finally:
        sys.setprofile(None)


def _calls(folder: Path) -> tuple[int, int]:
    """Function calls of a training: before its last steps, and in all."""
    count, begins = 0, 0

    def act() -> None:
        nonlocal count
        count += 1

    def on_progress(progress: Progress) -> None:
        nonlocal begins
        if progress.step == progress.steps - LAST:
            begins = count

    with _each_call(act):
        train_here(folder, on_progress)
    return begins, count


def _signalled(folder: Path, number: int, at: int, again: int | None) -> str:
    """Train in a process that gets a signal at a call, and again some calls later; gives how that ended."""
    record = folder.parent / f"{folder.name}-ended"
    moments = {at} if again is None else {at, at + again}

    def work() -> None:
        for kind in KINDS.values():  # in the background, a shell has some ignored
            signal.signal(kind, signal.default_int_handler if kind == signal.SIGINT else signal.SIG_DFL)
        count = 0

        def act() -> None:
            nonlocal count
            count += 1
            if count in moments:
                os.kill(os.getpid(), number)

        outcome = "finished"
        try:
            with _each_call(act):
                train_here(folder)
        except Interrupted as error:
            outcome = "stopped" if "checkpoint" in str(error) or "before" in str(error) else repr(error)
        except KeyboardInterrupt:
            outcome = "killed"
        except BaseException as error:
            outcome = repr(error)
        record.write_text(outcome)

    code = ended(forked(work))
    return record.read_text() if record.exists() else "killed" if code == -number else f"exit code {code}"
