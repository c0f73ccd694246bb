"""Widths: which channels run, which statistics are used, what can be chosen and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import thriftnet as tn
from laws import assert_close, output, ties
from networks import NETWORKS, perturb, randomise_norms
from thriftnet.core.history import history
from thriftnet.core.linear import PlainLinear
from thriftnet.core.norm import PlainBatchNorm2d, PlainGroupNorm, PlainLayerNorm
from thriftnet.core.width import WidthSpec, exact_share, width, widths

FOUR = (0.25, 0.5, 0.75, 1.0)


def slim_chain(*values: float) -> nn.Module:
    return perturb(tn.convert(NETWORKS["chain"].make(), tn.Slimmable(widths=values or FOUR))).eval()


@pytest.mark.parametrize("index", range(4))
def test_narrow_network_uses_the_first_channels(index: int) -> None:
    """Written out by hand: slices of every weight, statistics of the width, image and classes whole."""
    model, x = slim_chain(), NETWORKS["chain"].image()
    channels = (2, 4, 6, 8)[index]
    suffix = "" if index == 3 else f"_{index}"

    def norm(layer: PlainBatchNorm2d, x: Tensor) -> Tensor:
        mean, var = getattr(layer, f"running_mean{suffix}"), getattr(layer, f"running_var{suffix}")
        return F.batch_norm(x, mean, var, layer.weight[:channels], layer.bias[:channels])

    out = F.relu(norm(model.stem_norm, F.conv2d(x, model.stem.weight[:channels], model.stem.bias[:channels], padding=1)))
    for conv, layer in zip(model.convs, model.norms, strict=True):
        out = F.relu(norm(layer, F.conv2d(out, conv.weight[:channels, :channels], conv.bias[:channels], padding=1)))
    expected = F.linear(out.mean((2, 3)), model.head.weight[:, :channels], model.head.bias)
    tn.set_width(model, index=index)
    assert_close(output(model, x), expected.detach(), 1e-12, f"width {index}")
    frozen = tn.freeze(model, index=index)
    assert_close(output(frozen, x), expected.detach(), 1e-12, f"frozen at {index}")
    assert {type(m).__module__.partition(".")[0] for m in frozen.modules()} == {"torch", "networks"}
    assert frozen.convs[0].weight.shape == (channels, channels, 3, 3)


def test_widths_differ_from_each_other() -> None:
    model, x = slim_chain(), NETWORKS["chain"].image()
    outs = []
    for each in FOUR:
        tn.set_width(model, each)
        outs.append(output(model, x))
    for i, one in enumerate(outs):
        for other in outs[:i]:
            assert (one - other).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"width": 0.25}, 0.25),
        ({"width": 0.5}, 0.5),
        ({"width": 1.0}, 1.0),
        ({"width": 1}, 1.0),
        ({"width": "smallest"}, 0.25),
        ({"width": "largest"}, 1.0),
        ({"index": 0}, 0.25),
        ({"index": 1}, 0.5),
        ({"index": 3}, 1.0),
        ({"index": -1}, 1.0),
    ],
)
def test_choosing_a_width(choice: dict[str, Any], expected: float) -> None:
    """1 is the ratio 1.0 and not the second width."""
    model, x = slim_chain(), NETWORKS["chain"].image()
    tn.set_width(model, **choice)
    assert tn.width(model) == expected
    assert tn.widths(model) == FOUR
    frozen = tn.freeze(slim_chain(), **choice)
    assert torch.equal(output(frozen, x), output(tn.freeze(model, expected), x))


@pytest.mark.parametrize(
    "choice",
    [{"width": bad} for bad in (0.3, 4, 2, 0, -1, "large", 1.5)] + [{"index": bad} for bad in (4, -5)],
    ids=str,
)
def test_widths_that_do_not_exist(choice: dict[str, Any]) -> None:
    model = slim_chain()
    tn.set_width(model, 0.5)
    with pytest.raises(
        tn.ConfigError,
        match=r"no width .*: expected 0\.25, 0\.5, 0\.75, 1, 'smallest', 'largest', or an index: index=0 to 3",
    ):
        tn.set_width(model, **choice)
    assert width(model) == 0.5
    with pytest.raises(tn.ConfigError, match="no width"):
        tn.freeze(model, **choice)


@pytest.mark.parametrize("choice", [{"width": True}, {"index": 0.5}, {"index": True}, {"index": "0"}], ids=str)
def test_what_is_neither_a_width_nor_an_index(choice: dict[str, Any]) -> None:
    with pytest.raises(tn.ConfigError, match=r"width=True: expected a ratio .*, or a name|index=.*: expected an index"):
        tn.set_width(slim_chain(), **choice)


def test_a_width_or_an_index() -> None:
    for verb in (tn.set_width, tn.freeze):
        for choice in ({}, {"width": 0.5, "index": 1}):
            with pytest.raises(tn.ConfigError, match="give a width or an index, one of the two"):
                verb(slim_chain(), **choice)
    with pytest.raises(tn.ConfigError, match=r"no width 2: .* Did you mean index=2\?"):
        tn.set_width(slim_chain(), 2)


def test_networks_of_one_width() -> None:
    model = NETWORKS["chain"].make()
    assert widths(model) == ()
    assert width(model) == 1.0
    for verb in (tn.set_width, tn.freeze):
        with pytest.raises(tn.IncompatibleModelError, match=r"Chain has one width only\. Make it slimmable first"):
            verb(model, 0.5)


def test_freezing_leaves_the_network_as_it_was() -> None:
    model = slim_chain().train()
    tn.set_width(model, 0.75)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    frozen = tn.freeze(model, "smallest")
    assert not frozen.training
    assert model.training
    assert width(model) == 0.75
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert history(frozen)[-1] == {"verb": "freeze", "width": "smallest"}
    assert [step["verb"] for step in history(model)] == ["convert"]


def test_statistics_are_kept_for_each_width() -> None:
    """A training step at one width moves its statistics and no others."""
    model, x = slim_chain(), NETWORKS["chain"].image()
    norm = model.norms[0]
    assert {name for name, _ in norm.named_buffers()} == {
        f"{name}{suffix}"
        for name in ("running_mean", "running_var", "num_batches_tracked")
        for suffix in ("", "_0", "_1", "_2")
    }
    assert norm.running_mean_1.shape == (4,)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    tn.set_width(model, 0.5)
    model.train()(x)
    moved = {name for name, buffer in norm.named_buffers() if not torch.equal(buffer, before[name])}
    assert moved == {"running_mean_1", "running_var_1", "num_batches_tracked_1"}
    assert norm.num_batches_tracked_1 == before["num_batches_tracked_1"] + 1


def test_new_statistics_start_from_the_trained_ones() -> None:
    model = tn.convert(NETWORKS["chain"].make(), tn.Slimmable(widths=(0.5, 1.0)))
    norm = model.norms[0]
    assert torch.equal(norm.running_mean_0, norm.running_mean[:4])
    norm.running_mean_0.add_(1)
    assert not torch.equal(norm.running_mean_0, norm.running_mean[:4]), "they share no memory"


def test_gradients_reach_active_channels_only() -> None:
    model = slim_chain()
    tn.set_width(model, 0.5)
    model(NETWORKS["chain"].image()).square().sum().backward()
    grad = model.convs[1].weight.grad
    assert grad[:4, :4].abs().max() > 0
    assert grad[4:].abs().max() == 0
    assert grad[:, 4:].abs().max() == 0


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_statistics_equal_those_of_a_plain_norm(momentum: float | None) -> None:
    plain = nn.BatchNorm2d(6, momentum=momentum).double()
    ours = PlainBatchNorm2d(plain)
    for seed in range(3):
        x = torch.randn(4, 6, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        assert torch.equal(ours(x), plain(x))
        assert torch.equal(ours.running_mean, plain.running_mean)
        assert torch.equal(ours.running_var, plain.running_var)
        assert torch.equal(ours.num_batches_tracked, plain.num_batches_tracked)
    assert list(ours.state_dict()) == list(plain.state_dict())
    assert torch.equal(ours.eval()(x), plain.eval()(x))


@pytest.mark.parametrize(("affine", "track"), [(True, False), (False, True), (False, False)])
def test_norms_without_affine_or_statistics(affine: bool, track: bool) -> None:
    plain = nn.BatchNorm2d(6, affine=affine, track_running_stats=track).double().eval()
    ours = PlainBatchNorm2d(plain).eval()
    ours.set_width_spec(WidthSpec((0.5, 1.0), (3, 6), (3, 6)))
    x = torch.randn(4, 6, 3, 3, dtype=torch.float64)
    assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours.fold()(x), plain(x))
    ours.set_width_index(0)
    assert ours(x[:, :3]).shape == (4, 3, 3, 3)
    assert torch.equal(ours.fold()(x[:, :3]), ours(x[:, :3]))


@pytest.mark.parametrize("affine", [True, False])
def test_other_norms_narrow(affine: bool) -> None:
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    group = PlainGroupNorm(randomise_norms(nn.GroupNorm(4, 8, affine=affine).double()))
    layer = PlainLayerNorm(randomise_norms(nn.LayerNorm(8, elementwise_affine=affine).double()))
    width_spec = WidthSpec((0.5, 1.0), (4, 8), (4, 8))
    for norm, full in ((group, x), (layer, x.transpose(1, -1))):
        norm.set_width_spec(width_spec)
        narrow = full[:, :4] if norm is group else full[..., :4]
        for index, given_input in ((0, narrow), (1, full)):
            norm.set_width_index(index)
            assert torch.equal(norm.fold()(given_input), norm(given_input))
    group.set_width_index(0)
    weight = None if group.weight is None else group.weight[:4]
    bias = None if group.bias is None else group.bias[:4]
    assert torch.equal(group(x[:, :4]), F.group_norm(x[:, :4], 2, weight, bias))


def test_linear_layers_narrow() -> None:
    linear = PlainLinear(nn.Linear(8, 6).double())
    linear.set_width_spec(WidthSpec((0.5, 1.0), (4, 8), (3, 6)))
    linear.set_width_index(0)
    x = torch.randn(2, 4, dtype=torch.float64)
    assert torch.equal(linear(x), F.linear(x, linear.weight[:3, :4], linear.bias[:3]))
    assert torch.equal(linear.fold()(x), linear(x))


def test_image_and_classes_stay_whole() -> None:
    for network in NETWORKS.values():
        model = tn.convert(network.make(), tn.Slimmable(widths=(0.5, 1.0)))
        tn.set_width(model, 0.5)
        assert model(network.image()).shape == (network.batch, 5)


def test_depthwise_and_grouped_layers_narrow_by_whole_groups() -> None:
    model = tn.freeze(tn.convert(NETWORKS["depthwise"].make(), tn.Slimmable(widths=(0.5, 1.0))), 0.5)
    assert (model.depthwise[0].groups, model.depthwise[0].in_channels) == (4, 4)
    assert (model.grouped[0].groups, model.grouped[0].in_channels) == (1, 4)
    assert (model.group_norm.num_groups, model.group_norm.num_channels) == (2, 4)


def test_a_width_is_at_least_that_share() -> None:
    model = tn.freeze(tn.convert(NETWORKS["chain"].make(), tn.Slimmable(widths=(0.3, 1.0))), 0.3)
    assert (model.stem.out_channels, model.head.in_features, model.head.out_features) == (3, 3, 5)
    model = tn.freeze(tn.convert(NETWORKS["depthwise"].make(), tn.Slimmable(widths=(0.25, 1.0))), 0.25)
    assert (model.grouped[0].groups, model.grouped[0].in_channels) == (1, 4), "channels of a group stay together"
    assert (model.depthwise[0].groups, model.depthwise[0].in_channels) == (2, 2)


@given(channels=st.integers(1, 4096), numerator=st.integers(1, 64), denominator=st.integers(1, 64))
def test_exact_share(channels: int, numerator: int, denominator: int) -> None:
    share = exact_share(channels, numerator / denominator)
    if channels * numerator % denominator == 0:
        assert share == channels * numerator // denominator
    else:
        assert share == 0


@pytest.mark.parametrize("values", [(), (0.0, 1.0), (0.5, 1.5), (-0.5,), ("half",), (True,), (float("nan"),), "0.5", 2])
def test_bad_widths(values: object) -> None:
    with pytest.raises(tn.ConfigError, match=r"widths=.*: expected numbers in \(0, 1\], as widths=\(0\.25"):
        tn.Slimmable(widths=values)  # type: ignore[arg-type]


def test_widths_are_kept_in_order_and_once() -> None:
    assert tn.Slimmable(widths=[1, 0.5, 0.5]) == tn.Slimmable(widths=(0.5, 1.0))  # type: ignore[arg-type]
    assert tn.Slimmable(widths=(1, 0.5)).widths == (0.5, 1.0)


def test_layers_that_are_left_out_or_slimmable_are_refused() -> None:
    with pytest.raises(
        tn.IncompatibleModelError, match=r"must take every layer, but select leaves out 'stem'\. Leave select out"
    ):
        tn.convert(NETWORKS["chain"].make(), tn.Slimmable(widths=(0.5, 1.0)), select="convs")
    with pytest.raises(tn.IncompatibleModelError, match=r"layer 'stem' is .*each with one width"):
        tn.convert(slim_chain(), tn.Slimmable(widths=(0.5, 1.0)))


def test_a_network_without_channels_to_narrow_is_refused_with_every_reason() -> None:
    with pytest.raises(
        tn.IncompatibleModelError,
        match=r"slimmable\(widths=\(0\.5, 1\.0\)\) finds nothing to narrow in Sequential: 0: .*reach the network's output",
    ):
        tn.convert(nn.Sequential(nn.Conv2d(3, 8, 3)), tn.Slimmable(widths=(0.5, 1.0)))
    with pytest.raises(
        tn.IncompatibleModelError, match=r"Give the size .*input_size=\(C, H, W\) \(slimmable.* runs a network"
    ):
        tn.convert(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(7, 2)), tn.Slimmable(widths=(0.5, 1.0)))


def test_width_survives_loading() -> None:
    """The state of all widths is stored; which one is selected is not."""
    model = slim_chain()
    other = tn.convert(NETWORKS["chain"].make(7), tn.Slimmable(widths=FOUR)).eval()
    tn.set_width(other, 0.25)
    other.load_state_dict(model.state_dict())
    assert width(other) == 0.25
    tn.set_width(model, 0.25)
    assert torch.equal(output(other, NETWORKS["chain"].image()), output(model, NETWORKS["chain"].image()))
    assert ties(model)[0] == ties(model)[1]
