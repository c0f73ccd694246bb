"""Statistics made anew from data: exact averages, nothing else touched, nothing lost when the data fails."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import reference
import thriftnet as tn
from networks import NETWORKS, perturb
from thriftnet.core.width import width


def batches(count: int = 3) -> list[Tensor]:
    """Batches of different size and distribution."""
    return [
        torch.randn(2 + seed, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) * (1 + seed) + seed
        for seed in range(count)
    ]


def network(*widths: float) -> nn.Module:
    model = NETWORKS["chain"].make()
    return perturb(tn.convert(model, tn.Slimmable(widths=widths)) if widths else model).eval()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def is_statistic(key: str) -> bool:
    return "running_" in key or "num_batches" in key


@pytest.mark.parametrize("pairs", [False, True])
def test_statistics_are_the_exact_average(pairs: bool) -> None:
    """The first norm sees the stem's outputs, whatever the others do: mean and unbiased variance, averaged by batch."""
    model = network()
    outs = [model.stem(batch.double()).detach().numpy() for batch in batches()]
    loader = [(batch, torch.zeros(len(batch))) for batch in batches()] if pairs else batches()
    tn.recalibrate(model, loader)
    mean, var = reference.running_average(outs)
    np.testing.assert_allclose(model.stem_norm.running_mean.numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(model.stem_norm.running_var.numpy(), var, rtol=1e-12)
    assert model.stem_norm.num_batches_tracked == 3


def test_deeper_norms_see_batch_statistics() -> None:
    model = network()
    with torch.no_grad():
        outs = []
        for batch in batches():
            stem = model.stem(batch.double())
            normed = nn.functional.batch_norm(stem, None, None, model.stem_norm.weight, model.stem_norm.bias, training=True)
            outs.append(model.convs[0](normed.relu()).numpy())
    tn.recalibrate(model, batches())
    mean, var = reference.running_average(outs)
    np.testing.assert_allclose(model.norms[0].running_mean.numpy(), mean, rtol=1e-10)
    np.testing.assert_allclose(model.norms[0].running_var.numpy(), var, rtol=1e-10)


@pytest.mark.parametrize(("index", "channels"), [(0, 4), (1, 8)])
def test_every_width_gets_its_own(index: int, channels: int) -> None:
    model = network(0.5, 1.0)
    with torch.no_grad():
        stem = model.stem
        outs = [
            nn.functional.conv2d(batch.double(), stem.weight[:channels], stem.bias[:channels], padding=1).numpy()
            for batch in batches()
        ]
    tn.recalibrate(model, batches())
    mean, var = reference.running_average(outs)
    suffix = "_0" if index == 0 else ""
    np.testing.assert_allclose(getattr(model.stem_norm, f"running_mean{suffix}").numpy(), mean, rtol=1e-12)
    np.testing.assert_allclose(getattr(model.stem_norm, f"running_var{suffix}").numpy(), var, rtol=1e-12)
    assert getattr(model.stem_norm, f"num_batches_tracked{suffix}") == 3


@pytest.mark.parametrize(
    "chosen", [{"widths": [0.5]}, {"widths": 0.5}, {"widths": "smallest"}, {"indices": [0]}, {"indices": 0}]
)
def test_only_the_chosen_widths_change(chosen: dict[str, Any]) -> None:
    model = network(0.5, 1.0)
    before = state(model)
    tn.recalibrate(model, batches(), **chosen)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {key for key in before if is_statistic(key) and key.endswith("_0")}


@pytest.mark.parametrize("selected", [0.5, 1.0])
def test_everything_else_stays(selected: float) -> None:
    model = network(0.5, 1.0)
    tn.set_width(model, selected)
    model.train()
    model.convs[1].eval()
    model.norms[2].momentum = 0.37
    before, modes, random = state(model), [m.training for m in model.modules()], torch.get_rng_state()
    tn.recalibrate(model, batches())
    assert [m.training for m in model.modules()] == modes
    assert width(model) == selected
    assert [norm.momentum for norm in model.norms] == [0.1, 0.1, 0.37, 0.1]
    assert torch.equal(torch.get_rng_state(), random)
    assert all(parameter.grad is None for parameter in model.parameters())
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]) != is_statistic(key), key


def test_dropout_does_not_act() -> None:
    model = network()
    model.stem = nn.Sequential(model.stem, nn.Dropout(0.5))
    model.train()
    tn.recalibrate(model, batches())
    first = model.stem_norm.running_mean.clone()
    tn.recalibrate(model, batches())
    assert torch.equal(model.stem_norm.running_mean, first)
    assert model.stem[1].training


def failing() -> Iterator[Tensor]:
    yield batches(1)[0]
    raise OSError("the disk is gone")


@pytest.mark.parametrize("widths", [(), (0.5, 1.0)])
def test_failures_put_the_statistics_back(widths: tuple[float, ...]) -> None:
    model = network(*widths).train()
    before = state(model)
    for loader, error, message in (
        ([], tn.DataError, "recalibrate got a loader without images: statistics are unchanged"),
        (failing(), OSError, "the disk is gone"),
        ([torch.zeros(2, 5, 8, 8)], (RuntimeError, tn.ConfigError), "channels"),
    ):
        with pytest.raises(error, match=message):
            tn.recalibrate(model, loader)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert all(module.training for module in model.modules())
        assert width(model) == 1.0
    with pytest.raises(tn.ConfigError, match=r"no width 0\.3") if widths else pytest.raises(tn.IncompatibleModelError):
        tn.recalibrate(model, batches(), widths=[0.3])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_networks_without_statistics_are_refused() -> None:
    for model in (nn.Sequential(nn.Conv2d(3, 4, 3)), nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))):
        with pytest.raises(tn.IncompatibleModelError, match="Sequential has no batch norm with running statistics"):
            tn.recalibrate(model, batches())


def test_statistics_inside_of_bases_are_made_anew() -> None:
    model = perturb(tn.convert(NETWORKS["chain"].make(), tn.FilterBasis(shared_rank=4))).eval()
    before = model.convs[0].norm.running_mean.clone()
    tn.recalibrate(model, batches())
    assert not torch.equal(model.convs[0].norm.running_mean, before)
    assert model.convs[0].norm.num_batches_tracked == 3


@pytest.mark.parametrize(
    ("loader", "kwargs", "expected"),
    [
        ([torch.zeros(0, 3, 8, 8)], {}, "without images"),
        ([torch.full((4, 3, 8, 8), float("nan"))], {}, "NaN"),
        (None, {}, "loader=None: expected an iterable"),
        ([torch.zeros(4, 3, 8, 8)], {"widths": []}, "at least one"),
    ],
)
def test_what_gives_no_statistics_is_refused_and_changes_none(loader: object, kwargs: dict[str, object], expected: str):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(tn.ThriftnetError, match=expected):
        tn.recalibrate(model, loader, **kwargs)  # type: ignore[arg-type]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
