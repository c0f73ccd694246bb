"""The kernels: every implementation computes the same in every layout and type, and nothing kept between uses grows stale."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import laws
import reference
import thriftnet as tn
from networks import NETWORKS, perturb
from test_laws import CONFIGS, converted
from thriftnet.kernels import force
from thriftnet.kernels.dispatch import IMPLEMENTATIONS
from thriftnet.kernels.orthogonality import BlockPenalty, penalty
from thriftnet.kernels.shift import choose
from thriftnet.techniques.filter_basis import BasisConv2d

PACKED = ("convolution",)  # of packed networks, which nothing is converted in: tests/test_pack.py forces it
CPU_IMPLEMENTATIONS = [
    (kernel, implementation)
    for kernel, implementations in IMPLEMENTATIONS.items()
    for implementation in implementations
    if implementation not in ("triton", "fused") and kernel not in PACKED
]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
USING = {
    "shift": ("shift(expansion=2.0)",),
    "bank": ("soft-sharing(templates=2)",),
    "fusion": (
        "weight-sharing(fusion='channel_weighted_mean')",
        "weight-sharing(mapping='strided', fusion='scalar_weighted_mean')",
    ),
    "act-norm": ("soft-sharing(templates=2)",),
}


# ------------------------------------------------------------------------------------------------ every choice, forced


@pytest.mark.parametrize(("kernel", "implementation"), CPU_IMPLEMENTATIONS)
def test_laws_hold_whatever_is_forced(kernel: str, implementation: str, tmp_path: Path) -> None:
    network = NETWORKS["chain"]
    with force(**{kernel: implementation}):
        for config in USING[kernel]:
            model, x = converted(network, config), network.image()
            laws.law_fold_is_equal(model, x)
            laws.law_gradients(model, x)
            laws.law_compiles(model, x)
            laws.law_copies_keep_ties(model, x)
            laws.law_average_moves_once(model)
            laws.law_exports(model, x)
            laws.law_save_load(model, network.make(7), x, tmp_path / config)


@pytest.mark.parametrize(("kernel", "implementation"), CPU_IMPLEMENTATIONS)
def test_forced_implementations_give_the_gradients_of_the_loops(kernel: str, implementation: str) -> None:
    """Against the network that computes weights and shifts the plain way: folded, with its weights as leaves."""
    network = NETWORKS["residual"]
    for config in USING[kernel]:
        model = converted(network, config)
        x = network.image().requires_grad_()
        y = network.image().requires_grad_()
        with force(**{kernel: implementation}):
            (one,) = torch.autograd.grad(model(x).square().sum(), x)
        (other,) = torch.autograd.grad(tn.fold(model)(y).square().sum(), y)
        laws.assert_close(one, other, 1e-12, f"{config} with {kernel}={implementation}")


def test_unknown_implementations_are_refused() -> None:
    with pytest.raises(tn.ConfigError, match=r"unknown kernel 'shifts': did you mean 'shift'"), force(shifts="planes"):
        pass
    with (
        pytest.raises(tn.ConfigError, match=r"unknown implementation of kernel shift 'plane': did you mean 'planes'"),
        force(shift="plane"),
    ):
        pass
    with (
        force(shift="triton"),
        pytest.raises(tn.ConfigError, match=r"forced, but the input is on cpu: expected planes"),
    ):
        tn.Shift2d(9)(torch.zeros(1, 9, 2, 2))


def test_importing_the_techniques_loads_no_compiler() -> None:
    """It takes seconds, more than torch itself."""
    code = "import sys, thriftnet.techniques, thriftnet.kernels.pack; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_compiled_graphs_follow_what_is_forced() -> None:
    graphs: list[str] = []

    def record(module: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(str(module.graph))
        return module.forward

    layer, x = tn.Shift2d(9), torch.randn(1, 9, 4, 4)
    compiled = torch.compile(layer, fullgraph=True, backend=record)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(compiled(x), layer(x))
            with force(shift="windows"):
                assert torch.equal(compiled(x), layer(x))
    assert ["conv2d" in graph for graph in graphs] == [True, False]


def test_force_nests_and_ends() -> None:
    x = torch.zeros(1, 9, 4, 4)
    with force(shift="windows"):
        with force(bank="alone", shift="depthwise"):
            assert choose(x).implementation == "depthwise"
        assert choose(x).implementation == "windows"
    assert choose(x).implementation == "planes"


def test_explain_names_every_layer_and_leaves_the_network_alone() -> None:
    model = tn.create_model("shiftresnet20").train()
    before = laws.everything_about(model)
    found = tn.kernels.explain(model, torch.randn(2, 3, 32, 32))
    assert laws.everything_about(model) == before
    assert {name for name, _ in found.rows} == {n for n, m in model.named_modules() if isinstance(m, tn.Shift2d)}
    assert {choice.implementation for _, choice in found.rows} == {"planes"}
    model = model.to(memory_format=torch.channels_last)
    last = tn.kernels.explain(model, torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert {choice.implementation for _, choice in last.rows} == {"depthwise"}
    assert "channels_last: a depthwise convolution" in str(last)
    assert last.to_dict()["layer1.0.conv.shift"]["implementation"] == "depthwise"


def test_explain_sees_banks_at_work() -> None:
    model = tn.convert(NETWORKS["chain"].make(), "soft-sharing(templates=2)")
    assert {c.implementation for _, c in tn.kernels.explain(model, NETWORKS["chain"].image()).rows} == {"together"}
    with torch.no_grad():
        assert {c.implementation for _, c in tn.kernels.explain(model, NETWORKS["chain"].image()).rows} == {"alone"}


# ------------------------------------------------------------------------------------------------ shift


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("implementation", ["planes", "windows", "depthwise"])
@pytest.mark.parametrize(("channels", "kernel_size", "dilation"), [(9, 3, 1), (20, 3, 2), (5, 2, 1), (27, 5, 1), (9, 3, 7)])
def test_shift_moves_bits(
    implementation: str, layout: str, dtype: torch.dtype, channels: int, kernel_size: int, dilation: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 6, 5, generator=generator).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    layer = tn.Shift2d(channels, kernel_size, dilation).to(dtype)
    x.requires_grad_()
    with force(shift=implementation):
        out = layer(x)
        (back,) = torch.autograd.grad(out, x, torch.ones_like(out))
    assert out.dtype == dtype
    assert torch.equal(out, reference.shift(x.detach(), kernel_size, dilation))
    y = x.detach().double().requires_grad_()
    assert torch.equal(
        back, torch.autograd.grad(reference.shift(y, kernel_size, dilation), y, torch.ones_like(y))[0].to(dtype)
    )


def test_large_maps_take_the_same_values() -> None:
    """Above the size from which only borders are cleared."""
    x = torch.randn(1, 20, 170, 165)
    expected = reference.shift(x, 3, 1)
    for memory_format in LAYOUTS.values():
        assert torch.equal(tn.Shift2d(20)(x.contiguous(memory_format=memory_format)), expected)


def test_infinities_spread_in_the_depthwise_implementation_only() -> None:
    x = torch.zeros(1, 9, 5, 5)
    x[0, 0, 2, 2] = float("inf")
    for implementation, broken in (("planes", 1), ("windows", 1), ("depthwise", 9)):
        with force(shift=implementation):
            out = tn.Shift2d(9)(x)
        assert out[0, 0, 3, 3] == float("inf")
        assert int((~out.isfinite()).sum()) == broken


def test_shift_keeps_its_type_under_autocast() -> None:
    x = torch.randn(2, 9, 4, 4).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(tn.Shift2d(9)(x), reference.shift(x, 3, 1))


def test_shift_takes_part_in_transforms() -> None:
    layer, x = tn.Shift2d(9).double(), torch.randn(2, 9, 4, 4, dtype=torch.float64)
    grad = torch.func.grad(lambda given: layer(given).square().sum())(x)
    y = x.clone().requires_grad_()
    layer(y).square().sum().backward()
    assert torch.equal(grad, y.grad)


# ------------------------------------------------------------------------------------------------ banks, fusion, penalty


def test_gradients_are_not_overwritten_by_the_next_step() -> None:
    bank = tn.TemplateBank(3, 8, 8, 3)
    layers = [tn.SConv2d(bank) for _ in range(4)]
    assert (
        tn.kernels.dispatch.IMPLEMENTATIONS["bank"][0]
        == layers[0].kernel_choice(torch.empty(0)).implementation
        == "together"
    )
    x = torch.randn(1, 8, 2, 2)
    kept = []
    for scale in (1.0, 2.0, 3.0):
        bank.templates.grad = None
        sum((layer(x) * scale).sum() for layer in layers).backward()
        kept.append(bank.templates.grad)
    for number in (1, 2):
        laws.assert_close(kept[number], (number + 1) * kept[0], 1e-5, f"gradient of step {number}")
    weight = layers[0].weight.detach()
    before = weight.clone()
    with torch.no_grad():
        bank.templates.mul_(2)
    sum(layer(x).sum() for layer in layers).backward()
    assert torch.equal(weight, before), "a detached weight is a snapshot"


def test_a_fused_weight_is_computed_once_per_step() -> None:
    model, x = (
        converted(NETWORKS["chain"], "weight-sharing(fusion='channel_weighted_mean')").train(),
        NETWORKS["chain"].image(),
    )
    shared = model.convs[0]
    held = shared.weight
    assert shared.weight is held
    with torch.no_grad():
        shared.scales.mul_(2)
    laws.assert_close(shared.weight.detach(), 2 * held.detach(), 1e-12, "fused anew")
    with torch.no_grad():
        assert shared.weight is not shared.weight
    one, other = model(x).square().sum(), model(x).sum()
    one.backward()
    other.backward()


def test_the_penalty_has_the_gradient_of_its_formula() -> None:
    shared = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    unique = torch.randn(2, 2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(BlockPenalty.apply, (shared, unique))
    assert torch.autograd.gradgradcheck(BlockPenalty.apply, (shared, unique))
    assert torch.autograd.gradcheck(lambda rows: penalty(rows, None), (shared,))
    orthonormal = torch.linalg.qr(torch.randn(5, 3, dtype=torch.float64)).Q.T
    assert penalty(orthonormal, None) < 1e-28


# ------------------------------------------------------------------------------------------------ folding


@pytest.mark.parametrize("prefer", ["", "speed", "size"])
@pytest.mark.parametrize("config", [name for name in CONFIGS if name != "weight-sharing"])
def test_eval_fold_is_equal_and_leaves_no_trace(config: str, prefer: str) -> None:
    network = NETWORKS["residual"]
    model, x = converted(network, config), network.image()
    wanted = model(x).detach()
    model.train()
    before = laws.everything_about(model)
    with tn.eval_fold(model, prefer=prefer) as folded:
        laws.assert_close(folded(x).detach(), wanted, 1e-12, "eval_fold")
        assert not any(type(module).__module__.startswith("thriftnet") for module in folded.modules())
    assert laws.everything_about(model) == before
    with pytest.raises(KeyError, match="inside"), tn.eval_fold(model):
        raise KeyError("inside")
    assert laws.everything_about(model) == before


def test_a_low_rank_is_kept_where_that_is_preferred() -> None:
    network = NETWORKS["chain"]
    for rank, kept in ((3, True), (7, False)):
        model = perturb(tn.convert(network.make(), tn.FilterBasis(shared_rank=rank, unique_rank=1))).eval()
        counts = {}
        for prefer in ("", "speed", "size"):
            folded = tn.fold(model, prefer=prefer)
            laws.assert_close(folded(network.image()).detach(), model(network.image()).detach(), 1e-12, prefer)
            counts[prefer] = sum(parameter.numel() for parameter in folded.parameters())
            assert not any(isinstance(module, BasisConv2d) for module in folded.modules())
        assert (counts["size"] < counts[""]) == (counts["speed"] < counts[""]) == kept
    with pytest.raises(tn.ConfigError, match=r"unknown prefer 'sped': did you mean 'speed'"):
        tn.fold(model, prefer="sped")


def test_a_preference_survives_saving(tmp_path: Path) -> None:
    network = NETWORKS["chain"]
    model = perturb(tn.convert(network.make(), tn.FilterBasis(shared_rank=3))).eval()
    folded = tn.fold(model, prefer="size")
    tn.save(folded, tmp_path / "kept")
    loaded = tn.load(tmp_path / "kept", model=network.make(7)).eval()
    assert torch.equal(loaded(network.image()), folded(network.image()))
