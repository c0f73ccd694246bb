"""Low rank: the factors are the nearest ones, ranks follow the layer, and what is left alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import thriftnet as tn
from laws import assert_close, output
from networks import NETWORKS, perturb
from thriftnet.core.factorize import factorize
from thriftnet.core.sites import Site


def replaced(layer: nn.Module, **arguments: object) -> nn.Module:
    config = tn.LowRank(**arguments)  # type: ignore[arg-type]
    assert config.accepts(layer)
    (_, new), = config.build([Site(("layer",), layer)])  # type: ignore[arg-type]  # fmt: skip
    return new


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (2, 3, 7)])
def test_factors_are_the_nearest_of_their_rank(shape: tuple[int, ...]) -> None:
    """Eckart and Young: the error is the norm of the singular values left out. Both factors have the same energy."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values = torch.linalg.svdvals(matrix)
    for rank in range(1, min(shape[-2:]) + 1):
        left, right = factorize(matrix, rank)
        error = (left @ right - matrix).norm(dim=(-2, -1))
        torch.testing.assert_close(error, values[..., rank:].norm(dim=-1), atol=1e-7, rtol=1e-7)
        torch.testing.assert_close(left.norm(dim=-2), right.norm(dim=-1), atol=1e-7, rtol=1e-7)


def test_a_few_directions_of_a_large_matrix_are_nearly_the_best() -> None:
    matrix = torch.randn(1100, 1100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix *= torch.arange(1, 1101) ** -0.5
    left, right = factorize(matrix, 64)
    least = torch.linalg.svdvals(matrix)[64:].norm()
    assert least <= (left @ right - matrix).norm() <= 1.001 * least
    again = factorize(matrix, 64)
    assert torch.equal(left, again[0])
    assert torch.equal(right, again[1])


def test_a_direction_without_energy_can_still_learn() -> None:
    left, right = factorize(torch.zeros(3, 4, dtype=torch.float64), 2)
    assert (left.abs().sum() == 0) != (right.abs().sum() == 0)


CONVOLUTIONS = [
    nn.Conv2d(6, 8, 3, padding=1),
    nn.Conv2d(6, 8, (3, 5), (2, 3), (1, 2), (2, 1)),
    nn.Conv2d(6, 8, 3, padding="same", dilation=2, padding_mode="circular", bias=False),
    nn.Conv2d(8, 8, 4, 2, 1, groups=4, padding_mode="reflect"),
    nn.Conv2d(8, 8, 5, padding=2, groups=8),
    nn.Conv2d(8, 16, 5, 2, padding="valid", groups=8),
]


@pytest.mark.parametrize("form", ["spatial", "channel"])
@pytest.mark.parametrize("conv", CONVOLUTIONS, ids=str)
def test_two_layers_equal_one(conv: nn.Conv2d, form: str) -> None:
    """At full rank they are the convolution; at any rank, the one whose weight is their product, folded or not."""
    conv, x = conv.double(), torch.randn(2, conv.in_channels, 13, 12, dtype=torch.float64)
    exact = replaced(conv, rank=1.0, form=form)
    assert_close(output(exact, x), output(conv, x), 1e-12, "full rank")
    assert_close(exact.weight.detach(), conv.weight.detach(), 1e-12, "weight")
    assert exact.dense_params == sum(p.numel() for p in conv.parameters())
    if form == "channel" and conv.groups == 8:
        return  # rank 1 of a depthwise kernel is all of it
    small = replaced(conv, rank=1, form=form).eval()
    first, second = small.reduce, small.expand
    assert {first.kernel_size, second.kernel_size} == (
        {(conv.kernel_size[0], 1), (1, conv.kernel_size[1])} if form == "spatial" else {conv.kernel_size, (1, 1)}
    )
    for prefer in ("", "speed", "size"):
        folded = tn.fold(nn.Sequential(small), prefer=prefer)
        assert_close(output(folded, x), output(small, x), 1e-12, f"folded for {prefer!r}")
        assert isinstance(folded[0], nn.Sequential if prefer else nn.Conv2d)


def test_linear_layers_become_two() -> None:
    layer, x = nn.Linear(12, 20).double(), torch.randn(2, 5, 12, dtype=torch.float64)
    assert_close(output(replaced(layer, rank=1.0), x), output(layer, x), 1e-12, "full rank")
    small = replaced(layer, rank=3).eval()
    assert small.dense_params == 12 * 20 + 20
    assert sum(p.numel() for p in small.parameters()) == 3 * (12 + 20) + 20
    assert small.weight.shape == layer.weight.shape
    assert_close(output(small.fold(), x), output(small, x), 1e-12, "fold")


@pytest.mark.parametrize(
    ("layer", "rank", "expected"),
    [
        (nn.Conv2d(64, 64, 3), 0.25, 48),  # of 192
        (nn.Conv2d(64, 64, 3), 7, 7),
        (nn.Conv2d(64, 64, 3), 500, 95),  # the largest that stores less: 95 * 2 * 192 < 9 * 64 * 64
        (nn.Conv2d(64, 64, 3), 1.0, 192),
        (nn.Conv2d(64, 64, 1), 0.25, 16),
        (nn.Conv2d(64, 64, 1), 0.99, 31),
        (nn.Conv2d(64, 64, 7, groups=64), 0.25, 1),
        (nn.Linear(64, 256), 0.5, 32),
        (nn.Conv2d(64, 64, (1, 7)), 0.25, 16),
    ],
    ids=str,
)
def test_the_rank_follows_the_layer(layer: nn.Module, rank: int | float, expected: int) -> None:
    assert replaced(layer, rank=rank).rank == expected


@pytest.mark.parametrize("layer", [nn.Linear(4, 1), nn.Conv2d(3, 1, 1), nn.Conv2d(8, 8, 2, groups=8)], ids=str)
def test_layers_that_no_rank_makes_smaller_are_left_alone(layer: nn.Module) -> None:
    assert not tn.LowRank().accepts(layer)
    with pytest.raises(tn.IncompatibleModelError, match=r"layer '1' is \w+\(.*if two thinner ones store less"):
        tn.convert(nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.Linear(8, 2)), tn.LowRank(), select=["1"])


def test_the_plan_says_the_rank_that_each_layer_gets() -> None:
    plan = tn.plan(NETWORKS["chain"].make(), tn.LowRank(rank=100))
    assert {row.becomes for row in plan.rows} == {"LowRankConv2d(rank=11)"}
    assert plan.params_after < plan.params_before


def test_a_bias_in_between_keeps_two_layers() -> None:
    """A basis put in place of the first layer adds one, which the padding of the second does not: one convolution cannot do that."""
    network, basis = NETWORKS["chain"], tn.FilterBasis(shared_rank=2)
    by_channels = perturb(tn.convert(tn.convert(network.make(), tn.LowRank(rank=4, form="channel")), basis)).eval()
    merged = tn.fold(by_channels)
    assert isinstance(merged.convs[0], nn.Conv2d), "a 1 x 1 convolution pads nothing"
    assert_close(output(merged, network.image()), output(by_channels, network.image()), 1e-12, "fold")
    model = perturb(tn.convert(tn.convert(network.make(), tn.LowRank(rank=8)), basis, select=r"reduce$")).eval()
    folded = tn.fold(model)
    assert isinstance(folded.convs[0], nn.Sequential)
    assert_close(output(folded, network.image()), output(model, network.image()), 1e-12, "fold")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": 0}, "rank=0: expected an integer from 1 to .* or a number in"),
        ({"rank": 1.5}, r"rank=1\.5: expected"),
        ({"rank": True}, "rank=True: expected"),
        ({"form": "spacial"}, "unknown form 'spacial': did you mean 'spatial'"),
    ],
)
def test_bad_configs(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(tn.ConfigError, match=message):
        tn.LowRank(**arguments)  # type: ignore[arg-type]
