"""The shift operator, its block and its config."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import reference
import thriftnet as tn
from laws import assert_close
from networks import NETWORKS, randomise_norms
from thriftnet.kernels.shift import Moves, moved_channels, offsets, one_hot, windows

CASES = {
    "kernel_size": st.integers(1, 5),
    "dilation": st.integers(1, 3),
    "channels": st.integers(1, 30),
    "height": st.integers(1, 7),
    "width": st.integers(1, 7),
    "seed": st.integers(0, 99),
}


def random_input(channels: int, height: int, width: int, seed: int) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def apply(x: Tensor, kernel_size: int, dilation: int, direction: int = 1) -> Tensor:
    """The form that any layout and type can take, in either direction."""
    return windows(x, Moves(kernel_size, dilation, moved_channels(x.shape[1], kernel_size), direction))


@given(**CASES)
def test_every_form_equals_the_loops(
    kernel_size: int, dilation: int, channels: int, height: int, width: int, seed: int
) -> None:
    x = random_input(channels, height, width, seed)
    expected = reference.shift(x, kernel_size, dilation)
    layer = tn.Shift2d(channels, kernel_size, dilation).double()
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x.contiguous(memory_format=torch.channels_last)), expected)
    assert torch.equal(layer(x.transpose(2, 3).contiguous().transpose(2, 3)), expected)  # strides of neither layout
    assert torch.equal(layer.fold()(x).detach(), expected)


@given(**CASES)
def test_backward_is_the_adjoint(kernel_size: int, dilation: int, channels: int, height: int, width: int, seed: int) -> None:
    x, y = random_input(channels, height, width, seed), random_input(channels, height, width, seed + 1)
    there = (apply(x, kernel_size, dilation) * y).sum()
    back = (x * apply(y, kernel_size, dilation, -1)).sum()
    assert torch.allclose(there, back, rtol=1e-12, atol=1e-12)
    x.requires_grad_()
    (tn.Shift2d(channels, kernel_size, dilation).double()(x) * y).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, apply(y, kernel_size, dilation, -1))


@pytest.mark.parametrize(("channels", "kernel_size", "dilation"), [(9, 3, 1), (11, 3, 2), (5, 2, 1), (3, 3, 1)])
def test_gradcheck(channels: int, kernel_size: int, dilation: int) -> None:
    layer = tn.Shift2d(channels, kernel_size, dilation).double()
    x = random_input(channels, 3, 2, 0)[:1].requires_grad_()
    assert torch.autograd.gradcheck(layer, (x,))
    assert torch.autograd.gradgradcheck(layer, (x,))
    last = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert torch.autograd.gradcheck(layer, (last,))


@given(kernel_size=st.integers(1, 7), dilation=st.integers(1, 3), channels=st.integers(1, 120))
def test_offsets(kernel_size: int, dilation: int, channels: int) -> None:
    found = offsets(channels, kernel_size, dilation)
    moved = moved_channels(channels, kernel_size)
    assert len(found) == channels
    assert moved % kernel_size**2 == 0
    assert channels - moved < kernel_size**2
    assert all(offset == (0, 0) for offset in found[moved:])
    steps = {
        (dilation * (i - kernel_size // 2), dilation * (j - kernel_size // 2))
        for i in range(kernel_size)
        for j in range(kernel_size)
    }
    for start in range(0, moved, kernel_size**2):
        assert {*found[start : start + kernel_size**2]} == steps  # each offset once in every set of k^2 channels


def test_offsets_are_interleaved() -> None:
    """Channel 0 reads its upper left neighbour, channel 4 itself, channel 9 as channel 0 (the authors' kernel)."""
    assert offsets(18)[0] == offsets(18)[9] == (-1, -1)
    assert offsets(18)[1] == (-1, 0)
    assert offsets(18)[4] == (0, 0)
    x = torch.zeros(1, 9, 3, 3)
    x[0, 0, 0, 0] = 1
    assert tn.Shift2d(9)(x)[0, 0].nonzero().tolist() == [[1, 1]]  # the content moves down and to the right


def test_fewer_channels_than_offsets_stay() -> None:
    x = random_input(8, 4, 4, 0)
    assert torch.equal(tn.Shift2d(8).double()(x), x)


@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4, 5])
def test_one_hot_has_one_entry_per_channel(kernel_size: int) -> None:
    kernel = one_hot(2 * kernel_size**2 + 1, kernel_size)
    assert kernel.shape[-1] % 2 == 1
    assert torch.equal(kernel.sum((1, 2, 3)), torch.ones(len(kernel)))
    assert kernel.max() == 1


def test_no_parameters_and_nothing_stored() -> None:
    layer = tn.Shift2d(9)
    assert not list(layer.parameters())
    assert not layer.state_dict()
    assert not any(p.requires_grad for p in layer.fold().parameters())
    assert tn.Shift2d(9).to(torch.float64).kernel.dtype == torch.float64


def test_infinities_stay_where_they_are_moved_to() -> None:
    x = torch.zeros(1, 9, 3, 3)
    x[0, 0, 0, 0] = float("inf")
    out = tn.Shift2d(9)(x)
    assert out[0, 0, 1, 1] == float("inf")
    assert out.isfinite().sum() == out.numel() - 1


def test_huge_steps_leave_zeros() -> None:
    out = tn.Shift2d(9, dilation=5).double()(random_input(9, 3, 3, 0))
    assert out[:, 4].abs().min() > 0
    assert out[:, [0, 1, 2, 3, 5, 6, 7, 8]].abs().max() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"channels": 0}, "channels=0: expected an integer from 1 to"),
        ({"channels": 4, "kernel_size": 0}, "kernel_size=0: expected an integer"),
        ({"channels": 4, "dilation": 1.5}, r"dilation=1\.5: expected a"),
    ],
)
def test_bad_layers(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(tn.ConfigError, match=message):
        tn.Shift2d(**arguments)


@pytest.mark.parametrize("shape", [(1, 8, 4, 4), (9, 4, 4), (1, 10, 4, 4)])
def test_bad_inputs_are_named(shape: tuple[int, ...]) -> None:
    with pytest.raises(tn.ConfigError, match=r"moves 9 channels of \(N, 9, H, W\), got \("):
        tn.Shift2d(9)(torch.zeros(shape))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 1}, "kernel_size=1: expected an integer from 2 to"),
        ({"kernel_size": True}, "kernel_size=True: expected a"),
        ({"dilation": 0}, "dilation=0: expected a"),
        ({"expansion": 0}, "expansion=0: expected a number > 0"),
        ({"expansion": float("inf")}, "expansion=inf: expected a"),
        ({"expansion": float("nan")}, "expansion=nan: expected a"),
        ({"init": "weight"}, "unknown init 'weight': did you mean 'weights'"),
    ],
)
def test_bad_configs(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(tn.ConfigError, match=message):
        tn.Shift(**arguments)  # type: ignore[arg-type]


def test_a_block_without_channels_inside_is_refused() -> None:
    with pytest.raises(tn.ConfigError, match=r"expansion=0\.05 of 8 channels leaves none: use at least 0\.125"):
        tn.ShiftConv2d(8, 8, expansion=0.05)
    with pytest.raises(
        tn.IncompatibleModelError,
        match=r"as many channels to move .*: 'convs\.0' needs 9\. Use an expansion of at least 1\.125",
    ):
        tn.convert(NETWORKS["chain"].make(), tn.Shift(expansion=0.05))


@pytest.mark.parametrize("expansion", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("stride", [1, 2])
def test_block_equals_its_parts(expansion: float, stride: int) -> None:
    """1 x 1 convolution, norm, ReLU, shift, strided 1 x 1 convolution, each by its definition."""
    block = randomise_norms(tn.ShiftConv2d(4, 6, stride=stride, expansion=expansion, bias=True).double()).eval()
    x = random_input(4, 5, 5, 0)
    norm = block.norm
    inner = reference.conv2d(x, block.expand.weight)
    inner = reference.batch_norm(inner, norm.running_mean, norm.running_var, norm.weight, norm.bias).clamp_min(0)
    expected = reference.conv2d(reference.shift(inner), block.project.weight, block.project.bias, stride=stride)
    assert_close(block(x).detach(), expected.detach(), 1e-12, "shift block")
    assert_close(block.fold()(x).detach(), expected.detach(), 1e-12, "folded shift block")
    assert block.dense_params == 6 * 4 * 9 + 6


def test_starting_from_weights_is_exact_but_for_norm_and_relu() -> None:
    """With as many channels per offset as the kernel has inputs, the two 1 x 1 convolutions give the old kernel back."""
    conv = nn.Conv2d(3, 4, 3, padding=1).double()
    expansion = 9 * 3 / 4
    (_, block), = tn.Shift(expansion=expansion).build([_site(conv)])  # fmt: skip
    assert block.norm.num_features == 27
    x = random_input(3, 6, 6, 0)
    linear = block.project(block.shift(block.expand(x)))
    assert_close(linear.detach(), conv(x).detach(), 1e-12, "the block without norm and ReLU")
    random = tn.Shift(expansion=expansion, init="random").build([_site(conv)])[0][1]
    assert not torch.allclose(random.project(random.shift(random.expand(x))), conv(x), rtol=0.1)
    assert torch.equal(random.project.bias, conv.bias)


def _site(conv: nn.Conv2d) -> object:
    from thriftnet.core.sites import Site

    return Site(("conv",), conv)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(9, 9, 3, padding=2),
        nn.Conv2d(9, 9, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(9, 9, 5, padding=2, groups=9),
        nn.Conv2d(9, 9, 1),
        nn.Conv2d(9, 9, 4, padding="same"),
        nn.Conv2d(9, 9, (3, 1), padding=(1, 0)),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.ConvTranspose2d(9, 9, 3, padding=1),
        nn.Conv1d(9, 9, 3, padding=1),
    ],
    ids=str,
)
def test_convolutions_it_does_not_take(conv: nn.Module) -> None:
    assert not tn.Shift().accepts(conv)
    with pytest.raises(
        tn.IncompatibleModelError, match=r"layer '1' is \w+\(.*shift takes convolutions with a square kernel"
    ):
        tn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), conv, nn.Linear(4, 2)), tn.Shift(), select=["1"])


def test_a_config_may_ask_for_one_kernel() -> None:
    assert not tn.Shift(kernel_size=5).accepts(nn.Conv2d(32, 32, 3, padding=1))
    assert not tn.Shift(dilation=2).accepts(nn.Conv2d(32, 32, 3, padding=1))
    assert not tn.Shift(depthwise=False).accepts(nn.Conv2d(32, 32, 3, padding=1, groups=32))
    assert tn.Shift(kernel_size=3, dilation=2).accepts(nn.Conv2d(32, 32, 3, padding=2, dilation=2, groups=32))


@pytest.mark.parametrize("groups", [1, 2, 18])
@pytest.mark.parametrize(("kernel_size", "padding"), [(3, 1), (3, "same"), (3, 0), (4, 1), (4, 0), (2, 0)])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("size", [11, 12])
def test_kernels_paddings_strides_and_groups(
    groups: int, kernel_size: int, padding: int | str, stride: int, dilation: int, size: int
) -> None:
    """The output has the convolution's size, and each channel reads one of the pixels that the convolution reads."""
    stride = 1 if padding == "same" else stride
    padding = padding if isinstance(padding, str) else padding * dilation
    conv = nn.Conv2d(18, 18, kernel_size, stride, padding, dilation, groups).double()
    (_, layer), = tn.Shift().build([_site(conv)])  # fmt: skip
    layer = layer.eval()
    x = random_input(18, size, size, 0)
    assert layer(x).shape == conv(x).shape
    assert_close(layer.fold()(x).detach(), layer(x).detach(), 1e-12, "fold")
    if groups == 1:
        assert isinstance(layer, tn.ShiftConv2d)
    if groups == 18:
        assert isinstance(layer, tn.DepthwiseShift2d)
        one_hot = layer.fold().weight
        assert one_hot.shape == conv.weight.shape
        conv.weight.data.copy_(one_hot)
        assert_close(layer(x).detach(), conv(x).detach(), 1e-12, "the convolution with one pixel per channel")
        assert len({tuple(kernel.flatten().tolist()) for kernel in one_hot}) == kernel_size**2


def test_grouped_blocks_start_from_the_weights() -> None:
    conv = nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
    (_, block), = tn.Shift(expansion=9 * 2 * 2 / 6).build([_site(conv)])  # fmt: skip
    x = random_input(4, 6, 6, 0)
    linear = block.project(block.shift(block.expand(x)))
    assert_close(linear.detach(), conv(x).detach(), 1e-12, "the block without norm and ReLU")
    assert block.dense_params == 6 * 2 * 9 + 6


def test_strided_convolution_keeps_its_output_size() -> None:
    for size in (7, 8):
        x = random_input(4, size, size, 0).float()
        conv = nn.Conv2d(4, 6, 3, 2, 1)
        assert tn.ShiftConv2d(4, 6, stride=2)(x).shape == conv(x).shape


def test_narrow_blocks_keep_the_offsets_of_their_channels() -> None:
    model = tn.convert(tn.convert(NETWORKS["chain"].make(), tn.Shift(expansion=3.0)), tn.Slimmable(widths=(0.5, 1.0)))
    tn.set_width(model, 0.5)
    layer = next(m for m in model.modules() if isinstance(m, tn.Shift2d))
    x = random_input(24, 5, 5, 0)
    assert torch.equal(layer(x[:, :12]), reference.shift(x)[:, :12])
    with pytest.raises(tn.ConfigError, match="moves 12 channels"):
        layer(x)


def test_widths_that_do_not_fit_the_inside_are_refused() -> None:
    shifted = tn.convert(NETWORKS["chain"].make(), tn.Shift(expansion=1.125))
    with pytest.raises(
        tn.IncompatibleModelError, match=r"the 9 channels inside a ShiftConv2d cannot be narrowed to all of \(0\.5"
    ):
        tn.convert(shifted, tn.Slimmable(widths=(0.5, 1.0)))


def test_both_pointwise_layers_of_a_block_may_be_one_layer() -> None:
    block = tn.convert(nn.Sequential(nn.Conv2d(9, 9, 3, padding=1, bias=False)).double(), tn.Shift(), select="0").eval()
    shared = tn.convert(block, tn.WeightSharing(rate=2), select="0")
    one = shared[0]
    assert one.expand is one.project
    x = torch.randn(2, 9, 6, 6, dtype=torch.float64)
    expected = one.project(one.shift(one.act(one.norm(one.expand(x)))))
    assert torch.equal(shared(x), expected)
    assert torch.allclose(tn.fold(shared)(x), expected)
