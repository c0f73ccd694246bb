"""Gates: where they are, how they choose, and what they are trained for."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import thriftnet as tn
from laws import assert_close, output
from networks import NETWORKS, Block, perturb
from thriftnet.core.history import history
from thriftnet.core.tied import count_params
from thriftnet.core.width import set_width, widths
from thriftnet.dynamic.add_gate import find_front
from thriftnet.dynamic.gate import SqueezeGate, decide, gate_of, gates, gumbel_choice
from thriftnet.dynamic.network import cheapest_cost, mixture
from thriftnet.dynamic.objective import (
    GateObjective,
    decision_of,
    sparsification_targets,
    value_loss,
    width_losses,
)

WIDTHS = (0.25, 0.5, 1.0)


def gated(name: str = "residual", **kwargs: Any) -> nn.Module:
    return perturb(tn.convert(NETWORKS[name].make(), tn.Slimmable(widths=WIDTHS, gate=kwargs.pop("gate", True)))).eval()


@pytest.mark.parametrize(
    ("model", "gate", "front"),
    [
        ("resnet20", "layer1", ("conv1", "bn1", "layer1")),
        ("resnet18", "layer1", ("conv1", "bn1", "maxpool", "layer1")),
        ("mobilenetv2", "stage1", ("conv1", "bn1", "stage1")),
    ],
)
def test_the_front_is_found(model: str, gate: str, front: tuple[str, ...]) -> None:
    plain = tn.create_model(model)
    found = find_front(plain)
    assert (found.after, found.front) == (gate, front)
    converted = tn.convert(plain, tn.Slimmable(widths=(0.5, 1.0), gate=True))
    assert gate_of(converted)[0] == f"{gate}.gate"
    steps = history(converted)
    assert [step["verb"] for step in steps] == ["convert"]
    row = next(row for row in steps[0]["plan"]["rows"] if row["becomes"] == "SplitPoint")
    assert (row["names"], row["group"]) == ([gate], None)


def slim(name: str = "residual") -> nn.Module:
    return perturb(tn.convert(NETWORKS[name].make(), tn.Slimmable(widths=WIDTHS))).eval()


@pytest.mark.parametrize("after", [None, "bn1", "stage1.0"])
def test_a_slimmable_network_gets_a_gate(after: str | None, tmp_path: Path) -> None:
    """The verb gives the same network as the field of the config, keeps the selected width, and is replayed."""
    model, x = slim(), NETWORKS["residual"].image()
    tn.set_width(model, 0.5)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    made = tn.add_gate(model, after)
    assert list(model.state_dict()) == list(before)
    assert not gates(model)
    assert tn.width(made) == 0.5
    asked = tn.convert(NETWORKS["residual"].make(), tn.Slimmable(widths=WIDTHS, gate=after or True)).eval()
    assert {key: value.shape for key, value in made.state_dict().items()} == {
        key: value.shape for key, value in asked.state_dict().items()
    }
    asked.load_state_dict(made.state_dict())
    tn.save(made, tmp_path / "model")
    loaded = tn.load(tmp_path / "model", model=NETWORKS["residual"].make(3))
    assert tn.width(loaded) == 0.5
    for index in range(len(WIDTHS)):
        for network in (made, asked, loaded):
            set_width(network, index=index)
        assert torch.equal(output(made, x), output(asked, x))
        assert torch.equal(output(loaded, x), output(asked, x))
    assert history(made)[-1] == {"verb": "add_gate", "after": after or "stage1"}
    inplace = tn.add_gate(model, after, inplace=True)
    assert inplace is model
    assert gates(model)


def test_networks_that_get_no_gate() -> None:
    with pytest.raises(tn.IncompatibleModelError, match="has one width only"):
        tn.add_gate(NETWORKS["residual"].make())
    with pytest.raises(tn.IncompatibleModelError, match=r"has a gate already: stage1\.gate"):
        tn.add_gate(gated())
    with pytest.raises(tn.IncompatibleModelError, match=r"widths 0, 1, 2, .* largest: a gate needs two ratios or more"):
        tn.add_gate(tn.create_model("slimmable_mobilenetv1"))
    model = slim()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(tn.IncompatibleModelError, match=r"output of 'stage1' bypasses it"):
        tn.add_gate(model, "stage2.0.conv1", inplace=True)
    assert list(model.state_dict()) == list(before)


class Counts(nn.Module):
    """A network whose code has a channel count of its own, after the first stage."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stage, self.rest = nn.Conv2d(3, 8, 3), nn.Sequential(Block(8, 8)), nn.Conv2d(8, 8, 1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.rest(self.stage(self.stem(x)))
        return self.head(x.mean((2, 3)).reshape(-1, 8))


def test_channels_that_the_code_counts_stay_whole_behind_a_gate() -> None:
    """A reshape that leaves the number of images open would halve it, silently."""
    x = torch.randn(3, 3, 8, 8)
    for model in (
        tn.convert(Counts(), tn.Slimmable(widths=(0.5, 1.0), gate="stage")),
        tn.add_gate(tn.convert(Counts(), tn.Slimmable(widths=(0.5, 1.0))), "stage"),
    ):
        set_width(model, 0.5)
        assert (model.rest(model.stage(model.stem(x))).shape[1], model(x).shape) == (8, (3, 4))
        assert tn.freeze(model, 0.5).rest.in_channels == 4


def test_the_front_is_whole_at_every_width_and_the_rest_narrows() -> None:
    model, x = gated(), NETWORKS["residual"].image()
    seen: list[torch.Tensor] = []
    model.stage1.body.register_forward_hook(lambda _, args, out: seen.append(out))
    channels = []
    model.stage2[0].conv1.register_forward_hook(lambda _, args, out: channels.append((args[0].shape[1], out.shape[1])))
    for index in range(len(WIDTHS)):
        set_width(model, index=index)
        output(model, x)
    assert all(torch.equal(each, seen[0]) for each in seen)
    assert channels == [(2, 4), (4, 8), (8, 16)]
    assert not [
        key for key in model.state_dict() if key.startswith(("conv1", "bn1", "stage1")) and key.endswith(("_0", "_1"))
    ]


def test_a_narrow_tail_written_out() -> None:
    """The plain network's own layers, sliced by hand behind the front."""
    plain = NETWORKS["residual"].make()
    model, x = tn.convert(plain, tn.Slimmable(widths=(0.5, 1.0), gate=True)).eval(), NETWORKS["residual"].image()
    set_width(model, 0.5)
    f = torch.nn.functional

    def conv(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        weight = layer.weight[: len(layer.weight) // 2, : x.shape[1]]
        return f.conv2d(x, weight, None, layer.stride, layer.padding)

    def norm(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        c = x.shape[1]
        return f.batch_norm(x, layer.running_mean[:c], layer.running_var[:c], layer.weight[:c], layer.bias[:c])

    out = plain.stage1(plain.bn1(plain.conv1(x)).relu())[:, :4]
    for block in plain.stage2:
        inner = norm(block.bn2, conv(block.conv2, norm(block.bn1, conv(block.conv1, out)).relu()))
        out = (inner + (norm(block.shortcut[1], conv(block.shortcut[0], out)) if len(block.shortcut) else out)).relu()
    expected = f.linear(out.mean((2, 3)), plain.fc.weight[:, :8], plain.fc.bias)
    assert_close(output(model, x), expected.detach(), 1e-12, "narrow tail")


@pytest.mark.parametrize("gate", ["conv1", "bn1", "stage1.0", "stage1", "stage2.0"])
def test_the_front_may_end_anywhere_where_one_output_goes_on(gate: str) -> None:
    model, x = gated(gate=gate), NETWORKS["residual"].image()
    plain = NETWORKS["residual"].make()
    assert_close(output(tn.convert(plain, tn.Slimmable(widths=WIDTHS, gate=gate)).eval(), x), output(plain, x), 1e-12, gate)
    macs = []
    for width in widths(model):
        set_width(model, width)
        macs.append(tn.inspect(model, (3, 8, 8)).macs)
    assert macs == sorted({*macs})
    if gate == "stage1":
        stem, stage1, head = 64 * 3 * 8 * 9, 4 * 64 * 8 * 8 * 9, 16 * 5
        stage2 = 16 * (8 * 16 * 9 + 3 * 16 * 16 * 9 + 8 * 16)
        assert macs[-1] == stem + stage1 + stage2 + head
        assert macs[0] == stem + stage1 + stage2 // 16 + head // 4


@pytest.mark.parametrize(
    ("gate", "error", "message"),
    [
        ("layer7", tn.ConfigError, r"no module to end the front|unknown module to end the front"),
        (
            "stage2.0.conv1",
            tn.IncompatibleModelError,
            r"the front cannot end at 'stage2\.0\.conv1': the output of 'stage1' bypasses",
        ),
        ("fc", tn.IncompatibleModelError, r"module 'fc' outputs \(2, 5\): the front must end at one that outputs"),
    ],
)
def test_fronts_that_are_refused(gate: str, error: type[Exception], message: str) -> None:
    plain = NETWORKS["residual"].make()
    with pytest.raises(error, match=message):
        tn.convert(plain, tn.Slimmable(widths=WIDTHS, gate=gate))


class Twice(nn.Module):
    """One block that runs before and after another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.again, self.middle, self.head = nn.Conv2d(3, 8, 3), Block(8, 8), Block(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.again(self.middle(self.again(self.stem(x))))
        return self.head(x.mean((2, 3)))


def test_layers_on_both_sides_are_refused() -> None:
    with pytest.raises(tn.IncompatibleModelError, match=r"layer 'again(\.\w+)*' runs before and after 'middle'"):
        tn.convert(Twice(), tn.Slimmable(widths=(0.5, 1.0), gate="middle"))
    with pytest.raises(
        tn.IncompatibleModelError, match=r"module 'again' runs 2 times: the front must end at one that runs once"
    ):
        tn.convert(Twice(), tn.Slimmable(widths=(0.5, 1.0), gate="again"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gate": 3}, "gate=3: expected False, True, or the name"),
        ({"gate": ""}, "gate='': expected"),
        ({"gate": True, "widths": (1.0,)}, r"a gate has nothing to choose from with widths=\(1\.0,\)"),
    ],
)
def test_configs_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(tn.ConfigError, match=message):
        tn.Slimmable(**{"widths": (0.5, 1.0), **fields})


def test_networks_without_a_gate_are_refused() -> None:
    for model in (NETWORKS["chain"].make(), tn.convert(NETWORKS["chain"].make(), "slimmable(widths=(0.5, 1.0))")):
        with pytest.raises(
            tn.IncompatibleModelError, match=r"Chain has no gate; expected one\. Convert a plain network with"
        ):
            tn.DynamicNetwork(model)


def test_a_gate_counts_and_waits() -> None:
    model = gated()
    (gate,) = gates(model).values()
    assert isinstance(gate, SqueezeGate)
    assert sum(parameter.numel() for parameter in gate.parameters()) == 8 * 4 + 4 + 4 * 3
    assert count_params(model) == count_params(NETWORKS["residual"].make()) + 48
    assert not any(parameter.requires_grad for parameter in gate.parameters())
    assert not gates(tn.fold(model))
    assert not gates(tn.freeze(model, 0.5))


# ------------------------------------------------------------------------------------------------ choosing


def test_choices_without_noise() -> None:
    logits = torch.tensor([[0.1, 2.0, -1.0], [3.0, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    hard, soft = gumbel_choice(logits, temperature=0.5, noise=False)
    assert hard.tolist() == [[0, 1, 0], [1, 0, 0]]
    assert_close(soft.detach(), (logits.detach() / 0.5).softmax(1), 1e-12, "softmax")
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    (through,) = torch.autograd.grad((hard @ weights).sum(), logits, retain_graph=True)
    (of_soft,) = torch.autograd.grad((soft @ weights).sum(), logits)
    assert torch.equal(through, of_soft)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 5.0])
def test_noise_draws_each_choice_as_often_as_its_softmax_says(temperature: float) -> None:
    logits = torch.tensor([0.0, math.log(2), math.log(5)], dtype=torch.float64).expand(20000, 3)
    hard, _ = gumbel_choice(logits, temperature, random=torch.Generator().manual_seed(0))
    assert ((hard == 0) | (hard == 1)).all()
    assert_close(hard.mean(0), torch.tensor([1, 2, 5], dtype=torch.float64) / 8, 0.02, "frequencies")
    again, _ = gumbel_choice(logits, temperature, random=torch.Generator().manual_seed(0))
    assert torch.equal(hard, again)


def test_what_multiply_accumulates_cost() -> None:
    logits, macs = torch.tensor([[0.0, 1.0, 1.5], [0.0, 0.2, 3.0]]), torch.tensor([100.0, 200.0, 400.0])
    assert decide(logits, macs).tolist() == [2, 2]
    assert decide(logits, macs, cost=2.0).tolist() == [1, 2]
    assert decide(logits, macs, cost=100.0).tolist() == [0, 0]
    assert decide(-logits, macs, cost=-100.0).tolist() == [2, 2]


# ------------------------------------------------------------------------------------------------ losses


def outputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Three widths, four images: right at all, at the widest only, in the middle only, never."""
    right = torch.tensor([[1, 0, 0, 0], [1, 0, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    labels = torch.tensor([0, 1, 2, 0])
    said = torch.where(right, labels, (labels + 1) % 3)
    return nn.functional.one_hot(said, 3).double(), labels


def test_targets_of_the_sandwich() -> None:
    assert sparsification_targets(*outputs()).tolist() == [0, 2, 2, 2]
    assert sparsification_targets(*outputs(), hard="narrowest").tolist() == [0, 2, 0, 0]
    with pytest.raises(tn.ConfigError, match="hard"):
        sparsification_targets(*outputs(), hard="middle")


def test_one_softmax_can_reach_its_target_and_two_cannot() -> None:
    """A gate that is surely right: the loss vanishes; with a second softmax it does not."""
    sure, labels, macs = (
        torch.tensor([[50.0, 0.0, 0.0]], dtype=torch.float64),
        torch.tensor([0]),
        torch.tensor([1e8, 2e8, 6e8]),
    )
    decision = decision_of(sure, noise=False)
    for original, expected in ((False, 0.0), (True, math.log(math.e + 2) - 1)):
        loss = GateObjective(label_smoothing=0.0, original=original)(decision, sure, labels, labels, macs)
        assert loss.sparsification.item() == pytest.approx(expected, abs=1e-12)


def test_macs_and_budgets() -> None:
    logits, macs = 50 * torch.eye(3, dtype=torch.float64), torch.tensor([1e8, 2e8, 6e8])  # 3e8 on average
    decision, labels = decision_of(logits, noise=False), torch.arange(3)

    def spent(**options: Any) -> float:
        return GateObjective(**options)(decision, logits, labels, labels, macs).macs.item()

    assert spent(budget=3e8) == pytest.approx(0, abs=1e-12)
    assert spent(budget=2e8) == pytest.approx(10 * 0.25)
    assert spent(original=True) == pytest.approx(0.5 * 0.3**2)


def test_the_objective_adds_up() -> None:
    logits = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    every, labels = outputs()
    macs = torch.tensor([1e8, 2e8, 6e8])
    decision = decision_of(logits, noise=False)
    output = torch.einsum("nk,knc->nc", decision.choice, every)
    objective = GateObjective(budget=2e8, budget_weight=3.0, sparsification_weight=0.5, label_smoothing=0.0)
    loss = objective(decision, output, labels, sparsification_targets(every, labels), macs)
    assert loss.total.item() == pytest.approx((loss.task + loss.sparsification + loss.macs).item())
    wanted = nn.functional.cross_entropy(logits, torch.tensor([0, 2, 2, 2]))
    assert loss.sparsification.item() == pytest.approx(0.5 * wanted.item())
    spent = (decision.choice.detach() * macs).sum(1).mean().item()
    assert loss.macs.item() == pytest.approx(3 * (spent / 2e8 - 1) ** 2)
    loss.total.backward()
    assert logits.grad is not None
    assert GateObjective()(decision_of(logits.detach()), output, labels, labels, macs).macs == 0
    theirs = GateObjective(original=True)(decision, output, labels, labels, macs)
    assert theirs.macs.item() == pytest.approx(0.5 * (spent / 1e9) ** 2)


def test_the_loss_of_values_by_hand() -> None:
    every = torch.tensor(
        [[[0.0, 0.0, 0.0], [math.log(2), 0.0, 0.0]], [[50.0, 0.0, 0.0], [0.0, 0.0, 0.0]]], dtype=torch.float64
    )
    losses = width_losses(every, torch.tensor([0, 0]))
    wanted = torch.tensor([[math.log(3), 0.0], [math.log(2), math.log(3)]], dtype=torch.float64)
    assert_close(losses, wanted, 1e-12, "losses")
    logits, losses = torch.tensor([[0.0, 1.0], [5.0, 3.0]]), torch.tensor([[2.0, 0.0], [1.0, 1.0]])
    assert value_loss(logits, losses).item() == pytest.approx((2 * 0.5**2 + 2 * 1.0**2) / 2)
    shared = torch.tensor([[7.0], [-3.0]])
    assert value_loss(shared - losses, losses).item() == pytest.approx(0, abs=1e-10)


def test_values_are_all_that_is_learned_from_losses() -> None:
    """Neither the task nor a budget moves them, so that one gate serves every budget."""
    every, labels = outputs()
    logits, macs = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.tensor([1e8, 2e8, 6e8])
    decision = decision_of(logits, noise=False)
    grads = []
    for budget in (None, 1e8, 6e8):
        objective = GateObjective(targets="losses", budget=budget, sparsification_weight=2.0)
        loss = objective(decision, mixture(decision.choice, every), labels, objective.wanted(every, labels), macs)
        assert loss.total.item() == loss.sparsification.item()
        assert loss.total.item() == pytest.approx(2 * value_loss(logits, width_losses(every, labels)).item())
        assert (loss.task, loss.macs) == (0, 0)
        grads.append(torch.autograd.grad(loss.total, logits, retain_graph=True)[0])
    assert grads[0].abs().max() > 0
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[0], grads[2])
    assert GateObjective().wanted(every, labels).tolist() == [0, 2, 2, 2]
    assert GateObjective(hard="narrowest").wanted(every, labels).tolist() == [0, 2, 0, 0]


KINDS = torch.tensor(
    [[1, 1, 1], [0, 0, 1], [0, 0, 0]], dtype=torch.bool
)  # easy, hard, hopeless: which of three widths is right


def images_of_three_kinds(count: int, random: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features that show the kind through noise, what each width gives, and labels."""
    kinds, labels = torch.randint(3, (count,), generator=random), torch.randint(4, (count,), generator=random)
    features = nn.functional.one_hot(kinds, 8) + 0.2 * torch.randn(count, 8, generator=random)
    said = torch.where(KINDS[kinds].T, labels, (labels + 1) % 4)
    return features, 3.0 * nn.functional.one_hot(said, 4), labels


@pytest.mark.parametrize(("targets", "least", "most"), [("losses", 0.64, 0.68), ("sandwich", 0.4, 0.62)])
def test_decisions_beat_chance_where_features_tell(targets: str, least: float, most: float) -> None:
    """A third of the images can be wide. Only losses tell those that this helps from the hopeless; chance gets 4/9 right."""
    random = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    gate = SqueezeGate(8, WIDTHS, torch.empty(0)).requires_grad_(True)
    optimizer = torch.optim.SGD(gate.parameters(), 0.05, momentum=0.9)
    objective, macs = GateObjective(targets=targets), torch.tensor([1e6, 2e6, 4e6], dtype=torch.float64)
    for _ in range(300):
        features, every, labels = images_of_three_kinds(64, random)
        decision = decision_of(gate(features), random=random)
        loss = objective(decision, mixture(decision.choice, every), labels, objective.wanted(every, labels), macs)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    features, every, labels = images_of_three_kinds(3000, random)
    with torch.no_grad():
        logits = gate(features).double()
    chosen = decide(logits, macs, cheapest_cost(logits, macs, 2e6)[0])
    right = (every.argmax(2) == labels).T
    assert macs[chosen].mean().item() == pytest.approx(2e6, rel=0.01)
    found = right.gather(1, chosen[:, None]).double().mean().item()
    assert least < found < most
    shares = torch.bincount(chosen, minlength=3).double() / 3000
    if targets == "losses":
        assert found > float(shares @ right.double().mean(0)) + 0.15


def test_targets_that_are_refused() -> None:
    with pytest.raises(tn.ConfigError, match="unknown targets 'loss': did you mean 'losses'"):
        GateObjective(targets="loss")
    with pytest.raises(tn.ConfigError, match="original=True is for targets='sandwich', got 'losses'"):
        GateObjective(targets="losses", original=True)


def test_budgets_out_of_reach() -> None:
    macs = torch.tensor([1e8, 6e8])
    GateObjective(budget=1e8).check_budget(macs)
    for budget in (9e7, 7e8):
        with pytest.raises(tn.ConfigError, match=r"is out of reach: expected 100,000,000 to 600,000,000"):
            GateObjective(budget=budget).check_budget(macs)
    with pytest.raises(tn.ConfigError, match="budget=-1"):
        GateObjective(budget=-1)
    with pytest.raises(tn.ConfigError, match="original=True has no budget"):
        GateObjective(original=True, budget=1e8)
