"""Timing variants of one computation against each other, by `thriftnet.measure.latency`.

All variants of a case are first checked to give the same numbers. On a CPU, times are CPU times of this process, so that other
processes disturb them little. Absolute times depend on the machine and on what else it does; ratios are what counts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.utils._pytree import tree_leaves

from thriftnet.errors import ThriftnetError
from thriftnet.measure.latency import TURN, Run, Spread, time_rounds


class UnequalError(ThriftnetError):
    """Two variants of a case do not compute the same, so that timing them would prove nothing."""


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
    """Which two variants are compared.

    Args:
        of, to: Names of variants; the ratio is time of the one to time of the other.
        target: What it should be, if anything.
        condition: What the target holds under, where it does not hold everywhere: "mallopt" or "no mallopt".
    """

    of: str
    to: str
    target: Target | None = None
    condition: str = ""


@dataclass(frozen=True)
class Case:
    """Variants that are timed side by side.

    Args:
        topic: Its topic.
        name: What is measured: operation, sizes, layout.
        variants: Functions without arguments; what they return is checked for equality and then dropped.
        ratios: What is compared.
        rounds: How often each variant runs.
        apart: Variants that compute something else by nature, as a floor does: left out of the check.
        tolerance: Largest difference relative to the largest entry; 0 asks for equal bits.
        size: For a sweep: the number that varies.
    """

    topic: str
    name: str
    variants: Mapping[str, Run]
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
class Measured:
    """What a case gave.

    Args:
        case: The case.
        ms: Time of each variant, in milliseconds.
        ratios: Value of each of the case's ratios.
    """

    topic: str
    name: str
    ms: dict[str, Spread]
    ratios: list[tuple[Ratio, Spread]] = field(default_factory=list)
    size: float | None = None


def measure(case: Case, settings: Settings) -> Measured:
    """Check the variants of a case, then time them.

    Raises:
        UnequalError: Two variants give different numbers.
    """
    check_equal(case)
    rounds, turn = settings.rounds(case.rounds), 0.0 if settings.quick else TURN
    seconds = time_rounds(case.variants, rounds, device=settings.device, clock=time.process_time, turn=turn)
    ratios = [(ratio, Spread.of_ratios(seconds[ratio.of], seconds[ratio.to])) for ratio in case.ratios]
    spreads = {name: Spread.of([1e3 * s for s in spent]) for name, spent in seconds.items()}
    return Measured(case.topic, case.name, spreads, ratios, case.size)


def check_equal(case: Case) -> None:
    """Raise unless all variants that should give the same numbers do."""
    wanted: list[Tensor] | None = None
    first = ""
    for name, run in case.variants.items():
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
