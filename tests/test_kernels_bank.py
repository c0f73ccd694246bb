"""Template banks that mix together: the same gradients as alone, and nothing kept that grows stale."""

from __future__ import annotations

import copy
import pickle
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


def soft(seed: int = 0) -> nn.Module:
    return perturb(tn.convert(NETWORKS["chain"].make(seed), "soft-sharing(templates=2)")).eval()


def loss_and_gradients(model: nn.Module, x: Tensor, implementation: str) -> list[Tensor]:
    model.zero_grad(set_to_none=True)
    with force(bank=implementation):
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
    for implementation in ("together", "alone"):
        model = soft()
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)
        with force(bank=implementation):
            one, other = model(x).square().sum(), model(y).square().sum()
        one.backward()
        other.backward()
        sums.append([parameter.grad for parameter in model.parameters()])
    assert_same(*sums)


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpoints(reentrant: bool) -> None:
    found = []
    for implementation in ("together", "alone"):
        model, x = soft(), torch.randn(2, 8, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        with force(bank=implementation):
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
    for implementation in ("together", "alone"):
        model, x = soft(), NETWORKS["chain"].image()
        model(x).sum().backward()
        parameters = list(model.convs.parameters())
        with force(bank=implementation):
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


def test_few_layers_mix_alone() -> None:
    bank = tn.TemplateBank(2, 4, 4, 3)
    layers = [tn.SConv2d(bank) for _ in range(3)]
    assert "3 layers" in layers[0].kernel_choice(torch.empty(0)).reason
    one_more = tn.SConv2d(bank)
    assert layers[0].kernel_choice(torch.empty(0)).implementation == "together"
    del one_more
    assert layers[0].kernel_choice(torch.empty(0)).implementation == "alone"


def test_widths_change_between_forwards() -> None:
    network = NETWORKS["chain"]
    model = perturb(
        tn.convert(tn.convert(network.make(), "soft-sharing(templates=2)"), CONFIGS["slimmable(widths=(0.5, 1.0))"])
    ).eval()
    for width in (0.5, 1, 0.5, 1):
        tn.set_width(model, width)
        laws.assert_close(model(network.image()).detach(), tn.fold(model)(network.image()).detach(), 1e-12, f"width {width}")


def test_two_processes_with_banks_together(tmp_path: Path) -> None:
    """Several steps' worth of forwards: in the second one banks mix together."""
    x, target = torch.cat([NETWORKS["chain"].image(0), NETWORKS["chain"].image(1)])[:4], torch.arange(4) % 5
    model = converted(NETWORKS["chain"], "soft-sharing(templates=2)")
    model(x).sum().backward()
    model.zero_grad(set_to_none=True)
    one = data_parallel.gradients(model, x, target)
    two = data_parallel.gradients_of_two_processes({"soft": model}, x, target, tmp_path)["soft"]
    for name, grad in one.items():
        laws.assert_close(two[name], grad, 1e-10, name)
