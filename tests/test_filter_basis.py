"""Shared bases: the layer, its penalty, its fit to trained weights, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
import thriftnet as tn
from laws import assert_close, output
from networks import NETWORKS, perturb, randomise_norms
from thriftnet.techniques.filter_basis import SharedBasis, SharedBasisConv2d, fitted, leading_directions


def converted(**arguments: object) -> nn.Module:
    config = tn.FilterBasis(**{"shared_rank": 4, "alone": False, "pointwise": False, **arguments})  # type: ignore[arg-type]
    return perturb(tn.convert(NETWORKS["residual"].make(), config)).eval()


@pytest.mark.parametrize("bases", [1, 2])
@pytest.mark.parametrize(("shared", "unique"), [(4, 1), (4, 0), (0, 3), (3, 2)])
def test_layer_equals_its_parts(shared: int, unique: int, bases: int) -> None:
    """Convolution with the basis, batch norm, 1 x 1 convolution, each by its definition."""
    model = converted(shared_rank=shared, unique_rank=unique, bases=bases)
    for name in ("stage1.0.conv1", "stage1.1.conv2", "stage2.0.conv1"):
        layer = model.get_submodule(name)
        x = torch.randn(2, layer.in_channels, 6, 6, dtype=torch.float64)
        norm = layer.norm
        basis = layer.filters.weight
        assert basis.shape == (shared + unique, layer.in_channels, 3, 3)
        inner = reference.conv2d(x, basis, stride=2 if name == "stage2.0.conv1" else 1, padding=1)
        inner = reference.batch_norm(inner, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        expected = reference.conv2d(inner, layer.coefficients.weight)
        assert_close(layer(x).detach(), expected.detach(), 1e-12, "basis layer")
        assert_close(layer.fold()(x).detach(), expected.detach(), 1e-12, "folded basis layer")


def test_layers_use_the_basis_of_their_group() -> None:
    """One bank per input width, the strided layer included; with two bases layers alternate."""
    model = converted(bases=2)
    banks = {id(m): m for m in model.modules() if isinstance(m, SharedBasis)}
    assert len(banks) == 2
    names = ("stage1.0.conv1", "stage1.0.conv2", "stage1.1.conv1", "stage1.1.conv2", "stage2.0.conv1")
    layers = [model.get_submodule(name).filters for name in names]
    assert len({id(layer.bank) for layer in layers}) == 1
    assert [layer.base for layer in layers] == [0, 1, 0, 1, 0]
    assert [layer.layer for layer in layers] == [0, 1, 2, 3, 4]
    assert layers[0].bank.shared.shape == (2, 4, 8, 3, 3)
    assert layers[0].bank.unique.shape == (5, 1, 8, 3, 3)


@given(
    bases=st.integers(1, 2),
    shared=st.integers(1, 4),
    layers=st.integers(1, 4),
    unique=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_penalty_equals_the_loops(bases: int, shared: int, layers: int, unique: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(bases, shared, 2, 3, 3, generator=generator, dtype=torch.float64)
    own = torch.randn(layers, unique, 2, 3, 3, generator=generator, dtype=torch.float64)
    for covers_unique in (True, False):
        bank = SharedBasis(common, own, 7.0, covers_unique)
        expected = reference.average_similarity([(list(common), list(own) if covers_unique else [])])
        assert tn.penalty(bank, scaled=False).item() == pytest.approx(expected, rel=1e-12)
        assert tn.penalty(bank).item() == pytest.approx(7 * expected, rel=1e-12)


def test_penalty_is_averaged_over_all_banks_together() -> None:
    model = converted()
    banks = [m for m in model.modules() if isinstance(m, SharedBasis)]
    terms = [bank.penalty_term() for bank in banks]
    assert len(terms) == 2
    expected = sum(term.total for term in terms) / sum(term.count for term in terms)
    assert tn.penalty(model, scaled=False).item() == pytest.approx(expected.item(), rel=1e-12)
    single = converted(lambda_r=3.0)
    assert tn.penalty(single).item() == pytest.approx(3 * tn.penalty(single, scaled=False).item(), rel=1e-12)


def test_penalty_of_orthonormal_bases_is_zero() -> None:
    rows = torch.linalg.qr(torch.randn(18, 5, dtype=torch.float64)).Q.T.reshape(5, 2, 3, 3)
    bank = SharedBasis(rows[None, :3], rows[None, 3:], 10.0, True)
    assert tn.penalty(bank, scaled=False).item() < 1e-28
    fresh = tn.convert(NETWORKS["chain"].make(), tn.FilterBasis(shared_rank=4, unique_rank=0, bases=2, init="random"))
    assert tn.penalty(fresh, scaled=False).item() < 1e-12, "the authors start both bases of a group orthogonal together"


def test_networks_without_a_basis_have_no_penalty() -> None:
    for model in (NETWORKS["chain"].make(), converted(shared_rank=0, unique_rank=3), nn.ReLU()):
        assert tn.penalty(model, scaled=False).item() == 0
        assert tn.penalty(model).shape == ()


def test_penalty_pulls_towards_orthonormality() -> None:
    model = tn.convert(NETWORKS["chain"].make(), tn.FilterBasis(shared_rank=4))
    perturb(model)
    before = tn.penalty(model, scaled=False)
    before.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.05 * parameter.grad / parameter.grad.abs().max()
    assert tn.penalty(model, scaled=False) < before


@given(m=st.integers(1, 12), n=st.integers(1, 12), data=st.data(), seed=st.integers(0, 99))
def test_leading_directions_carry_the_most_energy(m: int, n: int, data: st.DataObject, seed: int) -> None:
    rank = data.draw(st.integers(0, n))
    rows = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    basis = leading_directions(rows, rank)
    assert torch.allclose(basis @ basis.T, torch.eye(rank, dtype=torch.float64), atol=1e-9)
    left = (rows - rows @ basis.T @ basis).norm().item()
    assert left == pytest.approx(torch.linalg.svdvals(rows)[rank:].norm().item(), abs=1e-9)


def fit_errors(weights: list[Tensor], shared: int, unique: int, bases: int = 1) -> list[float]:
    """Relative error of each layer's weights after a fit."""
    common, own, coefficients = fitted(weights, shared, unique, bases)
    norm_gain = (1 + nn.BatchNorm2d(1).eps) ** 0.5
    errors = []
    for layer, weight in enumerate(weights):
        bank = SharedBasis(common.unflatten(2, (-1, 1, 1)), own.unflatten(2, (-1, 1, 1)), 1.0, True)
        basis = bank.filters(layer, layer % bases).detach().flatten(1)
        errors.append(((coefficients[layer] / norm_gain @ basis - weight).norm() / weight.norm()).item())
    return errors


@given(
    layers=st.integers(2, 4),
    outs=st.integers(1, 6),
    size=st.integers(4, 18),
    bases=st.integers(1, 2),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_fit_is_no_worse_than_its_shared_part_alone(
    layers: int, outs: int, size: int, bases: int, data: st.DataObject, seed: int
) -> None:
    """Whatever the ranks, also when they exceed the rank of the weights: a projection never adds to the error."""
    shared = data.draw(st.integers(1, size - 1))
    unique = data.draw(st.integers(1, size - shared))
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(outs, size, generator=generator, dtype=torch.float64) for _ in range(layers)]
    alone, both = fit_errors(weights, shared, 0, bases), fit_errors(weights, shared, unique, bases)
    for without, error in zip(alone, both, strict=True):
        assert error <= without + 1e-9
    if shared + unique == size:
        assert max(both) < 1e-9, "a full basis reproduces every weight"


def test_default_ranks_on_a_narrow_network_start_from_its_weights() -> None:
    """16 shared filters span all 2 x 8 filters of two layers: the unique ones must not spoil what is exact already."""
    model = NETWORKS["depthwise"].make()
    basis = tn.FilterBasis(shared_rank=16)
    plan = tn.plan(model, basis, select="^plain")
    assert max(row.relative_error for row in plan.rows) < 1e-9
    assert_close(
        output(tn.convert(model, plan), NETWORKS["depthwise"].image()),
        output(model, NETWORKS["depthwise"].image()),
        1e-9,
        "",
    )


def test_ranks_beyond_what_the_filters_span_are_lowered() -> None:
    """A larger rank would only cost time and parameters: 4 layers of 8 filters span 32 directions."""
    model = tn.convert(NETWORKS["chain"].make(), tn.FilterBasis(shared_rank=5000, unique_rank=5000))
    assert model.convs[0].filters.bank.shared.shape == (1, 32, 8, 3, 3)
    assert model.convs[0].filters.bank.unique.shape == (4, 8, 8, 3, 3)
    assert model.convs[0].rank == 40
    assert "BasisConv2d(rank=40)" in str(tn.plan(NETWORKS["chain"].make(), tn.FilterBasis(shared_rank=5000, unique_rank=8)))


def test_ranks_relative_to_the_layer() -> None:
    model = NETWORKS["residual"].make()
    ranks = {row.becomes for row in tn.plan(model, tn.FilterBasis(shared_rank=0.5, unique_rank=0)).rows}
    assert ranks == {"BasisConv2d(rank=8)", "BasisConv2d(rank=4)"}  # of up to 16 outputs; of 8 inputs of a 1 x 1 convolution
    with pytest.raises(tn.ConfigError, match="rank_channels scales integers"):
        tn.FilterBasis(rank_channels=8)


def test_linear_layers_share_a_basis() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), *(nn.Linear(12, 12) for _ in range(5)), nn.Linear(12, 2)).double()
    x = torch.randn(3, 12, dtype=torch.float64)
    exact = tn.convert(model, tn.FilterBasis(shared_rank=12))
    assert_close(output(exact, x), output(model, x), 1e-10, "full capacity")
    for layer in model[1:]:
        nn.init.kaiming_normal_(layer.weight)
    small = perturb(tn.convert(model, tn.FilterBasis())).eval()
    assert isinstance(small[2], tn.BasisLinear)
    assert_close(output(tn.fold(small), x), output(small, x), 1e-12, "fold")
    assert type(tn.fold(small)[2]) is nn.Linear
    assert tn.penalty(small) > 0
    narrow = tn.convert(small, tn.Slimmable(widths=(0.5, 1.0), input_size=(3, 2, 2)))
    tn.set_width(narrow, 0.5)
    assert_close(output(tn.fold(narrow), x), output(narrow, x), 1e-12, "fold at width 0.5")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shared_rank": -1}, "shared_rank=-1: expected an integer from 0 to"),
        ({"unique_rank": 1.5}, r"unique_rank=1\.5: expected an integer from 0 to .* or a number in \(0, 1\]"),
        ({"shared_rank": 0, "unique_rank": 0}, "leave no filters: set at least one of them above 0"),
        ({"bases": 3}, "bases=3: expected one of 1, 2"),
        ({"bases": True}, "bases=True: expected one of 1, 2"),
        ({"init": "orthogonal"}, "unknown init 'orthogonal'"),
        ({"lambda_r": -1}, "lambda_r=-1: expected a"),
        ({"lambda_r": float("nan")}, "lambda_r=nan: expected a"),
    ],
    ids=str,
)
def test_bad_configs(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(tn.ConfigError, match=message):
        tn.FilterBasis(**arguments)  # type: ignore[arg-type]


def test_lambda_may_be_zero() -> None:
    assert tn.penalty(converted(lambda_r=0.0), scaled=True).item() == 0


def test_convolutions_it_does_not_take() -> None:
    basis = tn.FilterBasis()
    assert not basis.accepts(nn.Conv2d(4, 4, 3, groups=4))  # depthwise
    assert not tn.FilterBasis(whole=True).accepts(nn.Conv2d(4, 4, 3, groups=2))
    assert basis.accepts(nn.Conv2d(4, 4, 1))
    assert not tn.FilterBasis(pointwise=False).accepts(nn.Conv2d(4, 4, 1))
    with pytest.raises(
        tn.IncompatibleModelError,
        match=r"layer 'depthwise\.0' is Conv2d\(8, 8.*groups=8.*filter-basis takes convolutions with a weight of their own \(no depthwise",
    ):
        tn.convert(NETWORKS["depthwise"].make(), basis, select=["depthwise.0"])


def test_a_layer_alone_has_filters_of_its_own() -> None:
    model = NETWORKS["residual"].make()
    with pytest.raises(tn.IncompatibleModelError, match="finds nothing to convert in Residual"):
        tn.convert(model, tn.FilterBasis(shared_rank=4, alone=False), select=["stage2.0.conv2"])
    own = tn.convert(model, tn.FilterBasis(shared_rank=4, bases=2), select=["stage2.0.conv2"]).stage2[0].conv2
    assert own.filters.bank.shared is None
    assert own.rank == 5
    most = tn.convert(model, tn.FilterBasis(shared_rank=16), select=["stage2.0.conv2"]).stage2[0].conv2
    assert sum(p.numel() for p in most.parameters()) < 16 * 16 * 9, "lowered to what makes it smaller"
    alone = tn.convert(model, tn.FilterBasis(shared_rank=0, unique_rank=4), select=["stage2.0.conv2"])
    assert isinstance(alone.stage2[0].conv2, tn.BasisConv2d)


def test_fold_refuses_training_mode() -> None:
    model = converted().train()
    with pytest.raises(
        tn.IncompatibleModelError, match=r"layer 'stage1\.0\.conv1' is in training mode.*Call model\.eval\(\) first"
    ):
        tn.fold(model)


def test_bias_goes_to_the_coefficients() -> None:
    model = tn.convert(NETWORKS["chain"].make(), tn.FilterBasis(shared_rank=4))
    layer = model.convs[0]
    assert layer.filters.bias is None
    assert torch.equal(layer.coefficients.bias, NETWORKS["chain"].make().convs[0].bias)
    assert layer.dense_params == 8 * 8 * 9 + 8


def test_random_start_draws_for_each_network() -> None:
    torch.manual_seed(1)
    one = tn.convert(NETWORKS["chain"].make(), tn.FilterBasis(shared_rank=4, init="random"))
    other = tn.convert(NETWORKS["chain"].make(), tn.FilterBasis(shared_rank=4, init="random"))
    assert not torch.equal(one.convs[0].filters.bank.shared, other.convs[0].filters.bank.shared)
    assert one.convs[0].filters.bank.shared.dtype == torch.float64


def test_whole_convolutions_start_from_the_mean_of_their_group() -> None:
    plain = NETWORKS["chain"].make()
    planned = tn.plan(plain, tn.FilterBasis(whole=True))
    model = tn.convert(plain, tn.FilterBasis(whole=True))
    for names in planned.groups:
        shared = model.get_submodule(names[0])
        assert all(model.get_submodule(name) is shared for name in names)
        mean = torch.stack([plain.get_submodule(name).weight for name in names]).mean(0)
        assert torch.allclose(shared.weight, mean)


def test_whole_convolutions_have_a_penalty_on_their_rows() -> None:
    model = tn.convert(NETWORKS["chain"].make(), tn.FilterBasis(whole=True))
    shared = [module for module in model.modules() if isinstance(module, SharedBasisConv2d)]
    rows = [conv.weight.detach().flatten(1) for conv in shared]
    total = sum((b @ b.T - torch.eye(len(b), dtype=b.dtype)).square().sum().item() for b in rows)
    assert tn.penalty(model, scaled=False).item() == pytest.approx(total / sum(len(b) ** 2 for b in rows), rel=1e-12)
    fresh = tn.convert(NETWORKS["chain"].make(), tn.FilterBasis(whole=True, init="random"))
    assert tn.penalty(fresh, scaled=False).item() < 1e-12


def test_families_of_the_penalty_are_averaged_apart_and_added() -> None:
    convs = [nn.Conv2d(3, outs, 3, bias=False).double() for outs in (2, 5, 7)]
    one, two, three = (tn.penalty(SharedBasisConv2d(conv, 1.0), scaled=False).item() for conv in convs)
    families = nn.ModuleList(SharedBasisConv2d(conv, 3.0, name) for conv, name in zip(convs, ("a", "b", "b"), strict=True))
    expected = one + (two * 25 + three * 49) / (25 + 49)
    assert tn.penalty(families, scaled=False).item() == pytest.approx(expected, rel=1e-12)
    assert tn.penalty(families).item() == pytest.approx(3 * expected, rel=1e-12)


def test_fresh_filters_are_spread_by_their_outputs() -> None:
    basis = tn.FilterBasis(shared_rank=4, unique_rank=8, init="random")
    model = tn.convert(nn.Sequential(*(nn.Conv2d(64, 64, 3) for _ in range(4))), basis, select=".")
    bank = next(module for module in model.modules() if isinstance(module, SharedBasis))
    assert bank.unique is not None
    assert bank.unique.std().item() == pytest.approx((2 / (8 * 9)) ** 0.5, rel=0.03)
    assert model[0].coefficients.weight.std().item() == pytest.approx((2 / 64) ** 0.5, rel=0.15)


class Grouped(nn.Module):
    """Grouped convolutions, as ResNeXt's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.convs = nn.ModuleList(nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=i > 0) for i in range(3))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for conv in self.convs:
            x = x + conv(x).relu()
        return self.head(x.mean((2, 3)))


def test_groups_of_channels_share_a_basis_and_have_coefficients_of_their_own() -> None:
    torch.manual_seed(0)
    plain = Grouped().double().eval()
    x = torch.randn(2, 3, 8, 8).double()
    exact = tn.convert(plain, "filter-basis(shared_rank=36, unique_rank=0)", select="convs")
    assert torch.allclose(exact(x), plain(x), rtol=1e-9)
    small = randomise_norms(tn.convert(plain, "filter-basis(shared_rank=6, unique_rank=1)", select="convs")).eval()
    norms, coefficients = 3 * 2 * 4 * 7, 3 * 16 * 7
    assert sum(p.numel() for p in small.convs.parameters()) == (6 + 3) * 36 + norms + coefficients + 2 * 16
    layer = small.convs[1]
    y = torch.randn(2, 16, 8, 8).double()
    assert isinstance(layer, tn.BasisConv2d)
    for same in (tn.fold(layer), layer.decomposed()):
        assert torch.allclose(same(y), layer(y), rtol=1e-9)
    assert torch.allclose(torch.nn.functional.conv2d(y, layer.weight, layer.bias, padding=1, groups=4), layer(y), rtol=1e-9)
    assert torch.allclose(tn.fold(small)(x), small(x), rtol=1e-9)
