"""Timing computations against each other in rounds, since ratios are more reliable than absolute times.

In each round every computation has a turn of 20 ms or more, in random order, since caches depend on the previous turn. Ratios are
taken within each round; reported are the median over the rounds and the quartiles.
"""

from __future__ import annotations

import math
import platform
import random
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

Run = Callable[[], object]
Name = TypeVar("Name", bound=Hashable)

TURN, MOST_CALLS = 20e-3, 50  # minimum seconds and maximum calls of a turn
MANY_LAUNCHES = 20  # calls that a GPU times together, to hide launching them


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of some numbers."""
        low, median, high = np.quantile(values, (0.25, 0.5, 0.75)).tolist()
        return cls(median, low, high)

    @classmethod
    def of_ratios(cls, numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
        """The spread of the ratios within each round."""
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
    """Seconds per call of each computation in each round, including the time to free the results.

    Args:
        runs: The computations; each is called once before, to warm up.
        rounds: Number of rounds.
        device: On "cuda", times are between two events, without ``clock``.
        clock: `time.perf_counter` for wall-clock time, `time.process_time` to exclude other processes.
        turn: Minimum seconds of a turn; 0 for one call.

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
    """The conditions that times depend on, without names of machines."""
    processor = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    return {"torch": torch.__version__, "machine": torch.cuda.get_device_name() if device.startswith("cuda") else processor}
