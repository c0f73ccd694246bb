"""Stages: the sandwich of widths against its record, gates within budgets, and trainings after each other."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

import thriftnet as tn
from golden_rules import golden_input
from test_zoo_dsnet import filled
from thriftnet.cli import main
from thriftnet.cli.train import make_recipe, with_budget
from thriftnet.core.width import Width
from thriftnet.data.sources import open_data
from thriftnet.dynamic.gate import gate_of
from thriftnet.errors import ConfigError
from thriftnet.importing.layout import read
from thriftnet.train import distributed, train
from thriftnet.train.interrupts import Interrupted
from thriftnet.train.loop import Progress
from thriftnet.train.loss import Criterion
from thriftnet.train.recipe import LossFields, Recipe, load_recipe
from thriftnet.train.stages import Step, Supernet, make_stage
from training import Net, in_children, metrics, source
from zoo_golden import check_digests, facts, gradients

FAST = {"batch_size": 16, "trackers": (), "validation": 0.25, "lr": 0.05}
WIDTHS = "slimmable(widths=(0.5, 1.0))"
GATED = "slimmable(widths=(0.5, 1.0), gate='2')"
PARTS = (
    {"stage": {"name": "supernet", "options": {"drawn": 1}}, "epochs": 2, "ema_decay": 0.8},
    {"recalibrate": {}},
    {"stage": "gate", "epochs": 2, "lr": 0.1, "weight_decay": 0.0, "select_on": "last"},
)


def recipe(**fields: object) -> Recipe:
    return Recipe().replace(**{**FAST, "epochs": 2, **fields})


@dataclass(frozen=True)
class Recorded(Supernet):
    """The sandwich with the widths of the record."""

    choices: tuple[str, ...] = ()

    def between(self, seed: int, number: int) -> list[Width]:
        return list(self.choices)


def test_the_sandwich_of_the_record() -> None:
    """Losses of all four passes, and the gradients summed over them."""
    golden = facts("dsnet")["train_sandwich_tiny"]
    model, layout = filled(golden["fill_gain"])
    images = torch.from_numpy(golden_input(*golden["input_shape"])).double()
    average = copy.deepcopy(model).eval()
    choices = tuple(str(each["choice"]) for each in golden["passes"] if each["mode"] == "uniform")
    stage = Recorded(widths=tn.core.width.widths(model), choices=choices)
    criterion = Criterion(LossFields(label_smoothing=0.1))
    step = Step(model, model, average, criterion, 0, 0)
    stage.train_mode(model)
    labels = torch.arange(len(images)) % 10
    losses = []
    for loss in stage.losses(step, images, labels):
        losses.append(loss.item())
        loss.backward()
    assert losses == pytest.approx([each["loss"] for each in golden["passes"]], rel=1e-9)
    check_digests(read(gradients(model), layout), golden["grad"])


def slim() -> nn.Module:
    torch.manual_seed(0)
    return tn.convert(Net(), "slimmable(widths=(0.5, 1.0))")


def one_step(net: nn.Module, average: nn.Module | None, **options: Any) -> tuple[list[torch.Tensor], torch.Tensor]:
    images, labels = torch.randn(6, 3, 8, 8), torch.arange(6) % 3
    stage = make_stage("supernet", net, options)
    stage.train_mode(net)
    step = Step(net, net, average, Criterion(LossFields()), 3, 5)
    return list(stage.losses(step, images, labels)), images


def test_widths_are_drawn_for_each_step_and_the_same_everywhere() -> None:
    torch.manual_seed(0)
    stage = Supernet(widths=(0.25, 0.5, 0.75, 1.0), drawn=3)
    first = [stage.between(7, number) for number in range(20)]
    torch.manual_seed(99)
    assert first == [stage.between(7, number) for number in range(20)]
    assert first != [stage.between(8, number) for number in range(20)]
    assert {width for drawn in first for width in drawn} == {0.5, 0.75}
    assert len({tuple(drawn) for drawn in first}) > 3


@pytest.mark.parametrize("teacher", ["average", "largest", "labels"])
def test_what_the_smallest_learns(teacher: str) -> None:
    net = slim()
    average = copy.deepcopy(net).eval()
    before = copy.deepcopy(net)
    losses, images = one_step(net, average, drawn=0, teacher=teacher)
    small = copy.deepcopy(before).train()
    tn.set_width(small, "largest")
    largest = small(images)
    tn.set_width(small, "smallest")
    outputs = small(images)
    tn.set_width(average, "largest")
    wanted = {
        "average": average(images).softmax(1),
        "largest": largest.softmax(1),
        "labels": torch.arange(6) % 3,
    }[teacher]
    assert losses[-1].item() == pytest.approx(F.cross_entropy(outputs, wanted).item(), rel=1e-5)
    gradient = torch.autograd.grad(losses[-1], [p for p in net.parameters() if p.requires_grad], allow_unused=True)
    assert any(g is not None and g.abs().sum() > 0 for g in gradient)


def test_an_ensemble_teaches_the_smallest() -> None:
    torch.manual_seed(0)
    net = tn.convert(
        nn.Sequential(
            *Net(),
        ),
        "slimmable(widths=(0.5, 1.0))",
    )
    average = copy.deepcopy(net).eval()
    losses, images = one_step(net, average, drawn=1, ensemble=True)
    drawn = make_stage("supernet", net, {"drawn": 1}).between(5, 3)  # type: ignore[attr-defined]
    lessons = []
    for width in ("largest", *drawn):
        tn.set_width(average, width)
        lessons.append(average(images).softmax(1))
    tn.set_width(net, "smallest")
    outputs = net(images)
    assert losses[-1].item() == pytest.approx(F.cross_entropy(outputs, torch.stack(lessons).mean(0)).item(), rel=1e-5)


def test_the_sandwich_on_two_processes_equals_one(tmp_path: Path) -> None:
    """Without norms, which see their own process's images only."""
    how = recipe(stage="supernet", ema_decay=0.5, validation=1 / 3)

    def go(place: Path) -> None:
        torch.manual_seed(0)
        net = tn.convert(Net(norms=False).double(), WIDTHS)
        train(how, source(), place, model=net, device="cpu")

    assert in_children(lambda rank: go(tmp_path / "two"), ranks=2) == [0, 0]
    go(tmp_path / "one")
    two, one = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("two", "one"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-8, msg=name)


def gated() -> nn.Module:
    torch.manual_seed(0)
    return tn.convert(Net(), GATED)


def test_only_the_gate_learns_in_its_stage(tmp_path: Path) -> None:
    net = gated()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    outcome = train(recipe(stage="gate", select_on="last", validation=0.0), source(), tmp_path, model=net, device="cpu")
    changed = {name for name, tensor in net.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed
    assert all("gate" in name for name in changed)
    assert sum(outcome.facts["decisions"].values()) == 40
    assert outcome.facts["macs"] > 0


def test_one_gate_that_learns_losses_serves_every_budget(tmp_path: Path) -> None:
    """What it learns is the same at each; the cost of its decisions, found on training images, is not."""
    macs = tn.DynamicNetwork(gated(), input_size=(3, 8, 8)).macs
    trained = []
    for share in (0.1, 0.9):
        budget = float(macs.min() + share * (macs.max() - macs.min()))
        options = {"targets": "losses", "budget": budget}
        how = recipe(stage={"name": "gate", "options": options}, select_on="last", validation=0.0, epochs=4, lr=0.2)
        outcome = train(how, source(), tmp_path / str(share), model=(net := gated()), device="cpu")
        assert outcome.facts["macs"] == pytest.approx(budget, rel=0.1)
        trained.append(gate_of(net)[1].state_dict())
    frugal, lavish = trained
    assert frugal.pop("cost") > lavish.pop("cost")
    assert all(torch.equal(frugal[name], lavish[name]) for name in frugal)
    start = gate_of(gated())[1].state_dict()
    assert not any(torch.equal(frugal[name], start[name]) for name in frugal)


def test_three_stages_after_each_other_resume_between_and_inside(tmp_path: Path) -> None:
    how = recipe(stages=PARTS, checkpoint_every=2)

    def go(place: Path, **options: Any) -> Any:
        return train(how, source(), place, model=gated(), device="cpu", **options)

    wanted = go(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "whole").glob("[0-9]*")} == {"1-supernet", "2-recalibrate", "3-gate"}
    for stage, at in ((1, 3), (1, 9), (3, 3)):  # inside the first, at its end, inside the last
        codes = in_children(
            lambda rank, stage=stage, at=at: go(tmp_path / "killed", on_progress=kill_in(tmp_path / "killed", stage, at))
        )  # type: ignore[misc]
        assert codes == [-signal.SIGKILL]
    resumed = go(tmp_path / "killed")
    assert resumed.weights_sha256 == wanted.weights_sha256
    for part in ("1-supernet", "3-gate"):
        assert metrics(tmp_path / "killed" / part) == metrics(tmp_path / "whole" / part)
    loaded = tn.load(tmp_path / "killed" / "3-gate" / "model", model=Net())
    images = torch.randn(4, 3, 8, 8)
    one, other = (tn.DynamicNetwork(net, input_size=(3, 8, 8)).eval() for net in (loaded, gated_from(wanted)))
    assert torch.equal(one(images), other(images))


def gated_from(outcome: Any) -> nn.Module:
    return tn.load(Path(outcome.run) / "model", model=Net())


def kill_in(folder: Path, stage: int, at: int) -> Any:
    """Kill this process at a step of a stage."""

    def on_progress(progress: Progress) -> None:
        running = max(int(path.name[0]) for path in folder.iterdir() if path.name[0].isdigit())
        if running >= stage and progress.step >= at:
            os.kill(os.getpid(), signal.SIGKILL)

    return on_progress


def test_statistics_are_fresh_between_the_stages(tmp_path: Path) -> None:
    net = gated()
    train(recipe(stages=PARTS), source(), tmp_path, model=net, device="cpu")
    raw, fresh = (load_file(tmp_path / part / "model" / "model.safetensors") for part in ("1-supernet", "2-recalibrate"))
    changed = {name for name in raw if not torch.equal(raw[name], fresh[name])}
    assert changed
    assert all("running_" in name or "num_batches" in name for name in changed)
    after = load_file(tmp_path / "3-gate" / "model" / "model.safetensors")
    assert all(torch.equal(after[name], fresh[name]) for name in changed)


MISTAKES = {
    "no widths": ({"stage": "supernet"}, Net, "slimmable"),
    "unknown teacher": ({"stage": {"name": "supernet", "options": {"teacher": "me"}}}, slim, "teacher.*average"),
    "no average": ({"stage": "supernet"}, slim, "set ema_decay"),
    "unknown option": ({"stage": {"name": "supernet", "options": {"draws": 1}}}, slim, "draws"),
    "no gate": ({"stage": "gate"}, slim, "no gate.*gate=True"),
    "unknown gate option": ({"stage": {"name": "gate", "options": {"budgets": 1}}}, gated, "budgets.*budget"),
    "unknown targets": ({"stage": {"name": "gate", "options": {"targets": "loss"}}}, gated, "'loss': did you mean 'losses'"),
    "budget out of reach": (
        {"stage": {"name": "gate", "options": {"budget": 1e12}}},
        gated,
        "out of reach: expected [0-9,]+ to",
    ),
    "neither": ({"stages": [{"epochs": 1}]}, gated, "either a field stage or a field recalibrate"),
    "nothing trains": ({"stages": [{"recalibrate": {}}]}, gated, "none of the recipe's stages trains"),
    "unknown recalibration": ({"stages": [{"recalibrate": {"width": 1}}, {"stage": "gate"}]}, gated, "width.*widths"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes(name: str, tmp_path: Path) -> None:
    fields, make, wanted = MISTAKES[name]
    with pytest.raises((ConfigError, tn.IncompatibleModelError), match=f"(?s){wanted}"):
        train(recipe(**fields), source(), tmp_path, model=make(), device="cpu")  # type: ignore[operator]


def test_an_interrupted_sequence_says_where(tmp_path: Path) -> None:
    def stop(progress: Progress) -> None:
        if progress.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="1-supernet"):
        train(recipe(stages=PARTS), source(), tmp_path, model=gated(), device="cpu", on_progress=stop)
    assert json.loads((tmp_path / "1-supernet" / "run.json").read_text())["recipe"]["stage"]["name"] == "supernet"


# --- on the command line

DIGITS = ["--data", "digits", "--device", "cpu", "--trackers", "[]", "--workers", "0", "--json"]


def test_ds_net_trains_on_digits_within_a_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recipe's three stages, a few steps each; what is spent on test images is near what was asked for on others.

    With four of the fourteen widths for the gate to choose from: a network is made for each.
    """
    options = ["--recipe", "ds-net-digits", "--output", str(tmp_path), "--max-steps", "3", "--budget", "60K"]
    assert main(["train", *options, "--gate-choices", "[0, 4, 9, 13]", *DIGITS]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {path.name for path in tmp_path.glob("[0-9]*")} == {"1-supernet", "2-recalibrate", "3-gate"}
    assert result["facts"]["macs"] == pytest.approx(60e3, rel=0.05)
    assert sum(result["facts"]["decisions"].values()) == 450
    network = tn.load(tmp_path / "3-gate" / "model")
    dynamic = tn.DynamicNetwork(network, input_size=(1, 8, 8)).eval()
    assert dynamic.cost != 0
    test = open_data("digits").split("test").resident()
    mean, std = open_data("digits").mean, open_data("digits").std
    dynamic((test.float() / 255 - mean[0]) / std[0])
    assert round(dynamic.mean_macs) == result["facts"]["macs"]


def test_facts_of_a_gate_are_those_of_the_images_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "total", lambda value: 3 * value)  # three processes with the same images
    model = tn.convert(tn.create_model("resnet20"), "slimmable(widths=(0.5, 1.0), gate=True)").eval()
    dynamic = tn.DynamicNetwork(model, input_size=(3, 8, 8)).eval()
    dynamic.forced(torch.zeros(3, 3, 16, 16), torch.tensor([0, 1, 1]))
    low, high = tn.DynamicNetwork(model, input_size=(3, 16, 16)).macs.tolist()
    facts = make_stage("gate", model, {}, (3, 8, 8)).facts(dynamic)
    assert facts == {"macs": round((low + 2 * high) / 3), "decisions": {"0.5": 3, "1.0": 6}}


def test_the_network_of_a_slimmable_recipe_has_fresh_statistics(tmp_path: Path) -> None:
    """What is told of it at the end is told of that network, not of the one before."""
    how = recipe(stages=[{"stage": "supernet", "ema_decay": 0.8}, {"recalibrate": {}}], select_on="last")
    outcome = train(how, source(), tmp_path, model=slim(), device="cpu")
    assert outcome.run == str(tmp_path / "2-recalibrate")
    loaded = tn.load(tmp_path / "2-recalibrate" / "model", model=Net())
    tn.set_width(loaded, "largest")
    images = source().split("test")
    outputs = loaded.eval()((images.resident().float() / 255 - 0.5) / 0.25)
    assert outcome.loss == pytest.approx(F.cross_entropy(outputs, images.labels).item(), rel=1e-4)
    before = tn.load(tmp_path / "1-supernet" / "model", model=Net()).eval()
    assert not torch.equal(before((images.resident().float() / 255 - 0.5) / 0.25), outputs)
    other = how.replace(stages=[how.stages[0], {"recalibrate": {"momentum": 0.1}}])
    with pytest.raises(ConfigError, match=r"recalibrate was \{\}, is \{'momentum': 0.1\}"):
        train(other, source(), tmp_path, model=slim(), device="cpu")


def test_options_hold_for_all_stages_or_for_one() -> None:
    texts = {"max_steps": "7", "lr": "0.3", "stages.3.weight_decay": "0.5", "stages.3.stage.options.hard": "narrowest"}
    parts = make_recipe("ds-net-digits", texts)
    supernet, _, gate = (parts.for_stage(entry) for entry in parts.stages)
    assert (supernet.max_steps, gate.max_steps) == (7, 7)
    assert (supernet.optimizer.lr, gate.optimizer.lr) == (0.3, 0.3)
    assert (supernet.optimizer.weight_decay, gate.optimizer.weight_decay) == (0.0001, 0.5)
    assert gate.stage.options == {"targets": "losses", "hard": "narrowest"}
    shorter = load_recipe("ds-net-digits", epochs=2, **{"stages.3.lr": 0.02})
    assert shorter.for_stage(shorter.stages[2]).epochs == 2
    assert [shorter.for_stage(entry).optimizer.lr for entry in shorter.stages] == [0.1, 0.1, 0.02]


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"stage": {"name": "gate", "options": {"hard": "widest"}}}, "own"),
        ({"stages": [*PARTS[:2], {"stage": {"name": "gate", "options": {"hard": "widest"}}}]}, "sequence"),
    ],
)
def test_a_budget_reaches_the_gate(fields: dict[str, Any], place: str) -> None:
    found = with_budget(recipe(**fields), 1500.0)
    options = found.stage.options if place == "own" else found.stages[2]["stage.options"]
    assert options == {"hard": "widest", "budget": 1500.0}
    if place == "sequence":
        assert found.stages[:2] == recipe(stages=PARTS).stages[:2]
        assert found.stage.options == {}


REFUSED = {
    "no gate": (
        ["--recipe", "digits", "--budget", "1M"],
        "--budget is for a stage gate; this recipe has auto.*ds-net-cifar",
    ),
    "no gate in stages": (
        ["--recipe", "slimmable-resnet-cifar", "--budget", "1M"],
        "this recipe has supernet, recalibrate",
    ),
    "no number": (["--recipe", "ds-net-digits", "--budget", "lots"], "--budget lots: .* number"),
    "out of reach": (["--recipe", "ds-net-digits", "--budget", "1M"], "out of reach: expected 40,228 to 86,872"),
    "original": (
        ["--recipe", "ds-net-digits", "--budget", "60K", "--stages.3.stage.options.original", "true"],
        "original=True has no budget",
    ),
    "no such stage": (
        ["--recipe", "ds-net-digits", "--stages.4.lr", "1"],
        "stages.4.lr: expected stages.N.FIELD with N from 1 to 3",
    ),
    "no stages": (["--recipe", "digits", "--stages.1.lr", "1"], "stages.1.lr: the recipe has no stages"),
    "which stage": (
        ["--recipe", "ds-net-digits", "--stage.options.drawn", "2"],
        "belongs to one of them: say stages.3.stage",
    ),
    "a stage that starts from a network": (["--recipe", "ds-net-digits", "--stage", "gate"], "give --model FOLDER"),
    "no stage of the recipe": (
        ["--recipe", "ds-net-digits", "--stage", "widths"],
        "Expected one that trains: supernet, gate",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_anything_trains(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, wanted = REFUSED[name]
    assert main(["train", *options, "--output", str(tmp_path / "run"), *DIGITS]) == 2
    assert re.search(wanted, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()
