"""Parameters, multiply-accumulates, weight generation and shift bytes equal hand formulas, and measuring leaves no trace."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

import thriftnet as tn
from thriftnet.measure import Report, inspect

# four convolutions 32 -> 32, 3 x 3, on 16 x 16: the network that common counters are compared on
WEIGHT, PIXELS = 32 * 32 * 9, 16 * 16
DENSE, MACS = 4 * WEIGHT, 4 * WEIGHT * PIXELS


def conv() -> nn.Conv2d:
    return nn.Conv2d(32, 32, 3, padding=1, bias=False)


def plain() -> nn.Module:
    return nn.Sequential(*[conv() for _ in range(4)])


class Reused(nn.Module):
    """One module, run several times."""

    def __init__(self, layer: nn.Module, times: int) -> None:
        super().__init__()
        self.layer, self.times = layer, times

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.layer(x)
        return x


def one_tensor() -> nn.Module:
    net = plain()
    for layer in net:
        layer.weight = net[0].weight
    return net


def banked() -> nn.Module:
    bank = tn.TemplateBank(2, 32, 32, 3)
    return nn.Sequential(*[tn.SConv2d(bank) for _ in range(4)])


class Mixed(nn.Module):
    """A parametrization that replaces a weight by a mix of shared templates."""

    def __init__(self, templates: nn.Parameter) -> None:
        super().__init__()
        self.templates = templates
        self.coefficients = nn.Parameter(torch.randn(2))

    def forward(self, original: Tensor) -> Tensor:
        return torch.tensordot(self.coefficients, self.templates, dims=1)


def parametrized() -> nn.Module:
    net, templates = plain(), nn.Parameter(torch.randn(2, 32, 32, 3, 3))
    for layer in net:
        parametrize.register_parametrization(layer, "weight", Mixed(templates))
    return net


def shifted() -> nn.Module:
    return nn.Sequential(nn.Conv2d(32, 32, 1, bias=False), tn.Shift2d(32), nn.Conv2d(32, 32, 1, bias=False))


@pytest.mark.parametrize(
    ("build", "params", "dense", "macs", "generation", "moved"),
    [
        (plain, 36_864, DENSE, MACS, 0, 0),
        (lambda: Reused(conv(), 4), 9_216, WEIGHT, MACS, 0, 0),
        (one_tensor, 9_216, DENSE, MACS, 0, 0),
        (banked, 18_440, DENSE, MACS, 4 * 2 * WEIGHT, 0),
        (parametrized, 18_440 + DENSE, DENSE, MACS, 4 * 2 * WEIGHT, 0),  # it keeps the dense originals
        (shifted, 2_048, 2_048, 2_048 * PIXELS, 0, 2 * 4 * 32 * PIXELS),
    ],
)
def test_the_table_of_shared_weights(
    build: Callable[[], nn.Module], params: int, dense: int, macs: int, generation: int, moved: int
) -> None:
    report = inspect(build(), (32, 16, 16))
    assert (report.params, report.dense_params, report.macs) == (params, dense, macs)
    assert (report.generation_macs, report.shift_bytes) == (generation, moved)
    assert round(report.macs / 1e6, 2) == (0.52 if moved else 9.44)


def test_plain_layers() -> None:
    net = nn.Sequential(
        nn.Conv2d(4, 8, (3, 5), stride=2, padding=1, bias=True),  # 16 x 16 -> 8 x 7
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3, padding="same", dilation=2, groups=4, bias=False),
        nn.ConvTranspose2d(16, 6, 2, stride=2),  # -> 16 x 14
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 10),
    )
    report = inspect(net, (4, 16, 16))
    assert report.params == report.dense_params == (8 * 4 * 15 + 8) + 16 + 16 * 2 * 9 + (16 * 6 * 4 + 6) + 70
    macs = {row.name: row.macs for row in report.rows}
    assert macs["0"] == 8 * 4 * 15 * 8 * 7
    assert macs["3"] == 16 * 2 * 9 * 8 * 7
    assert macs["4"] == 16 * 6 * 4 * 8 * 7
    assert macs["7"] == 60
    assert report.macs == sum(macs.values())
    assert [row.output for row in report.rows if row.name in ("0", "4", "7")] == [(1, 8, 8, 7), (1, 6, 16, 14), (1, 10)]


class Body(nn.Module):
    """A stem, four equal convolutions with bias, a classifier: what techniques convert."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(*[nn.Conv2d(8, 8, 3, padding=1) for _ in range(4)])
        self.fc = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.stem(x)).mean((2, 3)))


ENDS = (3 * 8 * 9 + 8) + 90  # parameters of stem and classifier
ENDS_MACS = 3 * 8 * 9 * 144 + 80  # on 12 x 12
BODY = 4 * (8 * 8 * 9 + 8)


def converted(technique: Any) -> tuple[nn.Module, Report]:
    net = tn.convert(Body(), technique)
    report = inspect(net, (3, 12, 12))
    assert report.dense_params == ENDS + BODY
    return net, report


def test_template_bank() -> None:
    net, report = converted(tn.SoftSharing(templates=3))
    assert report.params == ENDS + 3 * 576 + 4 * (3 + 8)
    assert report.macs == ENDS_MACS + 4 * 576 * 144
    assert report.generation_macs == 4 * 3 * 576
    assert [row.params for row in report.rows if row.kind == "SConv2d"] == [3 * 576 + 11, 11, 11, 11]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(torch.zeros(1, 3, 12, 12))
    assert counter.get_total_flops() == 2 * (
        report.macs + report.generation_macs
    )  # the counter alone does not tell them apart


def test_a_bank_registered_beside_its_layers_stands_for_nothing() -> None:
    net = nn.Module()
    net.bank = tn.TemplateBank(2, 32, 32, 3)
    net.layers = nn.Sequential(*[tn.SConv2d(net.bank) for _ in range(4)])
    net.forward = net.layers.forward  # type: ignore[method-assign]
    report = inspect(net, (32, 16, 16))
    assert (report.params, report.dense_params, report.macs) == (18_440, DENSE, MACS)
    assert [row.params for row in report.rows] == [2 * WEIGHT, 2, 2, 2, 2]
    assert (report.rows[0].kind, report.rows[0].calls) == ("TemplateBank", 0)


def test_filter_basis() -> None:
    _, report = converted(tn.FilterBasis(shared_rank=3, unique_rank=1, bases=2))
    basis = 2 * 3 * 72 + 4 * 72
    assert report.params == ENDS + basis + 4 * (2 * 4 + 8 * 4 + 8)  # norms, coefficients, biases
    assert report.macs == ENDS_MACS + 4 * (4 * 72 + 8 * 4) * 144
    assert report.generation_macs == 0
    rows = [row for row in report.rows if row.kind == "BasisConv2d"]
    assert [row.params for row in rows] == [basis + 48, 48, 48, 48]  # one row each, with everything inside
    assert [row.macs for row in rows] == [(4 * 72 + 8 * 4) * 144] * 4


def test_shift() -> None:
    net, report = converted(tn.Shift(expansion=2.0))
    assert report.params == ENDS + 4 * (8 * 16 + 2 * 16 + 16 * 8 + 8)
    assert report.macs == ENDS_MACS + 4 * 2 * 8 * 16 * 144
    assert report.shift_bytes == 4 * 2 * 4 * 16 * 144
    assert {row.kind for row in report.rows} == {"Conv2d", "ShiftConv2d", "Linear"}
    assert not any("copy" in op or "zero" in op for op in report.uncounted)
    folded = inspect(tn.fold(net.eval()), (3, 12, 12))  # the shift is now a depthwise convolution, and costs as one
    assert folded.macs == report.macs + 4 * 16 * 9 * 144
    assert folded.params == report.params + 4 * 16 * 9
    assert folded.shift_bytes == 0


class ChannelsLast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(memory_format=torch.channels_last))


def test_a_shift_in_its_depthwise_form_multiplies_nothing() -> None:
    net = ChannelsLast(tn.Shift2d(32))
    x = torch.zeros(1, 32, 16, 16)
    with FlopCounterMode(display=False) as counter:
        net(x)
    assert counter.get_total_flops() > 0  # so this test can fail
    assert inspect(net, (32, 16, 16)).macs == 0
    assert inspect(net, (32, 16, 16)).shift_bytes == inspect(shifted(), (32, 16, 16)).shift_bytes


def test_weight_sharing() -> None:
    _, report = converted(tn.WeightSharing(rate=2))
    assert report.params == ENDS + BODY // 2
    assert (report.macs, report.generation_macs) == (ENDS_MACS + 4 * 576 * 144, 0)
    shared = report.rows[1]
    assert (shared.names, shared.calls) == (("body.0", "body.1"), 2)
    assert (shared.params, shared.dense_params) == (584, 2 * 584)


@pytest.mark.parametrize(
    ("fusion", "scales", "fused"),
    [("mean", 0, 1), ("choose_first", 0, 0), ("scalar_weighted_mean", 4, 1), ("channel_weighted_mean", 4 * 8, 1)],
)
def test_fused_weight_sharing(fusion: str, scales: int, fused: int) -> None:
    _, report = converted(tn.WeightSharing(rate=4, fusion=fusion, trained=True))
    assert report.params == ENDS + BODY + scales
    assert report.macs == ENDS_MACS + 4 * 576 * 144
    assert report.generation_macs == fused * 4 * (4 * 576)  # all four weights, each time the layer runs


def test_widths() -> None:
    net, report = converted(tn.Slimmable(widths=(0.5, 1.0)))
    assert report.width == 1.0
    assert report.macs == ENDS_MACS + 4 * 576 * 144
    tn.set_width(net, 0.5)
    narrow = inspect(net, (3, 12, 12))
    assert (narrow.width, narrow.params) == (0.5, report.params)
    assert narrow.macs == 3 * 4 * 9 * 144 + 4 * (4 * 4 * 9) * 144 + 40
    assert ", width 0.5" in str(narrow)
    assert inspect(Body(), (3, 12, 12)).width is None


def test_layers_that_never_run_and_containers_with_parameters() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Linear(5, 7)
            self.scale = nn.Parameter(torch.ones(3))
            self.inner = nn.Conv2d(3, 3, 1, bias=False)
            self.kernel = nn.Parameter(torch.ones(2, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(self.inner(x), self.kernel)

    report = inspect(nn.Sequential(Block()), (3, 4, 4))
    assert [(row.name, row.kind, row.params, row.macs, row.calls, row.output) for row in report.rows] == [
        ("0", "Block", 9, 6 * 16, 1, (1, 2, 4, 4)),  # its own, without the layers inside
        ("0.unused", "Linear", 42, 0, 0, None),
        ("0.inner", "Conv2d", 9, 9 * 16, 1, (1, 3, 4, 4)),
    ]
    assert inspect(nn.Conv2d(3, 2, 1), (3, 4, 4)).rows[0].names == ("",)


@pytest.mark.parametrize("fused", [True, False])
def test_attention_counts_its_products(fused: bool) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(2).mT  # (1, 16, 32)
            if fused:
                return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])
            return self.attention(x, x, x)[0]

    report = inspect(Attention(), (32, 4, 4))
    products = 2 * 16 * 16 * 32
    assert report.macs == (products if fused else 4 * 16 * 32 * 32 + products)
    assert [row.params for row in report.rows if row.kind == "MultiheadAttention"] == [4 * 32 * 32 + 4 * 32]


def test_matrix_times_vector() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            matrix, vector = x[0, 0], x[0, 0, 0]
            return torch.addmv(vector, matrix, matrix.mv(vector)).dot(vector)

    assert inspect(Product(), (1, 6, 6)).macs == 36 + 36 + 6


@pytest.mark.parametrize("kind", ["tuple", "dict", "none"])
def test_several_outputs(kind: str) -> None:
    class Outputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Any:
            y = self.layer(x)
            return {"tuple": (y, x), "dict": {"out": y, "aux": x}, "none": None}[kind]

    report = inspect(nn.Sequential(Outputs()), (3, 4, 4))
    assert report.macs == 12 * 16


def test_an_error_that_the_network_handles_itself() -> None:
    class Handles(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrong, self.right = nn.Sequential(nn.Conv2d(5, 4, 1)), nn.Conv2d(3, 4, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            try:
                return self.wrong(x)
            except RuntimeError:
                return self.right(x)

    report = inspect(Handles(), (3, 4, 4))
    assert {row.name: row.macs for row in report.rows if row.macs} == {"right": 12 * 16}


@pytest.mark.parametrize("change", ["half", "double", "meta", "compiled", "inference"])
def test_dtypes_devices_and_wrappers_do_not_matter(change: str) -> None:
    net: Any = tn.convert(Body(), tn.SoftSharing(templates=2))
    expected = inspect(net, (3, 12, 12))
    if change == "compiled":
        net = torch.compile(net, backend="eager")
    elif change == "meta":
        net = net.to("meta")
    elif change != "inference":
        net = getattr(net, change)()
    with torch.inference_mode(change == "inference"):
        report = inspect(net, (3, 12, 12))
    assert (report.model, report.rows) == ("Body", expected.rows)


def test_rows_and_json_and_text() -> None:
    net = tn.convert(nn.Sequential(Body(), nn.ReLU()), tn.WeightSharing(rate=2))
    report = inspect(net, [3, 12, 12])
    data = json.loads(json.dumps(report.to_dict()))
    for key in ("params", "dense_params", "macs", "generation_macs", "shift_bytes"):
        assert data[key] == sum(row[key] for row in data["rows"]) == getattr(report, key)
    assert (data["model"], data["input_size"], data["width"]) == ("Sequential", [3, 12, 12], None)
    assert data["uncounted"] == {"aten.mean": 1, "aten.relu": 1}
    assert list(data["rows"][1]) == [
        *("names", "kind", "params", "dense_params", "macs", "generation_macs", "shift_bytes", "output", "calls")
    ]
    text = str(report).splitlines()
    assert text[0] == "Sequential on 3x12x12, batch 1"
    plain = f"{report.dense_params:,} if every converted layer were the plain layer that it replaces (1.79x)"
    assert text[1] == f"parameters: {report.params:,} stored; {plain}"
    assert text[2] == "size: 0.0 MiB as saved, with buffers"
    assert text[3] == f"MACs: {report.macs:,}"
    assert text[5].split() == ["layer", "kind", "output", "params", "dense", "MACs", "calls"]
    assert [line.split()[0] for line in text[6:10]] == ["0.stem", "0.body.0", "0.body.2", "0.fc"]
    assert not any("ReLU" in line for line in text)
    assert text[-1] == "not counted (no formula): mean 1x, relu 1x"


def test_the_size_is_that_of_the_saved_tensors() -> None:
    net = banked().half()
    net.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    net.register_buffer("scratch", torch.zeros(99), persistent=False)
    report = inspect(net, (32, 16, 16))
    assert report.size_bytes == 2 * (2 * WEIGHT + 4 * 2) + 8 == report.to_dict()["size_bytes"]
    tied = one_tensor()
    assert inspect(tied, (32, 16, 16)).size_bytes == 4 * WEIGHT
    large = Report("Net", (3, 8, 8), (), size_bytes=82_300_000)
    assert "\nsize: 78.5 MiB as saved, with buffers\n" in str(large)


class Careful(nn.Module):
    """Copies its input in several ways before it computes anything."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.empty_like(x).copy_(x.detach().clone()).transpose(1, 2).contiguous().double()
        return torch.relu(y + torch.zeros_like(y))


def test_operations_that_allocate_or_copy_are_no_computation() -> None:
    assert inspect(Careful(), (3, 8, 8)).uncounted == {"aten.add": 1, "aten.relu": 1}


class Restless(nn.Module):
    """Changes its buffers, draws random numbers, narrows itself, and may fail."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.net = tn.convert(Body(), tn.Slimmable(widths=(0.5, 1.0)))
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(3))
        self.register_buffer("nothing", None)
        self.fails = fails

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.latest = torch.rand(3)
        tn.set_width(self.net, 0.5)
        y = self.net(self.norm(x + torch.randn_like(x)))
        if self.fails:
            raise RuntimeError("on purpose\nwith details")
        return y


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_behind(fails: bool) -> None:
    net = Restless(fails).train()
    net.norm.eval()
    handle = net.norm.register_forward_hook(lambda module, args, output: None)
    hooks = {id(m): (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()}
    modes = [m.training for m in net.modules()]
    before = copy.deepcopy(net.state_dict())
    identities = {name: id(buffer) for name, buffer in net.named_buffers()}
    state, fast, grad = torch.get_rng_state(), torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()
    if fails:
        with pytest.raises(tn.IncompatibleModelError, match="on purpose"):
            inspect(net, (3, 12, 12))
    else:
        inspect(net, (3, 12, 12))
    assert [m.training for m in net.modules()] == modes
    assert {id(m): (dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in net.modules()} == hooks
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert {name: id(buffer) for name, buffer in net.named_buffers()} == identities
    assert torch.equal(torch.get_rng_state(), state)
    assert (torch.backends.mha.get_fastpath_enabled(), torch.is_grad_enabled()) == (fast, grad)
    assert inspect(net.net, (3, 12, 12)).width == 1.0
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    handle.remove()


def test_a_graph_made_before_can_still_be_used() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    loss = net(torch.randn(2, 3, 4, 4)).sum()
    inspect(net, (3, 4, 4))
    loss.backward()
    assert net[0].weight.grad is not None


@pytest.mark.parametrize("size", [(3, 32), (3, 32, 32, 1), (3, 0, 32), (3, 32.0, 32), (True, 8, 8), 32, "abc"])
def test_impossible_input_sizes(size: Any) -> None:
    with pytest.raises(tn.ConfigError, match=r"input_size=.*expected channels \(1 to 1,024\), height and width"):
        inspect(plain(), size)


def test_a_network_that_does_not_run_on_the_input() -> None:
    with pytest.raises(tn.IncompatibleModelError) as caught:
        inspect(plain(), (3, 16, 16))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("Sequential does not run on input_size=(3, 16, 16): Given groups=1")
    assert message.endswith("inspect(model, input_size=(C, H, W))")
    with pytest.raises(tn.IncompatibleModelError, match="ModuleList"):
        inspect(nn.ModuleList([conv()]), (32, 16, 16))


def test_lazy_layers_are_refused() -> None:
    with pytest.raises(tn.IncompatibleModelError, match=r"'0\.weight' of Sequential has no shape yet"):
        inspect(nn.Sequential(nn.LazyConv2d(4, 1)), (3, 4, 4))


@pytest.mark.parametrize(
    ("name", "params", "macs"),
    [
        ("resnet18", 11_689_512, 1_814_073_344),
        ("resnet50", 25_557_032, 4_089_184_256),
        ("vit_b_16", 86_567_656, 17_563_828_224),
    ],
)
def test_torchvision_networks(name: str, params: int, macs: int) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        net = models.get_model(name)
    report = inspect(net, (3, 224, 224))
    assert (report.params, report.dense_params, report.macs) == (params, params, macs)


def test_timm_networks() -> None:
    timm = pytest.importorskip("timm")
    report = inspect(timm.create_model("resnet26"), (3, 224, 224))
    assert (report.params, report.dense_params) == (15_995_176, 15_995_176)
    assert inspect(timm.create_model("vit_tiny_patch16_224"), (3, 224, 224)).params == 5_717_416


class ClassToken(nn.Sequential):
    """Without gradients, a view of a parameter that needs them."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4))
        self.token = nn.Parameter(torch.zeros(1, 1, 4))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.token.expand(len(x), -1, -1)) + x.mean()


def test_views_of_parameters() -> None:
    model = ClassToken()
    assert inspect(model, (3, 8, 8)).params == 4 * 4 + 4 + 4
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_size_is_the_networks_own_or_asked_for() -> None:
    assert inspect(tn.create_model("resnet20", in_chans=1)).input_size == (1, 32, 32)
    assert inspect(tn.convert(tn.create_model("cifar_mobilenetv2"), "weight-sharing")).input_size == (3, 32, 32)
    net = plain()
    with pytest.raises(tn.ConfigError, match=r"does not state its input size: give input_size=\(C, H, W\)"):
        inspect(net)
    net.pretrained_cfg = {"input_size": (32, 20, 20)}
    assert inspect(net).input_size == (32, 20, 20)
