"""The disk is full, or files may not grow: `save` and trainings say so, and what was there stays as it was.

``python -m faults.disk FOLDER`` fills small file systems in memory. It is started where it may mount them, in a mount namespace of
its own, so that they are gone with it.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import thriftnet as tn
from faults import signals
from faults.figure import Figure, Length, bits, ended, forked, names_in
from saver import network
from thriftnet.errors import CheckpointError, ThriftnetError
from thriftnet.store.config import FILES
from thriftnet.store.model_file import read_config

KIB = 1024
NO_MOUNT = "File systems of their own were not tried: this user may not mount any."


def measure(folder: Path, seed: int, length: Length) -> Figure:
    figure = Figure(
        "Disk full during `save`", ["limit", "saves", "refused in one line", "old network whole", "nothing left"]
    )
    quick = length is Length.QUICK
    sizes = (1000, 30_000) if quick else (0, 1, 100, 1000, 5000, 30_000, 60_000, 90_000)
    with _row(figure, f"file size at most {', '.join(f'{size:,}' for size in sizes)} bytes") as check:
        for size in sizes:
            check(_prepared(folder / f"limit{size}"), lambda size=size: _limit(size))  # type: ignore[misc]
    if not quick:
        _on_file_systems(folder, figure)
    return figure


@contextmanager
def _row(figure: Figure, limit: str) -> Iterator[Callable[[Path, Callable[[], None]], None]]:
    """Give a function that tries one save, and add the sum of all of them to the figure."""
    counts = [0, 0, 0, 0]

    def check(place: Path, before: Callable[[], None]) -> None:
        said, code = _saved(place, before)
        refused = said.startswith(f"cannot write {place}: ") and "\n" not in said
        kept = bits(tn.load(place)) == bits(network(1.0)) and read_config(place)["metadata"] == {"value": 1.0}
        clean = names_in(place) == sorted(FILES)
        for index, right in enumerate((True, refused, kept, clean)):
            counts[index] += right
        if not (refused and kept and clean):
            figure.failures.append(f"{limit}: exit code {code}, it said {said!r}, whole {kept}, {names_in(place)}")

    yield check
    figure.rows.append([limit, *counts])


def _saved(place: Path, before: Callable[[], None]) -> tuple[str, int]:
    """What a process says that saves another network, and its exit code."""
    reading, writing = os.pipe()

    def save() -> None:
        model = network(2.0)
        before()
        try:
            tn.save(model, place, metadata={"value": 2.0})
            os.write(writing, b"it was saved")
        except CheckpointError as error:
            os.write(writing, str(error).encode())

    child = forked(save)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    return said, ended(child)


def _limit(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _prepared(folder: Path) -> Path:
    """A new folder with a saved network."""
    folder.mkdir(parents=True)
    return tn.save(network(1.0), folder / "m", metadata={"value": 1.0})


# -- trainings


def measure_trainings(folder: Path, seed: int, length: Length) -> Figure:
    """The same with trainings, of which each is taken up again when there is room."""
    figure = Figure(
        "Disk full during a training",
        ["limit", "trainings", "refused in one line", "went through", "same result in the end"],
    )
    count = length.pick(2, 4, 10)
    sizes = [round(300 * 60 ** (number / (count - 1))) for number in range(count)]  # the largest file has 13,000 bytes
    wanted = _trained(folder / "whole")
    counts = [0, 0, 0, 0]
    for size in sizes:
        _check_training(folder / f"limit{size}", lambda size=size: _limit(size), lambda: None, wanted, figure, counts)  # type: ignore[misc]
    figure.rows.append([f"file size at most {', '.join(f'{size:,}' for size in sizes)} bytes", *counts])
    if length is not Length.QUICK:
        _on_file_systems(folder, figure, "trainings", str(count))
    return figure


def _trained(place: Path) -> signals.Facts:
    return signals.facts_of(place, signals.train_here(place))


def _check_training(
    place: Path,
    before: Callable[[], None],
    after: Callable[[], object],
    wanted: signals.Facts,
    figure: Figure,
    counts: list[int],
) -> None:
    """Train in a process where there is too little room, make room, and train to the end."""
    reading, writing = os.pipe()

    def work() -> None:
        before()
        try:
            signals.train_here(place)
        except ThriftnetError as error:
            os.write(writing, str(error).encode())

    child = forked(work)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    code = ended(child)
    refused = said.startswith("cannot write ") and "\n" not in said
    after()
    found = _trained(place)
    for index, right in enumerate((True, refused, not said, found == wanted)):
        counts[index] += right
    figure.expect(code == 0 and (refused or not said), f"{place.name}: exit code {code}, it said {said!r}")
    figure.expect(found == wanted, f"{place.name}: another result in the end")


def _trainings_on_file_systems(folder: Path, count: int) -> Figure:
    figure, counts = Figure("", []), [0, 0, 0, 0]
    wanted = _trained(folder / "whole-again")
    sizes = [4 * (1 + round(70 * number / count)) for number in range(count)]  # the last one is enough
    for kib in sizes:
        with _mounted(folder / f"room{kib}", f"size={kib}k") as system:
            grow = ["mount", "-o", "remount,size=8m", str(system)]
            _check_training(
                system / "run", lambda: None, lambda grow=grow: subprocess.run(grow, check=True), wanted, figure, counts
            )  # type: ignore[misc]
    figure.rows.append([f"tmpfs of {', '.join(map(str, sizes))} KiB", *counts])
    return figure


# -- file systems


def _on_file_systems(folder: Path, figure: Figure, *what: str) -> None:
    unshare = shutil.which("unshare")
    options = ["--mount"] if os.geteuid() == 0 else ["--user", "--map-root-user", "--mount"]
    mountable = folder / "mountable"
    mountable.mkdir()
    probe = [*options, "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mountable)]
    if unshare is None or subprocess.run([unshare, *probe], capture_output=True).returncode:
        figure.notes.append(NO_MOUNT)
        return
    command = [unshare, *options, sys.executable, "-m", "faults.disk", str(folder), *what]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, timeout=300)
    if done.returncode:
        figure.failures.append(f"the process with its own file systems failed: {done.stderr[-400:]}")
        return
    result = json.loads(done.stdout.splitlines()[-1])
    figure.rows += result["rows"]
    figure.failures += result["failures"]


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def _small_file_systems(folder: Path) -> Figure:
    figure = Figure("", [])
    free = (0, 4, 8, 40, 80)
    with _row(figure, f"tmpfs of 1 MiB with {', '.join(map(str, free))} KiB free") as check:
        for kib in free:
            with _mounted(folder / f"free{kib}", "size=1m") as system:
                check(_prepared(system / "a"), lambda system=system, kib=kib: _fill(system, kib * KIB))  # type: ignore[misc]
    counts = (0, 1, 2)  # a save takes three
    with _row(figure, f"tmpfs with {', '.join(map(str, counts))} free inodes") as check:
        for count in counts:
            with _mounted(folder / f"inodes{count}", "size=1m,nr_inodes=40") as system:
                check(_prepared(system / "a"), lambda system=system, count=count: _use_inodes(system, count))  # type: ignore[misc]
    with _row(figure, "tmpfs that became read-only") as check, _mounted(folder / "readonly", "size=1m") as system:
        place = _prepared(system / "a")
        subprocess.run(["mount", "-o", "remount,ro", str(system)], check=True)
        check(place, lambda: None)
    return figure


def _fill(system: Path, left: int) -> None:
    """Leave as many bytes free."""
    facts = os.statvfs(system)
    fill = facts.f_bavail * facts.f_frsize - left
    (system / "filler").write_bytes(bytes(max(0, fill)))


def _use_inodes(system: Path, left: int) -> None:
    """Leave as many inodes free."""
    for number in range(os.statvfs(system).f_favail - left):
        (system / f"filler{number}").touch()


if __name__ == "__main__":
    place = Path(sys.argv[1])
    result = _trainings_on_file_systems(place, int(sys.argv[3])) if sys.argv[2:] else _small_file_systems(place)
    print(json.dumps({"rows": result.rows, "failures": result.failures}))
