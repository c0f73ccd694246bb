"""Which layers share, how their weights become one, and what is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import reference
import thriftnet as tn
from laws import assert_close
from networks import LOOPED, NETWORKS, Chain, perturb
from thriftnet.techniques.weight_sharing import FusedConv2d, shared_index, signature


def chain(depth: int) -> nn.Module:
    torch.manual_seed(0)
    return Chain(depth=depth).double().eval()


def slots(model: nn.Module) -> list[int]:
    """Which shared layer each convolution of a chain is, numbered as they come."""
    seen: dict[int, int] = {}
    return [seen.setdefault(id(conv), len(seen)) for conv in model.convs]


@given(rate=st.integers(1, 4), groups=st.integers(1, 6), mapping=st.sampled_from(["sequential", "strided"]))
def test_mapping_equals_the_figure(rate: int, groups: int, mapping: str) -> None:
    assert shared_index(rate * groups, rate, mapping) == reference.shared_index(rate * groups, rate, mapping)


@given(rate=st.integers(1, 4), groups=st.integers(1, 6), seed=st.integers(0, 99))
def test_random_mapping_is_a_shuffle_that_comes_back(rate: int, groups: int, seed: int) -> None:
    state = torch.get_rng_state()
    found = shared_index(rate * groups, rate, "random", seed)
    assert sorted(found) == shared_index(rate * groups, rate)
    assert found == shared_index(rate * groups, rate, "random", seed)
    assert torch.equal(torch.get_rng_state(), state), "the mapping draws from the global random state"


def test_random_mapping_depends_on_the_seed() -> None:
    assert len({tuple(shared_index(12, 2, "random", seed)) for seed in range(5)}) > 1


def test_rate_that_does_not_divide() -> None:
    with pytest.raises(tn.ConfigError, match="rate=4 does not divide the depth 6"):
        shared_index(6, 4)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rate": 2}, [0, 0, 1, 1, 2, 2]),
        ({"rate": 3}, [0, 0, 0, 1, 1, 1]),
        ({"rate": 6}, [0] * 6),
        ({"rate": 1}, [0, 1, 2, 3, 4, 5]),
        ({"rate": 2, "mapping": "strided"}, [0, 1, 2, 0, 1, 2]),
        ({"rate": 3, "mapping": "strided"}, [0, 1, 0, 1, 0, 1]),
        ({"rate": 2, "distribution": "front"}, [0, 0, 1, 2, 3, 4]),
        ({"rate": 2, "distribution": "middle"}, [0, 1, 2, 2, 3, 4]),
        ({"rate": 2, "distribution": "middle", "portion": 0.7}, [0, 1, 1, 2, 2, 3]),
        ({"rate": 2, "distribution": "back"}, [0, 1, 2, 3, 4, 4]),
        ({"rate": 2, "distribution": "front", "portion": 0.7}, [0, 0, 1, 1, 2, 3]),
        ({"groups": [[0, 5], [1, 2, 3]]}, [0, 1, 1, 1, 2, 0]),
        ({"groups": (("convs.4", "convs.1"),)}, [0, 1, 2, 3, 1, 4]),
    ],
    ids=str,
)
def test_which_layers_share(config: dict[str, object], expected: list[int]) -> None:
    model = tn.convert(chain(6), tn.WeightSharing(**config))  # type: ignore[arg-type]
    assert slots(model) == expected


def test_depth_that_is_left_over_keeps_its_own() -> None:
    """Where the rate divides some sets of equal layers, the last layers of the others keep their own weight."""
    model = tn.convert(NETWORKS["residual"].make(), tn.WeightSharing(rate=2))
    assert model.stage1[0].conv1 is model.stage1[0].conv2
    assert model.stage2[0].conv2 is model.stage2[1].conv1
    assert type(model.stage2[1].conv2) is nn.Conv2d
    assert type(model.stage2[0].conv1) is nn.Conv2d, "no other convolution equals it"


def test_rate_that_divides_nothing_shares_what_it_can() -> None:
    model = tn.convert(chain(6), tn.WeightSharing(rate=4))
    assert [conv is model.convs[0] for conv in model.convs] == [True] * 4 + [False] * 2
    with pytest.raises(
        tn.IncompatibleModelError, match=r"rate=9 is too large.*'convs\.0'.* has 6\. Use a rate of at most 6"
    ):
        tn.convert(chain(6), tn.WeightSharing(rate=9))


def test_linear_layers_share_by_default_where_no_convolutions_can() -> None:
    blocks = [nn.Linear(8, 8) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(2), nn.ConvTranspose1d(8, 8, 1), *blocks, nn.Linear(8, 2))
    assert {row.layer.partition("(")[0] for row in tn.plan(model, tn.WeightSharing()).rows} == {"Linear"}
    mixed = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(3)), *blocks, nn.Linear(8, 2))
    assert {row.layer.partition("(")[0] for row in tn.plan(mixed, tn.WeightSharing()).rows} == {"Conv2d"}
    assert len(tn.plan(mixed, tn.WeightSharing(linear=True)).rows) == 6
    with pytest.raises(tn.IncompatibleModelError, match="finds nothing to convert"):
        tn.convert(model, tn.WeightSharing(linear=False))


@pytest.mark.parametrize("fusion", ["mean", "choose_first", "scalar_weighted_mean", "channel_weighted_mean"])
@pytest.mark.parametrize("mapping", ["sequential", "strided"])
def test_weights_are_fused_by_the_formula(fusion: str, mapping: str) -> None:
    dense = chain(4)
    model = perturb(tn.convert(dense, tn.WeightSharing(fusion=fusion, mapping=mapping, trained=True))).eval()
    for slot in range(2):
        layer = next(conv for conv, at in zip(model.convs, shared_index(4, 2, mapping), strict=True) if at == slot)
        members = layer.members.detach()
        scales = torch.ones(2, 8, dtype=torch.float64) if layer.scales is None else layer.scales.detach().expand(2, 8)
        weight = members[0] if fusion == "choose_first" else reference.fused_weight(members, scales)
        bias = layer.biases[0] if fusion == "choose_first" else (layer.biases[0] + layer.biases[1]) / 2
        assert_close(layer.weight.detach(), weight, 1e-12, "fused weight")
        assert_close(layer.bias.detach(), bias.detach(), 1e-12, "fused bias")
        assert_close(layer.fold().weight.detach(), weight, 1e-12, "folded weight")


@pytest.mark.parametrize("mapping", ["sequential", "strided"])
def test_fusion_takes_the_layers_that_the_mapping_joins(mapping: str) -> None:
    """The original fuses neighbours whatever the mapping."""
    dense = chain(4)
    model = tn.convert(dense, tn.WeightSharing(mapping=mapping))
    partner = {"sequential": 1, "strided": 2}[mapping]
    expected = (dense.convs[0].weight + dense.convs[partner].weight) / 2
    assert_close(model.convs[0].weight.detach(), expected.detach(), 1e-12, "mean")
    assert model.convs[0] is model.convs[partner]
    bias = (dense.convs[0].bias + dense.convs[partner].bias) / 2
    assert_close(model.convs[0].bias.detach(), bias.detach(), 1e-12, "mean bias")


def test_only_trained_fusions_keep_all_weights() -> None:
    kept = {
        fusion: tn.WeightSharing(fusion=fusion).keeps_members for fusion in ("mean", "choose_first", "scalar_weighted_mean")
    }
    assert kept == {"mean": False, "choose_first": False, "scalar_weighted_mean": True}
    assert tn.WeightSharing(trained=True).keeps_members
    assert isinstance(tn.convert(chain(4), tn.WeightSharing(trained=True)).convs[0], FusedConv2d)
    first = tn.convert(chain(4), tn.WeightSharing(fusion="choose_first"))
    assert torch.equal(first.convs[1].weight, chain(4).convs[0].weight)
    assert torch.equal(first.convs[1].bias, chain(4).convs[0].bias)


def test_all_members_of_a_trained_mean_get_gradients() -> None:
    model = tn.convert(chain(4), tn.WeightSharing(trained=True))
    model(NETWORKS["chain"].image()).square().sum().backward()
    grads = model.convs[0].members.grad
    assert torch.allclose(grads[0], grads[1])
    assert grads.abs().max() > 0


def test_depthwise_layers_keep_their_own_unless_asked() -> None:
    model = NETWORKS["depthwise"].make()
    names = {name for row in tn.plan(model, tn.WeightSharing()).rows for name in row.names}
    assert names == {"pointwise.0", "pointwise.1", "grouped.0", "grouped.1", "plain.0", "plain.1"}
    more = {name for row in tn.plan(model, tn.WeightSharing(depthwise=True)).rows for name in row.names}
    assert more - names == {"depthwise.0", "depthwise.1"}


@pytest.mark.parametrize(
    "change",
    [
        {"stride": 2},
        {"padding": 0},
        {"bias": False},
        {"dilation": 2},
        {"padding_mode": "reflect"},
        {"groups": 2},
        {"kernel_size": 5},
    ],
    ids=str,
)
def test_only_equal_layers_share(change: dict[str, object]) -> None:
    def conv(**arguments: object) -> nn.Conv2d:
        return nn.Conv2d(8, 8, **{"kernel_size": 3, "padding": 1, **arguments})  # type: ignore[arg-type]

    assert signature(conv()) == signature(conv())
    assert signature(conv()) != signature(conv(**change))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), conv(), conv(**change), nn.Linear(8, 2))
    with pytest.raises(tn.IncompatibleModelError):
        tn.convert(model, tn.WeightSharing())
    with pytest.raises(tn.IncompatibleModelError, match=r"layers '1' and '2' cannot share: .*Put only equal layers"):
        tn.convert(model, tn.WeightSharing(groups=[["1", "2"]]))


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([["convs.0", "convs.9"]], r"unknown layer in groups 'convs\.9': did you mean"),
        ([[0, 6]], r"groups names layer 6, but there are 6 layers that can share \(0 to 5\)"),
        ([[-1, 0]], r"groups names layer -1"),
        ([[]], "at least two layer names"),
        ([["convs.0"]], "at least two layer names"),
        ("convs.0", "at least two layer names"),
        ([["stem", "convs.0"]], "unknown layer in groups 'stem'"),
    ],
    ids=str,
)
def test_bad_groups(groups: list[list[str | int]], message: str) -> None:
    with pytest.raises(tn.ConfigError, match=message):
        tn.convert(chain(6), tn.WeightSharing(groups=groups))  # type: ignore[arg-type]


def test_a_layer_in_two_groups_is_refused() -> None:
    """It cannot be two modules at once; the last group must not win in silence."""
    for groups in ([[0, 1], [1, 2]], [[0, 1, 1]]):
        with pytest.raises((tn.ConfigError, tn.IncompatibleModelError)):
            tn.convert(chain(6), tn.WeightSharing(groups=groups))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 0}, "rate=0: expected an integer from 1 to"),
        ({"rate": True}, "rate=True: expected a"),
        ({"mapping": "stride"}, "unknown mapping 'stride': did you mean 'strided'"),
        ({"distribution": "centre"}, "unknown distribution 'centre'"),
        ({"fusion": "max"}, r"unknown fusion 'max'.*Possible: channel_weighted_mean, choose_first, mean"),
        ({"seed": -1}, "seed=-1: expected a"),
        ({"portion": 0}, "portion=0: expected a"),
        ({"portion": 1.5}, r"portion=1\.5: expected a number in \(0, 1\]"),
        ({"groups": 3}, "groups=3: expected lists of"),
        ({"groups": [1, 2]}, r"groups=\[1, 2\]: expected lists of"),
    ],
    ids=str,
)
def test_bad_configs(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(tn.ConfigError, match=message):
        tn.WeightSharing(**arguments)  # type: ignore[arg-type]


def test_looped_layers_count_once() -> None:
    model = tn.convert(LOOPED.make(), tn.WeightSharing())
    assert model.first is model.first_again is model.second is model.body[0]
    (first, second) = tn.plan(LOOPED.make(), tn.WeightSharing()).rows
    assert (first.names, second.names) == (("first", "first_again"), ("second", "body.0"))


def test_fold_keeps_ties() -> None:
    folded = tn.fold(tn.convert(chain(4), tn.WeightSharing()))
    assert folded.convs[0] is folded.convs[1]
    assert type(folded.convs[0]) is nn.Conv2d


def test_fold_keeps_ties_inside_of_converted_layers() -> None:
    """The 1 x 1 convolutions of two shift blocks share one weight; the folded network stores it once, too."""
    model = tn.convert(
        tn.convert(chain(4), tn.Shift(expansion=2.0)), tn.WeightSharing(groups=[["convs.0.expand", "convs.1.expand"]])
    )
    assert model.convs[0].expand is model.convs[1].expand
    folded = tn.fold(model)
    assert sum(p.numel() for p in folded.parameters() if p.requires_grad) == sum(p.numel() for p in model.parameters())
    assert folded.convs[0][0] is folded.convs[1][0]


def test_stem_and_classifier_are_left_alone_unless_selected() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1), nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(tn.IncompatibleModelError, match="1 layers could share, but no two of them are equal"):
        tn.convert(model, tn.WeightSharing())
    converted = tn.convert(model, tn.WeightSharing(), select=["0", "1"])
    assert converted[0] is converted[1]
    left = dict(tn.plan(chain(4), tn.WeightSharing()).left)
    assert left == {"stem": "the stem or the classifier"}
