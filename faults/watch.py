"""Opening a file that may be damaged, with an eye on the outcome, the time and the memory."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from faults.figure import Bits, bits, ended, forked
from faults.samples import Sample
from thriftnet.errors import CheckpointError
from thriftnet.importing import inert, torchfile

LONGEST = 120  # seconds: what hangs is found out, and a busy machine is no hang
TIMES, CONSTANT = (
    3,
    inert.BASE_MEMORY + (8 << 20),
)  # memory: times the file, plus what any file may use and the network's own
ROOM = 64 << 20  # address space that a process may take beside that, as thread stacks
SAME, VALUES, OTHER, REFUSED, FAILED = "the same tensors", "other values", "another network", "refused", "FAILED"
OUT_OF_MEMORY = re.compile("there is not enough memory|more than there is memory")


@dataclass(frozen=True)
class Judgement:
    """What became of one file.

    Args:
        format: Of the sample that it was made from.
        outcome: One of the five words above.
        reason: Why, where it failed.
        memory: Most bytes it took at once; None where that cannot be measured.
        spare: Bytes of the bound that it left.
    """

    format: str
    outcome: str
    reason: str = ""
    memory: int | None = None
    spare: int | None = None


def return_memory() -> None:
    """Have glibc give large blocks back at once, so that a process's size tells what each file takes."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).mallopt(-3, 128 << 10)  # M_MMAP_THRESHOLD, which else grows


@contextmanager
def in_this_process() -> Iterator[None]:
    """Have files of torch.save described without a process for each, which takes longer than all the rest."""
    isolated = torchfile.describe
    torchfile.describe = lambda file: inert.describe(file).encode()  # type: ignore[assignment]
    try:
        yield
    finally:
        torchfile.describe = isolated  # type: ignore[assignment]


def judge(sample: Sample, data: bytes, folder: Path, sound: Bits | None, *, alarm: bool = True) -> Judgement:
    """Open changed data in place of a sample's.

    Args:
        sample: What it was made from.
        data: What it is now.
        folder: Where to write it.
        sound: The sample's own tensors; None where it may have become any network.
        alarm: Whether the process is to be killed when it takes too long.
    """
    path = sample.put(data, folder)
    bound = TIMES * len(data) + CONSTANT
    signal.setitimer(signal.ITIMER_REAL, LONGEST if alarm else 0)
    try:
        with memory_within(bound) as used:
            outcome, reason = _opened(sample, path, sound)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    memory = used[0] if used else None
    if memory is not None and memory > bound:
        outcome, reason = FAILED, f"it took {memory:,} bytes of memory, {bound:,} are allowed"
    return Judgement(sample.format, outcome, reason, memory, None if memory is None else bound - memory)


def _opened(sample: Sample, path: Path, sound: Bits | None) -> tuple[str, str]:
    try:
        found = bits(sample.open(path))
    except CheckpointError as error:
        said = str(error)
        if str(path) not in said or "\n" in said or len(said) > 2000 or OUT_OF_MEMORY.search(said):
            return FAILED, f"it was refused with {said[:300]!r}"
        return REFUSED, ""
    except Exception as error:
        return FAILED, f"it raised {type(error).__name__}: {error}"
    if sound is None:
        return OTHER, ""
    if found == sound:
        return SAME, ""
    if sample.checked:
        return FAILED, "it was opened with other tensors, though a checksum should have failed"
    same = {key: facts[:2] for key, facts in found.items()} == {key: facts[:2] for key, facts in sound.items()}
    return (VALUES if same else OTHER), ""


@contextmanager
def memory_within(bound: int) -> Iterator[list[int]]:
    """Give the most memory that is taken inside, after the end, and let no more than the bound be taken."""
    used: list[int] = []
    if not os.access("/proc/self/clear_refs", os.W_OK):
        yield used
        return
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).malloc_trim(0)  # else what earlier files left could be taken again, and would not count
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak resident size
    before, limits = _status(), resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (before["VmSize"] + bound + ROOM, limits[1]))
    try:
        yield used
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    used.append(max(0, _status()["VmHWM"] - before["VmRSS"]))


def _status() -> dict[str, int]:
    lines = Path("/proc/self/status").read_text()
    return {name: 1024 * int(kilobytes) for name, kilobytes in re.findall(r"(VmSize|VmRSS|VmHWM):\s+(\d+) kB", lines)}


def in_workers(count: int, work: Callable[[int], list[Judgement]], folder: Path, workers: int) -> Iterator[Judgement]:
    """Do work(0), work(1), ... in as many processes; one that hangs or dies is a failure, and another goes on after it."""
    results = [folder / f"results{worker}" for worker in range(workers)]
    children = [_worker(range(w, count, workers), work, results[w]) for w in range(workers)]
    for worker, child in enumerate(children):
        while (code := ended(child)) != 0:
            at = int(results[worker].read_text().rstrip().splitlines()[-1].split()[1])
            with results[worker].open("a") as file:
                said = f"no answer after {LONGEST} s" if code == -signal.SIGALRM else f"the process died with {code}"
                file.write(json.dumps(asdict(Judgement("?", FAILED, f"number {at}: {said}"))) + "\n")
            child = _worker(range(at + workers, count, workers), work, results[worker])
    for path in results:
        for line in path.read_text().splitlines():
            if line.startswith("{"):
                yield Judgement(**json.loads(line))


def _worker(indices: range, work: Callable[[int], list[Judgement]], path: Path) -> int:
    def loop() -> None:
        with path.open("a", buffering=1) as file:
            for index in indices:
                file.write(f"at {index}\n")
                for judgement in work(index):
                    file.write(_line(judgement))

    return forked(loop)


def _line(judgement: Judgement) -> str:
    facts: dict[str, Any] = asdict(judgement)
    return json.dumps(facts) + "\n"
