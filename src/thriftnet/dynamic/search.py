"""The best widths of a trained supernet within a budget, without a gate and without training: an evolutionary search.

A candidate has a width for each part of the network that can have its own. It is taken out of the supernet as a plain network,
gets its norms' statistics from data, and is scored.

Source: Cai et al., Once-for-All, ICLR 2020, section 3.4 (evolutionary search in a supernet); Yu & Huang, AutoSlim, 2019 (widths).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from thriftnet.core.fold import freeze
from thriftnet.core.probe import input_size as size_of
from thriftnet.core.probe import on_meta
from thriftnet.core.recalibrate import recalibrate
from thriftnet.core.spec import check_whole_number
from thriftnet.core.width import Width, widths
from thriftnet.core.width_slots import groups, width_slots
from thriftnet.errors import ConfigError, IncompatibleModelError
from thriftnet.measure import inspect
from thriftnet.text import table

TRIES = 200  # to draw a candidate within the budget
Genes = tuple[int, ...]  # a position in the list of widths for each part


@dataclass(frozen=True)
class Candidate:
    """A network that was tried.

    Args:
        widths: Of each part, as `freeze` takes them.
        macs: Multiply-accumulates for one image.
        score: What the caller's function says, the higher the better.
    """

    widths: tuple[Width, ...]
    macs: int
    score: float


@dataclass
class SearchResult:
    """What a search found. Prints as a table, best first.

    Args:
        model: The best candidate, a plain network with fresh statistics.
        best: It in the table.
        candidates: All that were tried, best first.
        parts: The layers of each part.
    """

    model: nn.Module
    best: Candidate
    candidates: list[Candidate]
    parts: list[tuple[str, ...]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "best": asdict(self.best),
            "candidates": [asdict(c) for c in self.candidates],
            "parts": [list(p) for p in self.parts],
        }

    def __str__(self) -> str:
        rows = [[f"{c.score:.4f}", c.macs, " ".join(map(str, c.widths))] for c in self.candidates]
        return table(["score", "MACs", "widths"], rows)


@dataclass(frozen=True)
class Evolution:
    """How to search.

    Args:
        population: Candidates that are kept from one generation to the next.
        generations: How often new ones are made; 0 tries random ones only.
        mutation: Probability of each part to get another width.
        seed: Of all draws.
    """

    population: int = 16
    generations: int = 8
    mutation: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole_number("population", self.population, 2)
        check_whole_number("generations", self.generations, 0)
        if not isinstance(self.mutation, int | float) or not 0 < self.mutation <= 1:
            raise ConfigError(f"mutation={self.mutation!r}: possible is a number in (0, 1]")


def search(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    *,
    macs: float,
    loader: Iterable[Any] | None = None,
    evolution: Evolution | None = None,
    input_size: Sequence[int] | None = None,
    progress: Callable[[int, Candidate], None] | None = None,
) -> SearchResult:
    """The best widths of a trained supernet that cost at most ``macs``.

    Args:
        model: A network of several widths; it is left as it is.
        score: What a plain network is worth, as its accuracy on images that it was not trained on. Called once per candidate.
        macs: Multiply-accumulates that one image may cost.
        loader: Batches for the norms' statistics of each candidate, gone through once for each. Left out, the supernet's are used.
        evolution: How to search.
        input_size: Channels, height and width of an image; left out, as the network says.
        progress: Called with the number of candidates tried and the latest.

    Raises:
        IncompatibleModelError: The network has one width only.
        ConfigError: A budget that no candidate meets, or that all meet; the message says the range.
    """
    run = _Search(model, score, float(macs), loader, evolution or Evolution(), size_of(model, input_size), progress)
    return run.result()


class _Search:
    def __init__(
        self,
        model: nn.Module,
        score: Callable[[nn.Module], float],
        macs: float,
        loader: Iterable[Any] | None,
        how: Evolution,
        size: tuple[int, int, int],
        progress: Callable[[int, Candidate], None] | None,
    ) -> None:
        if not widths(model):
            raise IncompatibleModelError(
                f"{type(model).__name__} has one width only: search needs a supernet, see Slimmable"
            )
        self.model, self.score, self.macs, self.how, self.size, self.progress = model, score, macs, how, size, progress
        self.batches = None if loader is None else list(loader)
        self.parts = groups(model, size)
        channels = width_slots(model)
        self.choices = [_distinct([channels[name] for name in part]) for part in self.parts]
        self.ghost = on_meta(model)  # counting needs shapes only
        self.random = random.Random(how.seed)
        self.costs: dict[Genes, int] = {}
        self.tried: dict[Genes, Candidate] = {}
        self.best: tuple[tuple[float, int], nn.Module] | None = None

    def result(self) -> SearchResult:
        self._check_budget()
        population = self._first_ones()
        for _ in range(self.how.generations):
            children = [self._child(population) for _ in range(self.how.population)]
            population = self._fittest({*population, *(child for child in children if child is not None)})
        ranked = sorted(self.tried.values(), key=lambda c: (-c.score, c.macs))
        if self.best is None:
            raise IncompatibleModelError("no candidate was tried")
        return SearchResult(self.best[1], ranked[0], ranked, self.parts)

    def _check_budget(self) -> None:
        least, most = (self._cost(tuple(choice[end] for choice in self.choices)) for end in (0, -1))
        if not least <= self.macs:
            raise ConfigError(
                f"a budget of {self.macs:,.0f} multiply-accumulates is out of reach: possible are {least:,} to {most:,}"
            )

    def _first_ones(self) -> list[Genes]:
        """The uniform networks within the budget, and random ones."""
        first: dict[Genes, None] = {}
        for place in range(max(map(len, self.choices))):
            first[tuple(choice[min(place, len(choice) - 1)] for choice in self.choices)] = None
        fitting = [genes for genes in first if self._cost(genes) <= self.macs][-self.how.population :]
        for _ in range(TRIES):
            if len(fitting) >= self.how.population:
                break
            genes = self._within(tuple(self.random.choice(choice) for choice in self.choices))
            fitting += [genes] if genes not in fitting else []
        return self._fittest(set(fitting))

    def _child(self, parents: list[Genes]) -> Genes | None:
        """A mix of two parents, mutated, within the budget and not tried before; None where none is found."""
        for _ in range(TRIES):
            one, other = self.random.choice(parents), self.random.choice(parents)
            mixed = [self.random.choice(pair) for pair in zip(one, other, strict=True)]
            for place, choice in enumerate(self.choices):
                if self.random.random() < self.how.mutation:
                    mixed[place] = self.random.choice(choice)
            genes = self._within(tuple(mixed))
            if genes not in self.tried:
                self._try(genes)
                return genes
        return None

    def _within(self, genes: Genes) -> Genes:
        """Narrow parts, drawn at random, until the budget is met."""
        while self._cost(genes) > self.macs:
            wide = [place for place, choice in enumerate(self.choices) if genes[place] != choice[0]]
            place = self.random.choice(wide)
            choice = self.choices[place]
            genes = (*genes[:place], choice[choice.index(genes[place]) - 1], *genes[place + 1 :])
        return genes

    def _fittest(self, pool: set[Genes]) -> list[Genes]:
        for genes in sorted(pool):
            self._try(genes)
        return sorted(pool, key=lambda genes: (-self.tried[genes].score, genes))[: self.how.population]

    def _frozen(self, genes: Genes) -> nn.Module:
        return self._taken_out(self.model, genes)

    def _taken_out(self, model: nn.Module, genes: Genes) -> nn.Module:
        chosen = {
            f"^{re.escape(name)}$": self._widths[i] for part, i in zip(self.parts, genes, strict=True) for name in part
        }
        return freeze(model, chosen, input_size=self.size)

    @property
    def _widths(self) -> list[Width]:
        return list(widths(self.model))

    def _cost(self, genes: Genes) -> int:
        if genes not in self.costs:
            self.costs[genes] = inspect(self._taken_out(self.ghost, genes), self.size).macs
        return self.costs[genes]

    def _try(self, genes: Genes) -> None:
        if genes in self.tried:
            return
        network = self._frozen(genes)
        if self.batches is not None:
            recalibrate(network, self.batches)
        score = float(self.score(network))
        candidate = Candidate(tuple(self._widths[place] for place in genes), self._cost(genes), score)
        self.tried[genes] = candidate
        rank = (score, -candidate.macs)
        if self.best is None or rank > self.best[0]:
            self.best = (rank, network)
        if self.progress is not None:
            self.progress(len(self.tried), candidate)


def _distinct(channels: list[list[int]]) -> list[int]:
    """Positions of widths that differ in some layer of a part, narrowest first."""
    seen: dict[tuple[int, ...], int] = {}
    for position, each in enumerate(zip(*channels, strict=True)):
        seen.setdefault(each, position)
    return [seen[each] for each in sorted(seen)]
