"""Time of computations that are compared: in rounds, so that their ratios can be trusted where absolute times cannot.

In each round every computation has a turn, in a random order, since what ran before decides how much memory is warm. A turn is as
many calls as fill 20 ms. A ratio is taken within each round; the median over the rounds counts, with the quartiles beside it.
"""

from __future__ import annotations

import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

Run = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

TURN, MOST_CALLS = 20e-3, 50  # seconds that a turn lasts at least, and its largest number of calls
MANY_LAUNCHES = 20  # calls that a GPU times together, to hide launching them


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of some numbers."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """Of the ratios within each round."""
        return cls.of([a / b for a, b in zip(numerators, denominators, strict=True)])

    @property
    def quartiles(self) -> str:
        """The quartiles as text; empty if they are equal."""
        return "" if self.low == self.high else f"{self.low:.3g} to {self.high:.3g}"


def time_rounds(
    runs: Mapping[Name, Run],
    rounds: int,
    *,
    device: str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
    turn: float = TURN,
) -> dict[Name, list[float]]:
    """Seconds per call of each computation in each round; what the calls return is freed within.

    Args:
        runs: The computations; each is called once more beforehand, to warm up.
        rounds: Number of rounds.
        device: On "cuda" times are taken between two events, and ``clock`` is not used.
        clock: `time.perf_counter` for what a user waits for, `time.process_time` to leave out other processes.
        turn: Seconds that a turn lasts at least; 0 for one call.

    Returns:
        A list of ``rounds`` times for each name.
    """
    warm = {name: seconds(run, 1, device, clock) for name, run in runs.items()}
    most = MANY_LAUNCHES if device.startswith("cuda") else MOST_CALLS
    calls = {name: max(1, min(most, math.ceil(turn / max(spent, 1e-6)))) for name, spent in warm.items()}
    order, spent = random.Random(0), {name: list[float]() for name in runs}
    for _ in range(rounds):
        for name in order.sample(list(runs), len(runs)):
            spent[name].append(seconds(runs[name], calls[name], device, clock))
    return spent


def seconds(run: Run, calls: int, device: str = "cpu", clock: Callable[[], float] = time.perf_counter) -> float:
    """Time of one call, as the mean of ``calls``."""
    if device.startswith("cuda"):
        return _cuda_seconds(run, calls)
    start = clock()
    for _ in range(calls):
        run()
    return (clock() - start) / calls


def _cuda_seconds(run: Run, calls: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(calls):
        run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / calls


def conditions(device: str = "cpu") -> dict[str, str]:
    """What times depend on, without names of machines."""
    processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": torch.__version__, "machine": torch.cuda.get_device_name() if device.startswith("cuda") else processor}
