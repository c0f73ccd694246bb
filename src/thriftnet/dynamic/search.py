"""The best widths of a trained supernet within a budget, without a gate and without training: an evolutionary search.

A candidate has a width for each part of the network that can have its own. It is frozen as a plain network, its batch-norm
statistics are estimated from data, and it is scored.

Source: Cai et al., Once-for-All, ICLR 2020, section 3.4 (evolutionary search in a supernet); Yu & Huang, AutoSlim, 2019 (widths).
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from thriftnet.arguments import InputSize, Natural, Operations, Population, PositiveShare, Seed, checked
from thriftnet.core.fold import freeze
from thriftnet.core.probe import Size, on_meta
from thriftnet.core.probe import input_size as size_of
from thriftnet.core.recalibrate import recalibrate
from thriftnet.core.width import Width, widths
from thriftnet.core.width_slots import groups, width_slots
from thriftnet.dynamic.gate import check_budget
from thriftnet.errors import IncompatibleModelError
from thriftnet.measure import inspect
from thriftnet.text import table

TRIES = 200  # attempts to draw a new candidate within the budget
Genes = tuple[int, ...]  # for each part, an index into the widths of the network


@dataclass(frozen=True)
class Candidate:
    """A network that was tried.

    Args:
        widths: Of each part, as `freeze` takes them.
        macs: Multiply-accumulates for one image.
        score: From the caller's function, the higher the better.
    """

    widths: tuple[Width, ...]
    macs: int
    score: float


@dataclass
class SearchResult:
    """The result of a search. Prints as a table, best first.

    Args:
        model: The best candidate, a plain network with its own batch-norm statistics.
        best: Its row in the table.
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


@checked
@dataclass(frozen=True)
class Evolution:
    """How to search.

    Args:
        population: Candidates kept from one generation to the next.
        generations: Number of generations; with 0 only random candidates are tried.
        mutation: Probability that a part of a child gets a random width.
        seed: Of all draws.
    """

    population: Population = 16
    generations: Natural = 8
    mutation: PositiveShare = 0.2
    seed: Seed = 0


@checked
def search(
    model: nn.Module,
    score: Callable[[nn.Module], float],
    *,
    macs: Operations,
    loader: Iterable[Any] | None = None,
    evolution: Evolution | None = None,
    input_size: InputSize | None = None,
    progress: Callable[[int, Candidate], None] | None = None,
) -> SearchResult:
    """The best widths of a trained supernet that cost at most ``macs``.

    Args:
        model: A slimmable network; it is not changed.
        score: Rates a plain network, as its accuracy on images that it was not trained on. Called once per candidate.
        macs: Multiply-accumulates for one image, at most.
        loader: Batches for the batch-norm statistics of candidates, read once. Default: they keep the supernet's.
        evolution: How to search.
        input_size: Channels, height and width of an image. Default: the size the network states.
        progress: Called with the number of candidates tried and the latest.

    Raises:
        IncompatibleModelError: The network has one width only, or layers that cannot have a width of their own.
        ConfigError: A budget that no candidate meets; the message says the range.
    """
    batches = None if loader is None else list(loader)
    return _Search(model, score, float(macs), batches, evolution or Evolution(), size_of(model, input_size), progress).run()


@dataclass(eq=False)
class _Search:
    """The state of a search; its fields are the arguments of `search`."""

    model: nn.Module
    score: Callable[[nn.Module], float]
    macs: float
    batches: list[Any] | None
    options: Evolution
    size: Size
    progress: Callable[[int, Candidate], None] | None

    def __post_init__(self) -> None:
        self.widths = widths(self.model)
        if not self.widths:
            raise IncompatibleModelError(
                f"{type(self.model).__name__} has one width only: search needs a supernet, see Slimmable"
            )
        self.random = random.Random(self.options.seed)
        self.parts = groups(self.model, self.size)
        channels = width_slots(self.model)
        self.choices = [_distinct([channels[name] for name in part]) for part in self.parts]
        self.ghost = on_meta(self.model)  # counting needs shapes only
        self.costs: dict[Genes, int] = {}
        self.tried: dict[Genes, Candidate] = {}
        self.best: tuple[tuple[float, int], nn.Module] | None = None

    def run(self) -> SearchResult:
        least, most = (self._cost(tuple(choice[end] for choice in self.choices)) for end in (0, -1))
        check_budget(self.macs, least, max(most, self.macs))
        population = self._first_population()
        for _ in range(self.options.generations):
            children = [self._child(population) for _ in range(self.options.population)]
            population = self._fittest({*population, *(child for child in children if child is not None)})
        ranked = sorted(self.tried.values(), key=lambda c: (-c.score, c.macs))
        if self.best is None:
            raise IncompatibleModelError("no candidate was tried")
        return SearchResult(self.best[1], ranked[0], ranked, self.parts)

    def _first_population(self) -> list[Genes]:
        """The uniform networks within the budget, and random ones."""
        longest = range(max(map(len, self.choices)))
        uniform = [tuple(choice[min(index, len(choice) - 1)] for choice in self.choices) for index in longest]
        fitting = [genes for genes in uniform if self._cost(genes) <= self.macs][-self.options.population :]
        for _ in range(TRIES):
            if len(fitting) >= self.options.population:
                break
            genes = self._within_budget(tuple(self.random.choice(choice) for choice in self.choices))
            fitting += [genes] if genes not in fitting else []
        return self._fittest(set(fitting))

    def _child(self, parents: list[Genes]) -> Genes | None:
        """A new mix of two parents, mutated, within the budget; None if none is found."""
        for _ in range(TRIES):
            one, other = self.random.choice(parents), self.random.choice(parents)
            mixed = [self.random.choice(pair) for pair in zip(one, other, strict=True)]
            for part, choice in enumerate(self.choices):
                if self.random.random() < self.options.mutation:
                    mixed[part] = self.random.choice(choice)
            genes = self._within_budget(tuple(mixed))
            if genes not in self.tried:
                self._try(genes)
                return genes
        return None

    def _within_budget(self, genes: Genes) -> Genes:
        """Narrow random parts until the budget is met."""
        while self._cost(genes) > self.macs:
            part = self.random.choice([part for part, choice in enumerate(self.choices) if genes[part] != choice[0]])
            choice = self.choices[part]
            genes = (*genes[:part], choice[choice.index(genes[part]) - 1], *genes[part + 1 :])
        return genes

    def _fittest(self, pool: set[Genes]) -> list[Genes]:
        for genes in sorted(pool):
            self._try(genes)
        return sorted(pool, key=lambda genes: (-self.tried[genes].score, genes))[: self.options.population]

    def _frozen(self, model: nn.Module, genes: Genes) -> nn.Module:
        chosen = {f"^{re.escape(name)}$": self.widths[i] for part, i in zip(self.parts, genes, strict=True) for name in part}
        return freeze(model, chosen, input_size=self.size)

    def _cost(self, genes: Genes) -> int:
        if genes not in self.costs:
            self.costs[genes] = inspect(self._frozen(self.ghost, genes), self.size).macs
        return self.costs[genes]

    def _try(self, genes: Genes) -> None:
        if genes in self.tried:
            return
        network = self._frozen(self.model, genes)
        if self.batches is not None:
            recalibrate(network, self.batches)
        score = float(self.score(network))
        candidate = Candidate(tuple(self.widths[index] for index in genes), self._cost(genes), score)
        self.tried[genes] = candidate
        rank = (score, -candidate.macs)
        if self.best is None or rank > self.best[0]:
            self.best = (rank, network)
        if self.progress is not None:
            self.progress(len(self.tried), candidate)


def _distinct(channels: list[list[int]]) -> list[int]:
    """Indices of widths that differ in some layer of a part, narrowest first."""
    seen: dict[tuple[int, ...], int] = {}
    for index, of_layers in enumerate(zip(*channels, strict=True)):
        seen.setdefault(of_layers, index)
    return [seen[of_layers] for of_layers in sorted(seen)]
