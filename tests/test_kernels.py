"""The fast forms: every one computes the same, in every layout and type, and what is kept between uses never grows stale."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import data_parallel
import laws
import reference
import thriftnet as tn
from networks import NETWORKS, perturb
from test_laws import CONFIGS, converted
from thriftnet.kernels import force
from thriftnet.kernels.arena import SMALLEST, Arena
from thriftnet.kernels.dispatch import FORMS
from thriftnet.kernels.orthogonality import BlockPenalty, penalty
from thriftnet.kernels.shift import choose
from thriftnet.techniques.filter_basis import BasisConv2d

CPU_FORMS = [(kernel, form) for kernel, forms in FORMS.items() for form in forms if form not in ("triton", "fused")]
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
USING = {
    "shift": ("shift",),
    "bank": ("soft",),
    "fusion": ("weight-channel", "weight-strided-scalar"),
    "act-norm": ("soft",),
}


# ------------------------------------------------------------------------------------------------ every choice, forced


@pytest.mark.parametrize(("kernel", "form"), CPU_FORMS)
def test_laws_hold_whatever_is_forced(kernel: str, form: str, tmp_path: Path) -> None:
    network = NETWORKS["chain"]
    with force(**{kernel: form}):
        for config in USING[kernel]:
            model, x = converted(network, config), network.image()
            laws.law_fold_is_equal(model, x)
            laws.law_gradients(model, x)
            laws.law_compiles(model, x)
            laws.law_copies_keep_ties(model, x)
            laws.law_average_moves_once(model)
            laws.law_exports(model, x)
            laws.law_save_load(model, network.make(7), x, tmp_path / config)


@pytest.mark.parametrize(("kernel", "form"), CPU_FORMS)
def test_forced_forms_give_the_gradients_of_the_loops(kernel: str, form: str) -> None:
    """Against the network that computes weights and shifts in no fast form: folded, with its weights as leaves."""
    network = NETWORKS["residual"]
    for config in USING[kernel]:
        model = converted(network, config)
        x = network.image().requires_grad_()
        y = network.image().requires_grad_()
        with force(**{kernel: form}):
            (one,) = torch.autograd.grad(model(x).square().sum(), x)
        (other,) = torch.autograd.grad(tn.fold(model)(y).square().sum(), y)
        laws.assert_close(one, other, 1e-12, f"{config} with {kernel}={form}")


def test_unknown_forms_are_refused() -> None:
    with pytest.raises(tn.ConfigError, match=r"unknown kernel 'shifts': did you mean 'shift'"), force(shifts="planes"):
        pass
    with (
        pytest.raises(tn.ConfigError, match=r"unknown form of kernel shift 'plane': did you mean 'planes'"),
        force(shift="plane"),
    ):
        pass
    with (
        force(shift="triton"),
        pytest.raises(tn.ConfigError, match=r"forced, but the input is on cpu: possible there are planes"),
    ):
        tn.Shift2d(9)(torch.zeros(1, 9, 2, 2))


def test_force_nests_and_ends() -> None:
    x = torch.zeros(1, 9, 4, 4)
    with force(shift="windows"):
        with force(bank="alone", shift="depthwise"):
            assert choose(x).form == "depthwise"
        assert choose(x).form == "windows"
    assert choose(x).form == "planes"


def test_explain_names_every_layer_and_leaves_the_network_alone() -> None:
    model = tn.create_model("shiftresnet20").train()
    before = laws.everything_about(model)
    found = tn.kernels.explain(model, torch.randn(2, 3, 32, 32))
    assert laws.everything_about(model) == before
    assert {name for name, _ in found.rows} == {n for n, m in model.named_modules() if isinstance(m, tn.Shift2d)}
    assert {choice.form for _, choice in found.rows} == {"planes"}
    model = model.to(memory_format=torch.channels_last)
    last = tn.kernels.explain(model, torch.randn(2, 3, 32, 32).contiguous(memory_format=torch.channels_last))
    assert {choice.form for _, choice in last.rows} == {"depthwise"}
    assert "channels_last: a depthwise convolution" in str(last)
    assert last.to_dict()["layer1.0.conv.shift"]["form"] == "depthwise"


def test_explain_sees_banks_at_work() -> None:
    model = tn.convert(NETWORKS["chain"].make(), "soft-sharing(templates=2)")
    assert {c.form for _, c in tn.kernels.explain(model, NETWORKS["chain"].image()).rows} == {"together"}
    with torch.no_grad():
        assert {c.form for _, c in tn.kernels.explain(model, NETWORKS["chain"].image()).rows} == {"alone"}


# ------------------------------------------------------------------------------------------------ shift


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["planes", "windows", "depthwise"])
@pytest.mark.parametrize(("channels", "kernel_size", "dilation"), [(9, 3, 1), (20, 3, 2), (5, 2, 1), (27, 5, 1), (9, 3, 7)])
def test_shift_moves_bits(
    form: str, layout: str, dtype: torch.dtype, channels: int, kernel_size: int, dilation: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, channels, 6, 5, generator=generator).to(dtype).contiguous(memory_format=LAYOUTS[layout])
    layer = tn.Shift2d(channels, kernel_size, dilation).to(dtype)
    x.requires_grad_()
    with force(shift=form):
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
    for memory_format in LAYOUTS.values():
        assert torch.equal(tn.Shift2d(20)(x.contiguous(memory_format=memory_format)), reference.shift(x, 3, 1))


def test_infinities_spread_in_the_depthwise_form_only() -> None:
    x = torch.zeros(1, 9, 5, 5)
    x[0, 0, 2, 2] = float("inf")
    for form, broken in (("planes", 1), ("windows", 1), ("depthwise", 9)):
        with force(shift=form):
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


# ------------------------------------------------------------------------------------------------ banks


def soft(seed: int = 0) -> nn.Module:
    return perturb(tn.convert(NETWORKS["chain"].make(seed), "soft-sharing(templates=2)")).eval()


def loss_and_gradients(model: nn.Module, x: Tensor, form: str) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    with force(bank=form):
        loss = model(x).square().sum()
        loss.backward()
    return [loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    for got, wanted in zip(one, other, strict=True):
        laws.assert_close(got, wanted, 1e-10, "together against alone")


def test_a_bank_mixes_once_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from thriftnet.kernels import bank

    mixed: list[int] = []
    real = bank.mix
    monkeypatch.setattr(
        bank, "mix", lambda matrix, templates, out: (mixed.append(len(matrix)), real(matrix, templates, out))
    )
    model, x = soft(), NETWORKS["chain"].image()
    for _ in range(3):
        model(x).sum().backward()
    assert mixed == [4, 4, 4]
    first = model(x).sum()
    second = model(x).sum()
    assert mixed == [4, 4, 4, 4]  # two forwards of one graph need them once
    (first + second).backward()
    model(x)
    model(x)
    assert mixed == [4] * 6  # nobody held the first one's weights


def test_together_equals_alone_step_after_step() -> None:
    one, other = soft(), soft()
    x = NETWORKS["chain"].image()
    optimizers = [torch.optim.SGD(model.parameters(), 0.01, momentum=0.9) for model in (one, other)]
    for _ in range(4):
        assert_same(loss_and_gradients(one, x, "together"), loss_and_gradients(other, x, "alone"))
        for optimizer in optimizers:
            optimizer.step()


CHANGES = {
    "in place": lambda bank: bank.templates.detach().mul_(2),
    "copy_": lambda bank: bank.templates.detach().copy_(torch.ones_like(bank.templates)),
    "new data": lambda bank: setattr(bank.templates, "data", bank.templates.data * 3),
    "new parameter": lambda bank: setattr(bank, "templates", nn.Parameter(bank.templates.detach() * 4)),
    "load_state_dict": lambda bank: bank.load_state_dict({"templates": bank.templates.detach() * 5}),
    "assign=True": lambda bank: bank.load_state_dict({"templates": bank.templates.detach() * 6}, assign=True),
    "double": lambda bank: bank.float(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_bank_is_mixed_anew(change: str) -> None:
    """While a graph of the old weights is alive, which is when weights are used again."""
    model, x = soft(), NETWORKS["chain"].image()
    model(x).sum().backward()
    alive = model(x)
    before = model.convs[1].weight
    assert model.convs[1].weight is before
    CHANGES[change](model.convs[0].bank)
    if change == "double":
        model, x = model.float(), x.float()
    wanted = reference.mix_templates(model.convs[1].coefficients, model.convs[1].bank.templates)
    laws.assert_close(model.convs[1].weight.detach(), wanted.detach(), 1e-6, change)
    assert alive.isfinite().all()
    with torch.no_grad():
        model.convs[1].coefficients.add_(1)
    wanted = reference.mix_templates(model.convs[1].coefficients, model.convs[1].bank.templates)
    laws.assert_close(model.convs[1].weight.detach(), wanted.detach(), 1e-6, "coefficients")


def test_two_forwards_and_two_backwards() -> None:
    """In either order, with weights that both graphs share."""
    x, y = NETWORKS["chain"].image(), NETWORKS["chain"].image(1)
    sums = []
    for form in ("together", "alone"):
        model = soft()
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)
        with force(bank=form):
            one, other = model(x).square().sum(), model(y).square().sum()
        one.backward()
        other.backward()
        sums.append([parameter.grad for parameter in model.parameters()])
    assert_same(*sums)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant: bool) -> None:
    found = []
    for form in ("together", "alone"):
        model, x = soft(), torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with force(bank=form):
            for _ in range(2):
                model.zero_grad(set_to_none=True)
                out = x.requires_grad_()
                for conv in model.convs:
                    out = checkpoint(lambda given, conv=conv: conv(given).relu(), out, use_reentrant=reentrant)
                out.sum().backward()
        found.append([parameter.grad for parameter in model.convs.parameters()])
    assert_same(*found)


def test_layers_that_did_not_run_get_no_gradient() -> None:
    model, x = soft(), torch.randn(1, 8, 4, 4, dtype=torch.float64)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        model.convs[1](model.convs[0](x)).sum().backward()
    assert model.convs[0].coefficients.grad is not None
    assert model.convs[2].coefficients.grad is None


def test_layers_that_do_not_train() -> None:
    model, x = soft(), NETWORKS["chain"].image()
    model(x).sum().backward()
    model.zero_grad(set_to_none=True)
    model.convs[0].bank.templates.requires_grad_(False)
    model.convs[1].coefficients.requires_grad_(False)
    model(x).sum().backward()
    assert model.convs[0].bank.templates.grad is None
    assert model.convs[1].coefficients.grad is None
    assert model.convs[2].coefficients.grad is not None


def test_gradients_of_gradients() -> None:
    results = []
    for form in ("together", "alone"):
        model, x = soft(), NETWORKS["chain"].image()
        model(x).sum().backward()
        parameters = list(model.convs.parameters())
        with force(bank=form):
            grads = torch.autograd.grad(model(x).square().sum(), parameters, create_graph=True)
            results.append(list(torch.autograd.grad(sum(grad.square().sum() for grad in grads), parameters)))
    assert_same(*results)


def test_a_step_between_forward_and_backward_is_refused() -> None:
    model, x = soft(), NETWORKS["chain"].image()
    model(x).sum().backward()
    loss = model(x).sum()
    with torch.no_grad():
        model.convs[0].bank.templates.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_start_with_nothing_kept() -> None:
    model, x = soft(), NETWORKS["chain"].image()
    model(x)
    out = model(x)
    for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301  # our own bytes
        assert made.convs[0].bank.mixer._round is None
        assert len(made.convs[0].bank.mixer._layers) == 4
        with torch.no_grad():
            made.convs[0].bank.templates.mul_(0)
        assert made.convs[0].weight.abs().max() == 0
    assert torch.equal(model(x), out)


def test_copies_repeat_the_bits() -> None:
    """A training that is taken up again in a new process must go on as the old one would have."""
    model, x = soft(), NETWORKS["chain"].image()
    for _ in range(2):
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)
    made = copy.deepcopy(model)
    fresh = tn.convert(NETWORKS["chain"].make(7), "soft-sharing(templates=2)").eval()
    fresh.load_state_dict(model.state_dict())
    for network in (model, made, fresh):
        network(x).square().sum().backward()
    for one, other, third in zip(model.parameters(), made.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
        assert torch.equal(one.grad, third.grad)


def test_functional_calls_see_their_own_parameters() -> None:
    model, x = soft().eval(), NETWORKS["chain"].image()
    model(x)
    alive = model(x)
    doubled = {name: parameter.detach() * 2 for name, parameter in model.named_parameters()}
    called = torch.func.functional_call(model, doubled, (x,))
    other = copy.deepcopy(model)
    other.load_state_dict({**model.state_dict(), **doubled})
    laws.assert_close(called.detach(), other(x).detach(), 1e-12, "functional_call")
    assert (alive - called).abs().max() > 1e-3


def test_widths_change_between_forwards() -> None:
    network = NETWORKS["chain"]
    model = perturb(tn.convert(tn.convert(network.make(), "soft-sharing(templates=2)"), CONFIGS["slimmable"])).eval()
    for width in (0, 1, 0, 1):
        tn.set_width(model, width)
        laws.assert_close(model(network.image()).detach(), tn.fold(model)(network.image()).detach(), 1e-12, f"width {width}")


def test_two_processes_with_banks_together(tmp_path: Path) -> None:
    """Several steps' worth of forwards: in the second one banks mix together."""
    x, target = torch.cat([NETWORKS["chain"].image(0), NETWORKS["chain"].image(1)])[:4], torch.arange(4) % 5
    model = converted(NETWORKS["chain"], "soft")
    model(x).sum().backward()
    model.zero_grad(set_to_none=True)
    one = data_parallel.gradients(model, x, target)
    two = data_parallel.gradients_of_two_processes({"soft": model}, x, target, tmp_path)["soft"]
    for name, grad in one.items():
        laws.assert_close(two[name], grad, 1e-10, name)


# ------------------------------------------------------------------------------------------------ memory, fusion, penalty


def test_an_arena_gives_memory_only_when_nobody_holds_it() -> None:
    arena, like = Arena(), torch.empty(0)
    size = SMALLEST // 4
    first = arena.empty((size,), like)
    place = first.data_ptr()
    assert place % 64 == 0
    view = first[10:]
    del first
    second = arena.empty((size,), like)
    assert second.data_ptr() != place, "a view still holds the memory"
    del view
    assert arena.empty((size,), like).data_ptr() == place
    held = [arena.empty((size,), like) for _ in range(9)]
    assert len({tensor.data_ptr() for tensor in [second, *held]}) == 10
    assert len(arena._blocks) <= 5
    assert sys.getrefcount(arena._blocks) >= 1


def test_gradients_are_not_overwritten_by_the_next_step() -> None:
    bank = tn.TemplateBank(3, 128, 128, 3)  # large enough for the arena
    layers = [tn.SConv2d(bank) for _ in range(2)]
    x = torch.randn(1, 128, 2, 2)
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
    (layers[0](x).sum() + layers[1](x).sum()).backward()
    assert torch.equal(weight, before), "a detached weight is a snapshot"


def test_a_fused_weight_is_computed_once_per_step() -> None:
    model, x = converted(NETWORKS["chain"], "weight-channel").train(), NETWORKS["chain"].image()
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
@pytest.mark.parametrize("config", [name for name in CONFIGS if name != "weight"])
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
