"""Figure 1: kill -9 during `save` at random moments; afterwards the folder is the old or the new one, bit by bit."""

from __future__ import annotations

import errno
import os
import random
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
from thriftnet.interop import atomic
from thriftnet.interop.config import read_config

PREPARING, FINISHED = b".", b"!"
VALUES = (1.0, 2.0)  # of all parameters of the old and the new network


def measure(folder: Path, seed: int, quick: bool) -> Figure:
    figure = Figure(
        "Kill -9 during `save`",
        ["before", "kills", "old folder after", "new folder after", "nothing after", "left workspaces", "not whole"],
    )
    counts = (3, 3, 2) if quick else (200, 50, 100)
    duration = _duration(folder / "timed")
    figure.notes.append(
        f"One save took {1e3 * duration:.0f} ms (median); moments are drawn evenly from 1.3 times as long, from the first "
        "to after the last of its steps."
    )
    _series(figure, "an earlier folder", folder / "over", counts[0], random.Random(f"{seed}/over"), duration)
    _series(figure, "nothing", folder / "fresh", counts[1], random.Random(f"{seed}/fresh"), duration)
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
    return mock.patch.object(atomic, "_rename", side_effect=OSError(errno.EINVAL, "Invalid argument"))


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
    place = folder / "m"
    folder.mkdir()
    outcomes = {"old": 0, "new": 0, "nothing": 0}
    leftovers = broken = 0
    old, new = VALUES
    with system():
        for kill in range(kills):
            if before == "nothing":
                _clear(place)
            elif not place.exists():
                tn.save(networks[old], place, metadata={"value": old})

            def save(report: int, new: float = new) -> None:
                os.write(report, PREPARING)
                tn.save(networks[new], place, metadata={"value": new})
                os.write(report, FINISHED)
                signal.pause()

            code = killed_after(save, chance.uniform(0, 1.3 * duration))
            figure.expect(code == -signal.SIGKILL, f"a saver ended by itself with {code}")
            leftovers += names_in(folder) not in (["m"], [])
            found = _found(place, whole, figure)
            outcome = {old: "old", new: "new", None: "nothing"}.get(found, "not whole")
            if outcome not in outcomes or (outcome == "nothing") > (before == "nothing") or (old, before) == (found, "nothing"):
                broken += 1
                figure.expect(False, f"kill {kill} with {before} before: {outcome} after it")
            else:
                outcomes[outcome] += 1
            if before != "nothing" and found == new:
                old, new = new, old
            if chance.random() < 0.5:  # else the next saver finds what this one left
                tn.save(networks[old], place, metadata={"value": old})
                figure.expect(names_in(folder) == ["m"], f"{names_in(folder)} is left after the next save")
        tn.save(networks[old], place, metadata={"value": old})
        figure.expect(names_in(folder) == ["m"], f"{names_in(folder)} is left after the last save")
    figure.rows.append([before, kills, *outcomes.values(), leftovers, broken])


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


def _clear(place: Path) -> None:
    for path in (*place.glob("*"), place):
        if path.is_dir():
            path.rmdir()
        elif path.exists():
            path.unlink()
