"""Learning rates of the shipped recipes at the epochs where they change, schedules against those of torch and timm, stages."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

import thriftnet as tn
from thriftnet.cli.train import make_recipe
from thriftnet.dynamic.gate import gates
from thriftnet.train.optim import make_schedule
from thriftnet.train.recipe import Recipe, list_recipes, load_recipe, recipe_from
from thriftnet.train.stages import make_stage

FAITHFUL = [name for name in list_recipes() if not load_recipe(name).about["paper"].startswith("none")]


def rates(recipe: Recipe, steps_per_epoch: int = 4, epochs: float | None = None) -> dict[float, float]:
    """Epoch, as a fraction -> learning rate of the step that begins there."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], recipe.optimizer.lr)
    epochs = recipe.epochs if epochs is None else epochs
    schedule = make_schedule(optimizer, recipe, steps_per_epoch, epochs)
    found = {}
    for step in range(round(epochs * steps_per_epoch)):
        found[step / steps_per_epoch] = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
    return found


SHIFT = {0: 0.1, 81.75: 0.1, 82: 0.01, 122.75: 0.01, 123: 0.001, 163.75: 0.001}
SWRN = {0: 0.1, 59.75: 0.1, 60: 0.02, 119.75: 0.02, 120: 0.004, 159.75: 0.004, 160: 0.0008, 199.75: 0.0008}
BASIS = {0: 0.1, 149.75: 0.1, 150: 0.01, 224.75: 0.01, 225: 0.001, 299.75: 0.001}  # 150 is their 151, counted from 1
BASIS_IMAGENET = {0: 0.1, 59.75: 0.1, 60: 0.01, 99.75: 0.01, 100: 0.001, 139.75: 0.001, 140: 0.0001, 149.75: 0.0001}
BASIS_MOBILENET = BASIS | {284.75: 0.001, 285: 0.0005, 299.75: 0.0005}
SPIN = {0: 0.0, 60: 0.005, 119.5: 0.0099583333, 120: 0.01, 180: 0.00525, 240: 0.0005, 270: 0.00025, 299.5: 0.0000041666667}
DS_NET = {  # 150 epochs of a cosine, each at one rate, behind a warm-up that goes up from epoch to epoch, then 10 at the least
    0: 1e-5, 0.75: 1e-5, 1: 0.016008, 4: 0.064002, 5: 0.07978090320525, 75: 0.040005, 75.75: 0.040005, 149.75: 0.0000187715644235,
    150: 1e-5, 159.75: 1e-5,
}  # fmt: skip
DS_NET_GATE = {0: 0.08, 0.75: 0.08, 15: 0.040005, 29: 0.00022913, 30: 1e-5, 39.75: 1e-5}
TABLES = {
    name: table
    for pattern, table in (
        (r"(shift|depthwise)?resnet-.*", SHIFT),
        (r"swrn-.*", SWRN),
        (r"filter-basis-cifar10.*", BASIS),
        (r"filter-basis-imagenet-resnet34", BASIS_IMAGENET),
        (r"filter-basis-imagenet-mobilenetv2", BASIS_MOBILENET),
        (r".*convmixer-imagenet", SPIN),
        (r"ds-net-imagenet", DS_NET),
    )
    for name in FAITHFUL
    if re.fullmatch(pattern, name)
}


@pytest.mark.parametrize("name", FAITHFUL)
def test_learning_rates_are_those_of_the_papers(name: str):
    found = rates(load_recipe(name))
    assert max(found) == max(TABLES[name]) or max(TABLES[name]) == 299.5
    for epoch, rate in TABLES[name].items():
        assert found[epoch] == pytest.approx(rate, rel=1e-6, abs=1e-12), f"epoch {epoch}"


def test_learning_rates_of_the_gate_are_those_of_the_paper():
    recipe = load_recipe("ds-net-imagenet")
    found = rates(recipe.for_stage(recipe.stages[2]))
    assert max(found) == 39.75
    for epoch, rate in DS_NET_GATE.items():
        assert found[epoch] == pytest.approx(rate, rel=1e-3), f"epoch {epoch}"


def test_cosine_is_that_of_timm_with_warm_up_and_cool_down():
    from timm.scheduler import CosineLRScheduler

    fields = {"lr": 0.08, "min_lr": 1e-5, "warmup_epochs": 5, "warmup_lr": 1e-5, "epochs": 160, "cooldown_epochs": 10}
    found = rates(recipe_from({"schedule": "cosine", "per": "epoch", **fields}))
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.08)
    theirs = CosineLRScheduler(optimizer, t_initial=150, lr_min=1e-5, warmup_t=5, warmup_lr_init=1e-5)
    for epoch in range(160):
        theirs.step(epoch)
        for part in (0, 0.25, 0.75):
            assert found[epoch + part] == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-9), epoch


def test_multistep_is_that_of_torch():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    theirs = torch.optim.lr_scheduler.MultiStepLR(optimizer, [82, 123], 0.1)
    found = rates(load_recipe("shiftresnet-cifar10"))
    for epoch in range(164):
        assert found[epoch] == pytest.approx(theirs.get_last_lr()[0], rel=1e-9)
        optimizer.step()
        theirs.step()


@pytest.mark.parametrize("name", [name for name in FAITHFUL if "cifar100-" in name])
def test_the_constant_rate_of_the_cifar100_script_can_be_had(name: str):
    assert set(rates(load_recipe(name, schedule="constant")).values()) == {0.1}


@pytest.mark.parametrize("name", list_recipes())
def test_a_recipe_runs_for_fewer_steps_than_its_warm_up(name: str):
    recipe = load_recipe(name, max_steps=3, cooldown_epochs=0)
    assert all(rate >= 0 for rate in rates(recipe, 1000, 0.003).values())


# --- the stages of DS-Net


def test_the_three_stages_of_ds_net_are_those_of_the_authors():
    recipe = load_recipe("ds-net-imagenet")
    supernet, statistics, gate = (recipe.for_stage(entry) for entry in recipe.stages)
    assert (supernet.stage.name, gate.stage.name) == ("supernet", "gate")
    assert supernet.epochs == 160
    assert recipe.stages[1]["recalibrate"] == {"indices": [*range(14)], "batches": 1001}
    assert statistics.data.batch_size == 8 * 4 * 64
    assert {name for name in recipe.stages[2] if name != "stage.name"} == {
        "epochs", "optimizer.weight_decay", "schedule.warmup_epochs",
    }  # fmt: skip
    fields = gate.optimizer
    assert (gate.epochs, fields.weight_decay, gate.schedule.warmup_epochs, fields.ema_decay) == (40, 0.01, 0, 0.997)
    with torch.device("meta"):
        model = tn.create_model(recipe.model, **recipe.model_kwargs)
    step = make_stage("supernet", model, supernet.stage.options)
    assert (step.passes, step.teacher, step.ensemble) == (4, "average", False)  # type: ignore[attr-defined]
    assert gates(model).popitem()[1].widths == tuple(map(str, range(14)))
    corrected = make_stage("gate", model, gate.stage.options).objective  # type: ignore[attr-defined]
    assert not corrected.original


def test_what_the_authors_of_ds_net_did_can_be_had():
    options = re.findall(r"--([a-z][\w.-]*) (\"[^\"]*\"|[\w.]+)", load_recipe("ds-net-imagenet").about["defects"])
    texts = {name.replace("-", "_"): text.strip('"') for name, text in options}
    recipe = make_recipe("ds-net-imagenet", texts)
    assert recipe.stages[1]["recalibrate"] == {"indices": [*range(14)], "batches": 1001, "momentum": 0.1}
    assert recipe.model_kwargs["gate_choices"] == [0, 1, 2, 3]
    assert recipe.stages[2]["stage.options"] == {"original": True}
