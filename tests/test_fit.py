"""Fitting to data: new layers give nearly the outputs of the old ones, and nothing else changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import thriftnet as tn
from laws import output
from networks import Residual, randomise_norms
from thriftnet.core import fit
from thriftnet.core.history import history
from thriftnet.core.plan import Plan
from thriftnet.techniques.filter_basis import SharedBasis, orthonormalise

CONFIGS = [
    "weight-sharing",
    "weight-sharing(fusion='channel_weighted_mean')",
    "soft-sharing(templates=2)",
    "filter-basis(shared_rank=8, unique_rank=2)",
    "filter-basis(shared_rank=6, unique_rank=2, bases=2)",
    "low-rank(rank=6)",
    "low-rank(rank=6, form='channel')",
    "shift(expansion=3.0)",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer iterations: the fits are coarser, and the tests quicker."""
    monkeypatch.setattr(fit, "ITERATIONS", 20)


def images(count: int = 96, side: int = 8, seed: int = 0) -> Tensor:
    """Smooth images, as real ones are: neighbours are alike."""
    small = torch.randn(count, 3, side // 2, side // 2, generator=torch.Generator().manual_seed(seed))
    return nn.functional.interpolate(small, scale_factor=2, mode="bilinear")


class Unnormalised(nn.Module):
    """Convolutions with bias and linear layers, without norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.body = nn.Sequential(*(nn.Conv2d(12, 12, 3, padding=1) for _ in range(4)))
        self.mix = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        for conv in self.body:
            x = x + conv(x).relu()
        x = x.mean((2, 3))
        for linear in self.mix:
            x = linear(x).relu()
        return self.head(x)


def plain(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "unnormalised":
        return Unnormalised().eval()
    network = randomise_norms(Residual())
    tn.recalibrate(network, [images()])
    return network.eval()


@torch.no_grad()
def error(model: nn.Module, network: nn.Module) -> float:
    """Of the outputs for images that no fit has seen, in units of how much they differ from each other."""
    x = images(64, seed=9)
    right, got = network.eval()(x), model.eval()(x)
    return float((got - right).norm() / (right - right.mean(0)).norm())


@pytest.mark.parametrize("kind", ["normalised", "unnormalised"])
@pytest.mark.parametrize("config", CONFIGS)
def test_a_fit_brings_outputs_nearer_and_leaves_the_plain_network_alone(config: str, kind: str) -> None:
    network = plain(kind)
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    data = [(images(64), None), images(64, seed=1)]
    converted = tn.convert(network, config)
    after = torch.get_rng_state()
    if kind == "normalised":
        tn.recalibrate(converted, data)
    torch.set_rng_state(state)
    fitted = tn.convert(network, config, data=data)
    assert error(fitted, network) < 0.95 * error(converted, network)
    assert torch.equal(torch.get_rng_state(), after)
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())
    assert not [p for p in fitted.parameters() if p.grad is not None or not p.requires_grad]
    again = tn.convert(network, config, data=data)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in fitted.state_dict().items())
    assert history(fitted)[-1]["fitted_on"] == 128


def test_statistics_that_differ_from_the_data_s_stay_different() -> None:
    """A network may have been trained on other images: what its norms made of these must not change."""
    network = randomise_norms(plain("normalised"), seed=5)
    for config in ("soft-sharing(templates=1.0)", "low-rank(rank=1.0)", "filter-basis(shared_rank=1.0, unique_rank=1.0)"):
        fitted = tn.convert(network, config, data=[images()])
        assert error(fitted, network) < 1e-3


def test_norms_inside_new_layers_get_the_statistics_of_data_at_the_same_function() -> None:
    network = plain("normalised")
    fitted = tn.convert(network, "filter-basis(shared_rank=1.0, unique_rank=1.0)", data=[images()])
    norms = [module for name, module in fitted.named_modules() if name.endswith(".norm")]
    assert norms
    assert all(float(norm.running_var.std()) > 0.01 and float(norm.running_mean.abs().max()) > 0.01 for norm in norms)  # type: ignore[arg-type,operator,union-attr]
    assert error(fitted, network) < 1e-3
    fitted.train()
    with torch.no_grad():
        x = images()
        assert (
            float((fitted(x) - network(x)).norm() / network(x).norm()) < 0.1
        )  # statistics of the batch do not change it either


@pytest.mark.parametrize(
    "config", ["filter-basis(shared_rank=6, unique_rank=3)", "filter-basis(shared_rank=0, unique_rank=9)"]
)
def test_orthonormal_bases_compute_the_same(config: str) -> None:
    converted = tn.convert(plain("unnormalised").double(), config)
    x = images(4).double()
    banks = [module for module in converted.modules() if isinstance(module, SharedBasis)]
    with torch.no_grad():
        for bank in banks:
            for parameter in bank.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    before = output(converted, x)
    assert tn.penalty(converted, scaled=False) > 1e-3 or "shared_rank=0" in config
    for bank in banks:
        layers = [
            m for m in converted.modules() if isinstance(m, tn.BasisConv2d | tn.BasisLinear) and m.filters.bank is bank
        ]
        orthonormalise(layers)
        for layer in layers:
            filters = layer.filters.weight.flatten(1)
            assert torch.allclose(filters @ filters.T, torch.eye(len(filters)).double(), atol=1e-9)
    assert torch.allclose(output(converted, x), before, rtol=1e-9)
    assert tn.penalty(converted, scaled=False) < 1e-12


def test_chained_plans_are_fitted_one_after_the_other() -> None:
    network = plain("unnormalised")
    pair = tn.plan(network, "shift(expansion=2.0)", data=[images()], input_size=(3, 8, 8))
    assert pair.rows[0].output_error is not None
    both = Plan.from_dict({**pair.to_dict(), "then": tn.plan(tn.convert(network, pair), "weight-sharing").to_dict()})
    fitted = tn.convert(network, both, data=[images()])
    assert [step.get("fitted_on") for step in history(fitted)] == [96, 96]
    assert error(fitted, network) < 0.8 * error(tn.convert(network, both), network)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "without images"),
        (["text"], "needs batches of tensors"),
        ([torch.zeros(2, 3, 8, 8), torch.zeros(2, 3, 9, 8)], "images of one size"),
        ([torch.zeros(2, 4, 8, 8)], "does not run on the images given, of 4 x 8 x 8"),
        ([torch.full((2, 3, 8, 8), torch.nan)], "NaN"),
    ],
)
def test_data_that_cannot_be_used_leaves_the_network_as_it_was(data: list[Any], message: str) -> None:
    network = plain("normalised")
    before, names = copy.deepcopy(network.state_dict()), dict(network.named_modules())
    with pytest.raises(tn.DataError, match=message):
        tn.convert(network, "low-rank", data=data, inplace=True)
    assert dict(network.named_modules()) == names
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in before.items())


def test_what_has_nothing_to_fit_is_converted_as_without_data() -> None:
    network = plain("normalised")
    slim = tn.convert(network, tn.Slimmable(widths=(0.5, 1.0)), data=[images()])
    tn.set_width(slim, "largest")
    assert error(slim, network) < 1e-3
    narrow = tn.freeze(slim, "smallest")
    tn.recalibrate(slim, [images()], "smallest")
    assert error(narrow, tn.freeze(slim, "smallest")) < 1e-3  # narrower widths were recalibrated
