"""The forms that speed is measured against compute what the library does: otherwise a ratio of times says nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from benchmarks import baselines
from torch import Tensor, nn

import thriftnet as tn
from laws import assert_close
from networks import NETWORKS, perturb
from thriftnet.techniques.filter_basis import SharedBasis


def gradients(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output, and gradient of the input."""
    x = x.clone().requires_grad_()
    out = model(x)
    return out.detach(), torch.autograd.grad(out.square().sum(), x)[0]


@pytest.mark.parametrize("kernel_size", [3, 5])
@pytest.mark.parametrize("channels", [4, 9, 30])
def test_shifts(channels: int, kernel_size: int) -> None:
    x = torch.randn(2, channels, 6, 5, dtype=torch.float64)
    layer = tn.Shift2d(channels, kernel_size).double()
    assert torch.equal(baselines.shift_per_channel(x, kernel_size), layer(x))
    assert torch.equal(baselines.shift_one_hot(channels, kernel_size)(x), layer(x))
    assert torch.equal(baselines.NaiveShift2d(kernel_size)(x), layer(x))


REPLACED = {
    "shift()": (baselines.with_naive_shifts, baselines.NaiveShift2d),
    "soft-sharing(templates=2)": (baselines.with_original_mixing, baselines.OriginalSConv2d),
    "filter-basis(shared_rank=4)": (baselines.with_original_bases, baselines.OriginalBasisConv2d),
    "filter-basis(shared_rank=3, bases=2)": (baselines.with_original_bases, baselines.OriginalBasisConv2d),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("technique", REPLACED)
def test_networks(technique: str, training: bool) -> None:
    network = NETWORKS["residual"]
    model = perturb(tn.convert(network.make(), technique)).train(training)
    make, kind = REPLACED[technique]
    other = make(copy.deepcopy(model))
    assert any(isinstance(module, kind) for module in other.modules())
    for one, wanted in zip(gradients(other, network.image()), gradients(model, network.image()), strict=True):
        assert_close(one, wanted, 1e-9, technique)


@pytest.mark.parametrize("unique_penalty", [True, False])
@pytest.mark.parametrize(("bases", "unique"), [(1, 2), (2, 1), (2, 0)])
def test_full_gram(bases: int, unique: int, unique_penalty: bool) -> None:
    shape = (4, 3, 3)
    bank = SharedBasis(torch.randn(bases, 3, *shape), torch.randn(5, unique, *shape), 1.0, unique_penalty).double()
    wanted = baselines.wanted_entries(bank).double()
    one, other = baselines.penalty_of_full_gram(bank, wanted), bank.penalty_term()
    assert one.item() == pytest.approx(other.total.item(), rel=1e-12)
    assert int(wanted.sum()) == other.count or not unique_penalty
    for a, b in zip(
        torch.autograd.grad(one, bank.parameters(), allow_unused=True),
        torch.autograd.grad(other.total, bank.parameters(), allow_unused=True),
        strict=True,
    ):
        assert a is None or b is None or torch.allclose(a, b, rtol=1e-10)
