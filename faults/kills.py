"""Figure 1: kill -9 during `save` at random moments; afterwards the folder is the old or the new one, bit by bit."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from unittest import mock

import thriftnet as tn
from faults.figure import Figure, bits, ended, forked, killed_after, names_in
from saver import network
from thriftnet.errors import CheckpointError
from thriftnet.store import atomic
from thriftnet.store.config import read_config

NOTHING = "nothing"
VALUES = (1.0, 2.0)  # of all parameters of the old and the new network


def measure(folder: Path, seed: int, quick: bool) -> Figure:
    figure = Figure(
        "Kill -9 during `save`",
        ["before", "kills", "old folder after", "new folder after", "nothing after", "workspaces left", "not whole"],
    )
    counts = (3, 3, 2) if quick else (200, 50, 100)
    duration = _duration(folder / "timed")
    figure.notes.append(
        f"One save took {1e3 * duration:.0f} ms (median); moments are drawn evenly from 1.3 times as long, from the first "
        "to after the last of its steps."
    )
    _series(figure, "an earlier folder", folder / "over", counts[0], random.Random(f"{seed}/over"), duration)
    _series(figure, NOTHING, folder / "fresh", counts[1], random.Random(f"{seed}/fresh"), duration)
    _series(
        figure,
        "an earlier folder, file system that cannot exchange two folders (simulated)",
        folder / "renames",
        counts[2],
        random.Random(f"{seed}/renames"),
        duration,
        no_exchange,
    )
    return figure


def no_exchange() -> AbstractContextManager[object]:
    """As on file systems whose renames take no flags."""

    def refuse(source: Path, target: Path, flags: dict[str, int]) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    return mock.patch.object(atomic, "_rename", refuse)


def _duration(folder: Path) -> float:
    """Seconds of a save over an earlier folder, in a process as those that are killed."""
    times = []
    for count in range(4):
        folder.mkdir(exist_ok=True)
        record = folder / "seconds"

        def timed(value: float = float(count), record: Path = record) -> None:
            model, start = network(value), time.perf_counter()
            tn.save(model, folder / "m", metadata={"value": value})
            record.write_text(str(time.perf_counter() - start))

        ended(forked(timed))
        times.append(float(record.read_text()))
    return median(times[1:])


def _series(
    figure: Figure,
    before: str,
    folder: Path,
    kills: int,
    chance: random.Random,
    duration: float,
    system: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> None:
    """Kill as many savers, look at the folder after each, and add a row."""
    networks = {value: network(value) for value in VALUES}
    whole = {value: bits(model) for value, model in networks.items()}
    fresh, place = before == NOTHING, folder / "m"
    folder.mkdir()
    counts = {"old": 0, "new": 0, "nothing": 0, "workspaces": 0, "not whole": 0}
    old, new = VALUES

    def save(value: float) -> None:
        tn.save(networks[value], place, metadata={"value": value})

    with system():
        save(old)
        for kill in range(kills):
            if fresh:
                shutil.rmtree(place, ignore_errors=True)
            code = killed_after(
                lambda report, value=new: _save_and_wait(save, value, report), chance.uniform(0, 1.3 * duration)
            )  # type: ignore[misc]
            figure.expect(code == -signal.SIGKILL, f"a saver ended by itself with {code}")
            counts["workspaces"] += any(name != "m" for name in names_in(folder))
            found = _found(place, whole, figure)
            outcome = {new: "new", **({None: "nothing"} if fresh else {old: "old"})}.get(found, "not whole")
            counts[outcome] += 1
            figure.expect(outcome != "not whole", f"kill {kill} with {before} before: neither the old nor the new folder")
            if found == new and not fresh:
                old, new = new, old
            if chance.random() < 0.5 or kill == kills - 1:  # else the next saver finds what this one left
                save(old)
                figure.expect(names_in(folder) == ["m"], f"{names_in(folder)} is there after the next save")
    figure.rows.append([before, kills, *counts.values()])


def _save_and_wait(save: Callable[[float], None], value: float, report: int) -> None:
    os.write(report, b".")
    save(value)
    signal.pause()


def _found(place: Path, whole: dict[float, object], figure: Figure) -> float | None:
    """Which network is in the folder, None if there is no folder, NaN if it is none of them."""
    try:
        loaded = bits(tn.load(place))
        value = read_config(place)["metadata"]["value"]
    except CheckpointError as error:
        if "no model folder" in str(error) and not place.exists():
            return None
        figure.expect(False, str(error))
        return float("nan")
    return value if whole.get(value) == loaded else float("nan")
