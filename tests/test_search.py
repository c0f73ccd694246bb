"""Search for widths: seeded, cached, within the budget, with fresh statistics, and better than chance."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thriftnet as tn
from laws import output
from networks import NETWORKS, perturb
from thriftnet.core.history import history
from thriftnet.dynamic.search import Candidate, Evolution, SearchResult, search

WIDTHS = (0.5, 1.0)
SIZE = (3, 8, 8)
GROUPS = 5  # of the chain: the stem and four layers


@pytest.fixture(scope="module")
def supernet() -> nn.Module:
    return perturb(tn.convert(NETWORKS["chain"].make(), tn.Slimmable(widths=WIDTHS))).eval()


def late_is_better(network: nn.Module) -> float:
    """A score whose best network is known: channels count more the later they are."""
    return float(sum((place + 1) * conv.out_channels for place, conv in enumerate(network.convs)))


def run(model: nn.Module, **kwargs: Any) -> SearchResult:
    arguments = {"macs": 100_000, "input_size": SIZE, "evolution": Evolution(population=5, generations=5), **kwargs}
    return search(model, arguments.pop("score", late_is_better), **arguments)


@pytest.fixture(scope="module")
def recorded(supernet: nn.Module) -> tuple[SearchResult, list[nn.Module], list[tuple[int, Candidate]]]:
    """A search, the networks that it scored, and what it told of its progress."""
    scored: list[nn.Module] = []
    told: list[tuple[int, Candidate]] = []

    def score(network: nn.Module) -> float:
        scored.append(network)
        return late_is_better(network)

    return run(supernet, score=score, progress=lambda *latest: told.append(latest)), scored, told


@pytest.fixture
def found(recorded: tuple[SearchResult, Any, Any]) -> SearchResult:
    return recorded[0]


def test_it_finds_the_best_of_all(supernet: nn.Module, found: SearchResult) -> None:
    best = -1.0
    for genes in itertools.product(WIDTHS, repeat=GROUPS):
        names = zip(["stem", *(f"convs.{place}" for place in range(4))], genes, strict=True)
        network = tn.freeze(supernet, dict(names), input_size=SIZE)
        if tn.inspect(network, SIZE).macs <= 100_000:
            best = max(best, late_is_better(network))
    assert found.best.score == best
    assert len(found.candidates) <= 2**GROUPS
    assert found.best == found.candidates[0]
    assert late_is_better(found.model) == best
    assert tn.inspect(found.model, SIZE).macs == found.best.macs <= 100_000


def test_the_result_is_what_its_widths_say(supernet: nn.Module, found: SearchResult, tmp_path: Path) -> None:
    x = NETWORKS["chain"].image()
    again = tn.freeze(supernet, found.best.widths, input_size=SIZE)
    assert torch.equal(output(found.model, x), output(again, x))
    assert not any(type(module).__module__.startswith("thriftnet") for module in found.model.modules())
    assert history(found.model)[-1]["verb"] == "freeze"
    tn.save(found.model, tmp_path / "model")
    loaded = tn.load(tmp_path / "model", model=NETWORKS["chain"].make())
    assert torch.equal(output(loaded, x), output(found.model, x))


def test_every_candidate_is_tried_once_and_within_the_budget(recorded: tuple[SearchResult, Any, Any]) -> None:
    found, calls, seen = recorded
    assert len(calls) == len(found.candidates) == len({candidate.widths for candidate in found.candidates})
    assert [count for count, _ in seen] == list(range(1, len(calls) + 1))
    assert sorted(c.widths for _, c in seen) == sorted(c.widths for c in found.candidates)
    assert all(candidate.macs <= 100_000 for candidate in found.candidates)
    assert [c.score for c in found.candidates] == sorted((c.score for c in found.candidates), reverse=True)
    assert found.to_dict()["best"]["macs"] == found.best.macs
    assert str(found.best.macs) in str(found).replace(",", "")


def test_the_seed_decides(supernet: nn.Module) -> None:
    state = torch.get_rng_state()
    orders = []
    for seed in (0, 0, 1):
        order: list[tuple[Any, ...]] = []
        how = Evolution(population=4, generations=2, seed=seed)
        run(supernet, evolution=how, progress=lambda _, candidate, order=order: order.append(candidate.widths))
        orders.append(order)
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_candidates_get_statistics_of_their_own(supernet: nn.Module) -> None:
    before = {key: value.clone() for key, value in supernet.state_dict().items()}
    batches = [NETWORKS["chain"].image(seed) for seed in range(2)]
    found = run(supernet, loader=iter(batches), evolution=Evolution(population=3, generations=1))
    by_hand = tn.freeze(supernet, found.best.widths, input_size=SIZE)
    tn.recalibrate(by_hand, batches)
    assert torch.equal(found.model.norms[2].running_mean, by_hand.norms[2].running_mean)
    assert found.model.norms[2].num_batches_tracked == 2
    assert all(torch.equal(value, before[key]) for key, value in supernet.state_dict().items())


def test_stages_of_ds_net_are_searched() -> None:
    stages = [((8, 12), 1, 3, 1, "ds", False), ((12, 16, 24), 1, 3, 2, "ds", True), ((16, 20, 32), 1, 3, 2, "ds", False)]
    model = tn.create_model("dsnet", stem=(8, 12), stages=stages, num_classes=5).eval()
    budget = tn.inspect(tn.freeze(model, index=1), (3, 32, 32)).macs
    found = search(
        model,
        lambda network: network.fc.in_features,
        macs=budget,
        input_size=(3, 32, 32),
        evolution=Evolution(population=6, generations=4),
    )
    assert found.parts == [("stem",), ("stages.0",), ("stages.1",), ("stages.2",)]
    assert found.best.score == 32
    assert {candidate.widths[0] for candidate in found.candidates} <= {"0", "largest"}


def test_what_is_refused(supernet: nn.Module) -> None:
    with pytest.raises(
        tn.ConfigError, match=r"a budget of 100 multiply-accumulates is out of reach: expected [\d,]+ to [\d,]+"
    ):
        run(supernet, macs=100)
    with pytest.raises(tn.IncompatibleModelError, match=r"Chain has one width only: search needs a supernet"):
        run(NETWORKS["chain"].make())
    for fields, message in (
        ({"population": 1}, "population=1"),
        ({"generations": -1}, "generations=-1"),
        ({"mutation": 0}, r"mutation=0: expected a number in \(0, 1\]"),
    ):
        with pytest.raises(tn.ConfigError, match=message):
            Evolution(**fields)


def test_a_budget_that_all_meet_gives_the_widest(supernet: nn.Module) -> None:
    found = run(supernet, macs=1e9, evolution=Evolution(population=3, generations=1))
    assert found.best.widths[1:] == (1.0,) * (GROUPS - 1)
