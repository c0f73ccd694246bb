"""Timing forms of one computation against each other, so that their ratios can be trusted.

All forms of a case are first checked to give the same numbers. Then each has its turn once per round, in an order drawn anew for
each round, since what ran before a form decides how much memory it finds warm. A turn is one call or, of a form that takes
less than 20 ms, as many as take that long, of which the mean counts. A ratio is the median over the rounds of
(time of one form / time of the other in that round), with the quartiles beside it. On a CPU, times are CPU times of this
process, so that other processes disturb them little; on a GPU they are taken between two events. Absolute times depend
on the machine and on what else it does.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from thriftnet.errors import ThriftnetError

Run = Callable[[], object]

SHORT, REPEATS = 2e-3, 20  # seconds of a call on a GPU below which so many are timed together
TURN, MOST = 20e-3, 50  # seconds that a form's turn on a CPU takes at least, and calls that it has at most


class UnequalError(ThriftnetError):
    """Two forms of a case do not compute the same, so that timing them would prove nothing."""


@dataclass(frozen=True)
class Settings:
    """How a benchmark is run.

    Args:
        quick: Small sizes and few rounds: shows that everything runs, and proves nothing.
        device: Where.
        sweep: Time against size, for the pictures, in place of the targets.
    """

    quick: bool = False
    device: str = "cpu"
    sweep: bool = False

    def rounds(self, full: int) -> int:
        """Rounds of a case that takes ``full`` of them."""
        return min(3, full) if self.quick else full


@dataclass(frozen=True)
class Target:
    """What a ratio should be.

    Args:
        id: As in the project's list of targets: "P1", ...
        what: The ratio, in words.
        bound: The number.
        kind: "at most" or "at least".
    """

    id: str
    what: str
    bound: float
    kind: str = "at most"

    def is_met(self, value: float) -> bool:
        """Whether a measured ratio is on the right side of the bound."""
        return value <= self.bound if self.kind == "at most" else value >= self.bound

    def __str__(self) -> str:
        return f"{self.id} {'<=' if self.kind == 'at most' else '>='} {self.bound:g}"


@dataclass(frozen=True)
class Ratio:
    """Which two forms are compared.

    Args:
        of, to: Names of forms; the ratio is time of the one to time of the other.
        target: What it should be, if anything.
        condition: What the target holds under, where it does not hold everywhere: "mallopt" or "no mallopt".
    """

    of: str
    to: str
    target: Target | None = None
    condition: str = ""


@dataclass(frozen=True)
class Case:
    """Forms that are timed side by side.

    Args:
        topic: Its topic.
        name: What is measured: operation, sizes, layout.
        forms: Functions without arguments; what they return is checked for equality and then dropped.
        ratios: What is compared.
        rounds: How often each form runs.
        apart: Forms that compute something else by nature, as a floor does: left out of the check.
        tolerance: Largest difference relative to the largest entry; 0 asks for equal bits.
        size: For a sweep: the number that varies.
    """

    topic: str
    name: str
    forms: Mapping[str, Run]
    ratios: Sequence[Ratio]
    rounds: int = 25
    apart: frozenset[str] = frozenset()
    tolerance: float = 0.0
    size: float | None = None


@dataclass(frozen=True)
class Fact:
    """A ratio that is no ratio of times, as of two file sizes.

    Args:
        topic, name: As of a case.
        value: The ratio.
        target: What it should be.
    """

    topic: str
    name: str
    value: float
    target: Target | None = None


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


@dataclass(frozen=True)
class Measured:
    """What a case gave.

    Args:
        case: The case.
        ms: Time of each form, in milliseconds.
        ratios: Value of each of the case's ratios.
    """

    topic: str
    name: str
    ms: dict[str, Spread]
    ratios: list[tuple[Ratio, Spread]] = field(default_factory=list)
    size: float | None = None


def measure(case: Case, settings: Settings) -> Measured:
    """Check the forms of a case, then time them.

    Raises:
        UnequalError: Two forms give different numbers.
    """
    check_equal(case)
    gpu = settings.device.startswith("cuda")
    seconds: dict[str, list[float]] = {name: [] for name in case.forms}
    order = random.Random(0)
    warm = {name: cpu_seconds(run) for name, run in case.forms.items()}  # the second time, after the check
    calls = {name: max(1, min(MOST, math.ceil(TURN / max(spent, 1e-6)))) for name, spent in warm.items()}
    for _ in range(settings.rounds(case.rounds)):
        for name in order.sample(list(case.forms), len(case.forms)):
            run = case.forms[name]
            seconds[name].append(gpu_seconds(run) if gpu else cpu_seconds(run, 1 if settings.quick else calls[name]))
    ratios = [
        (ratio, Spread.of([a / b for a, b in zip(seconds[ratio.of], seconds[ratio.to], strict=True)]))
        for ratio in case.ratios
    ]
    spreads = {name: Spread.of([1e3 * s for s in spent]) for name, spent in seconds.items()}
    return Measured(case.topic, case.name, spreads, ratios, case.size)


def check_equal(case: Case) -> None:
    """Raise unless all forms that should give the same numbers do."""
    wanted: list[Tensor] | None = None
    first = ""
    for name, run in case.forms.items():
        if name in case.apart:
            continue
        got = [leaf.detach().clone() for leaf in tree_leaves(run()) if isinstance(leaf, Tensor)]
        if wanted is None:
            wanted, first = got, name
            continue
        for number, (one, other) in enumerate(zip(got, wanted, strict=True)):
            error = difference(one, other)
            if not error <= case.tolerance:
                raise UnequalError(
                    f"{case.topic}, {case.name}: {name!r} and {first!r} differ in result {number} by {error:.1e} of the "
                    f"largest entry, allowed is {case.tolerance:.0e}; nothing was timed"
                )


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    if one.shape != other.shape:
        return float("inf")
    largest = max(other.abs().max().item(), 1e-30)
    return float((one.double() - other.double()).abs().max().item()) / largest


def cpu_seconds(run: Run, calls: int = 1) -> float:
    """CPU time of one call, as the mean of several; what they return is freed within."""
    start = time.process_time()
    for _ in range(calls):
        run()
    return (time.process_time() - start) / calls


def gpu_seconds(run: Run) -> float:
    """Time of one call on the GPU, between two events; of short ones several, so that launching them is hidden."""
    once = _gpu_seconds(run, 1)
    return once if once > SHORT else _gpu_seconds(run, REPEATS)


def _gpu_seconds(run: Run, repeats: int) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    for _ in range(repeats):
        run()
    stop.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(stop)) / 1e3 / repeats
