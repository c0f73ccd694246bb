"""Networks that choose their width per image: equal to the parts they are made of, whatever the batch; counted rightly."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.masked import MaskedNetwork
from torch import Tensor, nn

import thriftnet as tn
from laws import assert_close
from networks import NETWORKS, Chain, perturb, randomise_norms
from thriftnet.dynamic.network import DynamicNetwork, cheapest_cost
from thriftnet.dynamic.objective import GateObjective, decision_of, sparsification_targets

STAGES = (((8, 12), 1, 3, 1, "ds", False), ((12, 16, 24), 2, 3, 2, "ds", True), ((16, 20, 32), 1, 5, 2, "ds", False))
WIDTHS = (0.25, 0.5, 1.0)


def ds_net(**kwargs: Any) -> nn.Module:
    model = tn.create_model("dsnet", stem=(8, 16), stages=STAGES, num_classes=5, **kwargs).double()
    return randomise_norms(perturb(model)).eval()


def converted(name: str, widths: tuple[float, ...] = (0.5, 1.0)) -> nn.Module:
    return perturb(tn.convert(NETWORKS[name].make(), tn.Slimmable(widths=widths, gate=True))).eval()


def images(count: int, side: int = 32) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


MODELS: dict[str, Any] = {
    "ds": ds_net,
    "ds-skip": lambda: ds_net(skip=True),
    "ds-any": lambda: ds_net(gate_choices=(0, 2)),
    "ir-skip": lambda: randomise_norms(
        perturb(
            tn.create_model(
                "dsnet",
                stem=(8, 16),
                skip=True,
                num_classes=5,
                stages=[(w, n, k, s, "ir", g) for w, n, k, s, _, g in STAGES],
            ).double()
        )
    ).eval(),
    "resnet20": lambda: perturb(
        tn.convert(tn.create_model("resnet20").double(), tn.Slimmable(widths=WIDTHS, gate=True))
    ).eval(),
    **{name: lambda name=name: converted(name) for name in NETWORKS},
}


@pytest.mark.parametrize("fold_norms", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_every_image_gets_what_its_width_gives(name: str, fold_norms: bool) -> None:
    model = MODELS[name]()
    dynamic = DynamicNetwork(model, fold_norms=fold_norms)
    x = images(7)
    decisions = torch.arange(7) % len(dynamic.widths)
    alone = {k: tn.freeze(model, width) for k, width in enumerate(dynamic.widths)}
    expected = torch.stack([alone[k](x[i : i + 1])[0] for i, k in enumerate(decisions.tolist())]).detach()
    assert_close(dynamic.forced(x, decisions), expected, 1e-11, "forced")
    assert list(dynamic.histogram.values()) == torch.bincount(decisions).tolist()
    macs = torch.tensor([tn.inspect(network, (3, 32, 32)).macs for network in alone.values()]).double()
    at_32 = DynamicNetwork(model, input_size=(3, 32, 32)).macs
    gate = (at_32 - macs).unique()
    assert gate.numel() == 1, "the gate costs the same whatever it says"
    assert 0 < float(gate) < 0.01 * float(macs.min())
    assert dynamic.mean_macs == pytest.approx(float(at_32[decisions].mean()))


@pytest.mark.parametrize("name", ["ds", "ds-any"])
def test_routed_and_masked_forms_agree(name: str) -> None:
    model = MODELS[name]()
    dynamic = DynamicNetwork(model)
    x = images(6)
    decisions = dynamic.decisions(x)
    forced = torch.arange(6) % len(dynamic.widths)
    masked = MaskedNetwork(model)
    for each in (decisions, forced):
        rows = F.one_hot(each, len(dynamic.widths)).to(x)
        assert_close(dynamic.forced(x, each), masked(x, rows).detach(), 1e-11, "masked")
    assert torch.equal(dynamic(x), dynamic.forced(x, decisions))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_batches_of_any_size_and_empty_groups(count: int) -> None:
    model = ds_net()
    dynamic, x = DynamicNetwork(model), images(count)
    for choice in range(3):
        out = dynamic.forced(x, torch.full((count,), choice))
        assert_close(out, tn.freeze(model, index=choice)(x).detach(), 1e-11, f"all at {choice}")
    assert list(dynamic.histogram.values()) == [count] * 3
    dynamic.reset()
    assert dynamic.mean_macs == 0
    assert sum(dynamic.histogram.values()) == 0


def test_other_sizes_of_images() -> None:
    model = ds_net()
    dynamic, x = DynamicNetwork(model, input_size=(3, 32, 32)), images(3, 48)
    assert_close(dynamic.forced(x, torch.tensor([0, 1, 2]))[1], tn.freeze(model, index=1)(x)[1].detach(), 1e-11, "48 pixels")


def test_what_is_spent_follows_the_size_of_the_images() -> None:
    model = ds_net()
    dynamic = DynamicNetwork(model, input_size=(3, 32, 32))
    at = {side: DynamicNetwork(model, input_size=(3, side, side)).macs for side in (32, 48)}
    before, weighed = dynamic.decisions(images(3)), dynamic.macs.clone()
    small, large = torch.tensor([0, 1, 1]), torch.tensor([2, 2])
    dynamic.forced(images(3), small)
    dynamic.forced(images(2, 48), large)
    spent = float(at[32][small].sum() + at[48][large].sum())
    assert int(dynamic.spent) == spent > float(at[32][torch.cat([small, large])].sum())
    assert dynamic.mean_macs == pytest.approx(spent / 5)
    assert torch.equal(dynamic.macs, weighed), "decisions weigh what they did"
    assert torch.equal(dynamic.decisions(images(3)), before)
    twin = copy.deepcopy(dynamic)
    twin.reset()
    assert twin.mean_macs == 0 < dynamic.mean_macs


def test_what_is_refused() -> None:
    dynamic = DynamicNetwork(ds_net())
    with pytest.raises(tn.DataError, match=r"expects \(N, 3, H, W\) with N >= 1, got a batch of zero images"):
        dynamic(images(2)[:0])
    with pytest.raises(tn.DataError, match=r"got \(2, 1, 8, 8\)"):
        dynamic(torch.zeros(2, 1, 8, 8))
    for wrong in ([0, 3], [-1, 0], [0]):
        with pytest.raises(tn.ConfigError, match=r"expected 2 indices from 0 to 2"):
            dynamic.forced(images(2), torch.tensor(wrong))
    with pytest.raises(
        tn.ConfigError, match=r"gate_choices=\(0, 7\): expected two or more indices of sub-networks from 0 to 2"
    ):
        ds_net(gate_choices=(0, 7))


def test_fronts_that_differ_are_refused() -> None:
    """A gate cannot choose "largest", which is wide before the gate, too."""
    model = ds_net()
    model.stages[1][0].se.gate.widths = ("0", "1", "largest")
    with pytest.raises(
        tn.IncompatibleModelError, match=r"layer 'stem' runs before the gate and differs between the widths 0, 1, largest"
    ):
        DynamicNetwork(model)


def test_the_gates_network_decides_without_noise_in_eval_mode() -> None:
    dynamic, x = DynamicNetwork(converted("residual")), images(6, 8)
    first = dynamic(x)
    state = torch.get_rng_state()
    assert all(torch.equal(dynamic(x), first) for _ in range(3))
    assert torch.equal(torch.get_rng_state(), state)
    said = dynamic.logits(x)
    assert torch.equal(dynamic.decisions(x), said.argmax(1))


def test_more_cost_spends_less_and_a_budget_is_met() -> None:
    torch.manual_seed(1)
    dynamic, x = DynamicNetwork(converted("residual", WIDTHS), input_size=(3, 8, 8)), images(64, 8)
    with torch.no_grad():
        dynamic.gate.choose_weight.mul_(20)
    spent = []
    for cost in (-1e3, -0.5, 0.0, 0.5, 1e3):
        dynamic.cost = cost
        dynamic.reset()
        dynamic(x)
        spent.append(dynamic.mean_macs)
    assert spent == sorted(spent, reverse=True)
    least, most = float(dynamic.macs.min()), float(dynamic.macs.max())
    assert (spent[0], spent[-1]) == (most, least)
    for share in (0.0, 0.3, 0.8, 1.0):
        budget = least + share * (most - least)
        stated = dynamic.set_budget(budget, [x[:40], (x[40:], None)])
        dynamic.reset()
        dynamic(x)
        assert dynamic.mean_macs == pytest.approx(stated)
        assert budget - (most - least) / 8 <= stated <= budget * (1 + 1e-12)
    for budget in (least - 1, most + 1):
        with pytest.raises(tn.ConfigError, match=r"is out of reach: expected [\d,]+ to [\d,]+"):
            dynamic.set_budget(budget, [x])
    with pytest.raises(tn.DataError, match="without batches"):
        dynamic.set_budget(most, [])


def test_the_cheapest_cost_is_the_best_of_all() -> None:
    random = torch.Generator().manual_seed(0)
    logits, macs = (
        torch.randn(30, 3, generator=random, dtype=torch.float64),
        torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64),
    )
    costs = torch.linspace(-30, 30, 20001, dtype=torch.float64)
    every = torch.stack([macs[(logits - cost * macs / 4).argmax(1)].mean() for cost in costs])
    for budget in (1.0, 1.4, 2.0, 3.1, 4.0):
        cost, spent = cheapest_cost(logits, macs, budget)
        assert spent == pytest.approx(float(every[every <= budget].max()), abs=1e-6)
        assert float(macs[(logits - cost * macs / 4).argmax(1)].mean()) == pytest.approx(spent)


def test_only_the_gate_learns() -> None:
    """A gate that is trained on what widths are right chooses narrow ones where they are."""
    torch.manual_seed(5)
    model = converted("residual", (0.25, 1.0))
    before = {key: value.clone() for key, value in model.state_dict().items() if ".gate." not in key}
    dynamic, x = DynamicNetwork(model, input_size=(3, 8, 8)), images(64, 8)
    dynamic.gate.requires_grad_(True)
    easy = torch.arange(64) % 3 > 0
    x = x + easy[:, None, None, None]  # bright images are easy: the narrow network is right
    narrow, wide = dynamic.every(x)[1].argmax(2)
    labels = torch.where(easy, narrow, wide)
    optimizer = torch.optim.Adam(dynamic.gate.parameters(), 0.02)
    objective = GateObjective()
    for _ in range(150):
        dynamic.train()
        logits, outputs = dynamic.every(x)
        decision = decision_of(logits)
        targets = sparsification_targets(outputs, labels)
        out = torch.einsum("nk,knc->nc", decision.choice, outputs)
        loss = objective(decision, out, labels, targets, dynamic.macs)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    dynamic.eval()
    agree = (dynamic.decisions(x) == targets).double().mean()
    assert 0.2 < targets.double().mean() < 0.4
    assert agree > 0.9
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)


def test_training_mode_gives_the_gate_a_gradient() -> None:
    torch.manual_seed(1)  # of some gates all three channels are dead
    dynamic, x = DynamicNetwork(ds_net()), images(4)
    dynamic.gate.requires_grad_(True)
    dynamic.train()
    assert not dynamic.front.training
    assert not dynamic.tails.training
    dynamic(x).square().sum().backward()
    assert dynamic.gate.conv.weight.grad.abs().max() > 0
    others = [p for name, p in dynamic.named_parameters() if not name.startswith("gate.")]
    assert others
    assert all(p.grad is None for p in others)


def test_copies_and_types(tmp_path: Path) -> None:
    model = converted("residual")
    dynamic, x = DynamicNetwork(model), images(5, 8)
    decisions = torch.tensor([0, 1, 0, 1, 1])
    expected = dynamic.forced(x, decisions)
    for made in (copy.deepcopy(dynamic), pickle.loads(pickle.dumps(dynamic))):  # noqa: S301
        assert torch.equal(made.forced(x, decisions), expected)
    single = copy.deepcopy(dynamic).float()
    assert_close(single.forced(x.float(), decisions).double(), expected, 1e-5, "float32")
    assert single.macs.dtype == torch.float64
    tn.save(model, tmp_path / "model")
    loaded = tn.load(tmp_path / "model", model=NETWORKS["residual"].make(3))
    assert torch.equal(DynamicNetwork(loaded).forced(x, decisions), expected)


def test_changes_of_the_network_do_not_reach_it() -> None:
    model = converted("residual")
    dynamic, x = DynamicNetwork(model), images(4, 8)
    before = dynamic(x)
    decided = dynamic.decisions(x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." not in name:
                parameter.zero_()
    assert torch.equal(dynamic(x), before)
    assert torch.equal(dynamic.decisions(x), decided)
    assert dynamic.gate is model.stage1.gate


def check_compiled(model: nn.Module, *batches: list[int]) -> None:
    dynamic, compiled = DynamicNetwork(model), DynamicNetwork(model, compile=True)
    for batch in batches:
        x, decisions = images(len(batch), 8), torch.tensor(batch)
        assert_close(compiled.forced(x, decisions), dynamic.forced(x, decisions), 1e-10, f"{len(batch)} images")
    torch._dynamo.reset()


def test_compiled_parts_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the graphs that the compiler is given, one for all batch sizes."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    check_compiled(ds_net(), [0, 1, 2, 0, 1], [0], [0, 1, 2])


def test_a_front_and_a_tail_are_compiled_to_machine_code() -> None:
    """The smallest there are, without vectors: the compiler takes seconds for each."""
    from torch._inductor import config

    model = perturb(tn.convert(Chain(4, 1).double(), tn.Slimmable(widths=(0.5, 1.0), gate=True))).eval()
    with config.patch({"compile_threads": 1, "cpp.vec_isa_ok": False}):
        check_compiled(model, [1, 1])


@pytest.mark.slow
def test_a_ds_net_is_compiled_to_machine_code() -> None:
    check_compiled(ds_net(), [0, 1, 2, 0, 1], [0], [0, 1, 2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu() -> None:
    model = ds_net()
    dynamic, x = DynamicNetwork(model), images(5)
    decisions = torch.arange(5) % 3
    expected = dynamic.forced(x, decisions)
    assert_close(dynamic.cuda().forced(x.cuda(), decisions.cuda()).cpu(), expected, 1e-10, "GPU")
    assert dynamic.macs.is_cuda
