"""Figure 1: kill -9 during `save` at random moments; afterwards the network is the old or the new one, bit by bit."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import thriftnet as tn
from faults.figure import Figure, Length, bits, ended, forked, killed_after, names_in
from saver import network
from thriftnet.errors import CheckpointError
from thriftnet.store.config import FILES, MODEL
from thriftnet.store.model_file import read_config

NOTHING = "nothing"
VALUES = (1.0, 2.0)  # of all parameters of the old and the new network


def measure(folder: Path, seed: int, length: Length) -> Figure:
    figure = Figure(
        "Kill -9 during `save`",
        ["before", "kills", "old network after", "new network after", "nothing after", "unfinished files left", "not whole"],
    )
    counts = length.pick((3, 3), (250, 100), (500, 200))
    duration = _duration(folder / "timed")
    figure.notes.append(
        f"One save took {1e3 * duration:.0f} ms (median); moments are drawn evenly from 1.3 times as long, from the first "
        "to after the last of its steps."
    )
    _series(figure, "an earlier network", folder / "over", counts[0], random.Random(f"{seed}/over"), duration)
    _series(figure, NOTHING, folder / "fresh", counts[1], random.Random(f"{seed}/fresh"), duration)
    return figure


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
) -> None:
    """Kill as many savers, look at the folder after each, and add a row."""
    networks = {value: network(value) for value in VALUES}
    whole = {value: bits(model) for value, model in networks.items()}
    fresh, place = before == NOTHING, folder / "m"
    folder.mkdir()
    counts = {"old": 0, "new": 0, "nothing": 0, "unfinished": 0, "not whole": 0}
    old, new = VALUES

    def save(value: float) -> None:
        tn.save(networks[value], place, metadata={"value": value})

    save(old)
    for kill in range(kills):
        if fresh:
            shutil.rmtree(place, ignore_errors=True)
        code = killed_after(lambda report, value=new: _save_and_wait(save, value, report), chance.uniform(0, 1.3 * duration))  # type: ignore[misc]
        figure.expect(code == -signal.SIGKILL, f"a saver ended by itself with {code}")
        counts["unfinished"] += place.exists() and names_in(place) != sorted(FILES)
        found = _found(place, whole, figure)
        outcome = {new: "new", **({None: "nothing"} if fresh else {old: "old"})}.get(found, "not whole")
        counts[outcome] += 1
        figure.expect(outcome != "not whole", f"kill {kill} with {before} before: neither the old nor the new network")
        if found == new and not fresh:
            old, new = new, old
        if chance.random() < 0.5 or kill == kills - 1:  # else the next saver finds what this one left
            save(old)
            figure.expect(names_in(place) == sorted(FILES), f"{names_in(place)} are there after the next save")
    figure.rows.append([before, kills, *counts.values()])


def _save_and_wait(save: Callable[[float], None], value: float, report: int) -> None:
    os.write(report, b".")
    save(value)
    signal.pause()


def _found(place: Path, whole: dict[float, object], figure: Figure) -> float | None:
    """Which network is in the folder, None if there is none, NaN if it is none of them."""
    try:
        loaded = bits(tn.load(place))
        value = read_config(place)["metadata"]["value"]
    except CheckpointError as error:
        if "no model folder" in str(error) and not (place / MODEL).exists():
            return None
        figure.expect(False, str(error))
        return float("nan")
    return value if whole.get(value) == loaded else float("nan")
