"""The shipped recipes: they load, build and train; they say what the papers say; schedules, decay and defects are as written."""

from __future__ import annotations

import importlib.resources
import importlib.util
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import thriftnet as tn
from images import arrays
from thriftnet.cli import main
from thriftnet.cli.train import make_recipe
from thriftnet.core.provenance import data_facts
from thriftnet.core.tied import count_params
from thriftnet.data.augmentation import Augmentation
from thriftnet.data.dataset import ArrayImages, DataSource
from thriftnet.errors import ConfigError
from thriftnet.models import MODELS, model_kwargs
from thriftnet.models.table import all_kwargs, is_zoo_name, zoo_name
from thriftnet.resolve import open_model
from thriftnet.techniques import convert
from thriftnet.train import train
from thriftnet.train.distributed import Distributed
from thriftnet.train.optim import decay_groups
from thriftnet.train.prepare import prepare_model
from thriftnet.train.recipe import GROUPS, Recipe, field_names, full_name, list_recipes, load_recipe, recipe_from
from thriftnet.train.stages import STAGES
from thriftnet.train.trainer import Trainer

DOCS = Path(__file__).parent.parent / "docs"
RECIPES = list_recipes()
OURS = ("convert-and-recover", "digits", "ds-net-cifar", "ds-net-digits", "fast-cifar", "slimmable-resnet-cifar")
FAITHFUL = [name for name in RECIPES if name not in OURS]
CLASSES = {"CIFAR-10": 10, "CIFAR-100": 100, "ImageNet": 1000, "digits": 10}
ROWS = [(name, row) for name in RECIPES for row in load_recipe(name).about.get("rows", ())]


def network(recipe: Recipe, classes: int, **kwargs: Any) -> nn.Module:
    """A recipe's network without memory for its weights."""
    with torch.device("meta"):
        model = open_model(recipe.model, **{"num_classes": classes, **recipe.model_kwargs, **kwargs})
        for technique in recipe.technique:
            model = convert(model, technique, select=recipe.select)
    return model


def with_options(name: str, options: str) -> Recipe:
    """A recipe with fields replaced as on the command line."""
    words = shlex.split(options)
    return make_recipe(name, {key[2:].replace("-", "_"): value for key, value in zip(words[::2], words[1::2], strict=True)})


def classes_of(recipe: Recipe) -> int:
    return CLASSES.get(recipe.about["data"], 10)


def source(size: int, channels: int = 3, classes: int = 4, train: int = 16) -> DataSource:
    """Random images in memory, a few of each class."""
    splits = {"train": arrays(train, size, classes, channels), "test": arrays(4, size, classes, channels)}
    return DataSource("random", tuple("abcdefgh"[:classes]), splits, (0.5,) * channels, (0.25,) * channels)


# --- what they say of themselves


def test_there_is_a_recipe_for_every_training_of_the_papers():
    cifar = ["shiftresnet", "resnet", "depthwiseresnet", "swrn"]
    expected = {f"{network}-{data}" for network in cifar for data in ("cifar10", "cifar100")} | {"filter-basis-cifar10"}
    expected |= {f"filter-basis-cifar100-{name}" for name in ("resnet34", "densenet121", "resnext50", "mobilenetv2")}
    expected |= {f"filter-basis-imagenet-{name}" for name in ("resnet34", "mobilenetv2")}
    expected |= {f"{name}-imagenet" for name in ("swrn", "convmixer", "ws-convmixer", "wfws-convmixer", "ds-net")}
    assert expected <= set(FAITHFUL)
    assert set(OURS) <= set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_states_where_it_comes_from_and_what_to_expect(name: str):
    about = load_recipe(name).about
    wanted = {"what", "paper", "table", "data", "expected_top1", "params", "hardware", "time", "defects"}
    assert wanted <= about.keys() <= wanted | {"rows", "note", "start"}
    for key in wanted - {"expected_top1", "params"}:
        assert isinstance(about[key], str), key
    text = (importlib.resources.files("thriftnet.train") / "recipes" / f"{name}.yaml").read_text()
    header = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    assert (name in FAITHFUL) == (not about["paper"].startswith("none"))
    if name in FAITHFUL:
        assert about["paper"] in header
        assert f"{about['params']:,}" in header or "Top-1" in header
        stated = about["expected_top1"]
        assert (f"{stated:.2f} %" if isinstance(stated, float) else "not stated") in header
        assert re.search("hardware and time: not stated|kind and time not stated|hardware and time", header, re.IGNORECASE)


@pytest.mark.parametrize("name", RECIPES)
def test_each_option_that_a_recipe_names_is_one(name: str):
    recipe = load_recipe(name)
    known = {"teacher", "data", "output", "budget", "stages"}
    if is_zoo_name(recipe.model):
        rows = [row["options"].split()[1] for row in recipe.about.get("rows", ()) if "--model" in row["options"]]
        known |= {kwarg for model in (recipe.model, *rows) for kwarg in all_kwargs(model)}
    for text in recipe.about.values():
        for option in re.findall(r"--([a-z][a-z0-9-]*)", str(text)):
            assert option.replace("-", "_") in known or full_name(option.replace("-", "_")), option


@pytest.mark.parametrize("name", RECIPES)
def test_the_network_has_the_parameters_stated(name: str):
    recipe = load_recipe(name)
    kwargs = {"in_chans": 1} if name == "digits" else {}
    assert count_params(network(recipe, classes_of(recipe), **kwargs)) == recipe.about["params"]
    if recipe.model in MODELS and not recipe.model_kwargs and not recipe.technique and name != "digits":
        fact = MODELS[recipe.model].params
        default_classes = model_kwargs(recipe.model)["num_classes"]
        assert classes_of(recipe) != default_classes or recipe.about["params"] == fact


@pytest.mark.parametrize(("name", "row"), ROWS, ids=[f"{name}: {row['row']}" for name, row in ROWS])
def test_each_row_of_a_table_is_the_network_that_was_published(name: str, row: dict[str, Any]):
    recipe = with_options(name, row["options"])
    data = recipe.about["data"]
    assert count_params(network(recipe, CLASSES[data])) == row["params"]
    if row["top1"] == "not stated":
        return
    published = MODELS[zoo_name(recipe.model)].published
    defaults = {key: model_kwargs(recipe.model)[key] for key in recipe.model_kwargs}
    if recipe.model_kwargs == defaults and data in published.top1:
        assert published.top1[data] == row["top1"]
    elif data != "CIFAR-10" or recipe.model in ("resnet32_single_shared", "resnet56_single_shared"):
        assert f"{row['top1']:g}" in published.note
    else:
        assert "reduction" in row["options"]  # the zoo keeps the CIFAR-100 accuracies of these
    if row["params"] == recipe.about["params"]:
        assert row["top1"] == recipe.about["expected_top1"]


@pytest.mark.parametrize("name", FAITHFUL)
def test_the_expected_accuracy_is_the_published_one(name: str):
    recipe = load_recipe(name)
    entry = MODELS.get("wfws_convmixer" if name.startswith("wfws") else recipe.model)
    published = {} if entry is None or recipe.model_kwargs else entry.published.top1
    if published:
        assert recipe.about["expected_top1"] == published[recipe.about["data"]]
    elif recipe.about["expected_top1"] != "not stated":
        assert entry is not None
        assert f"{recipe.about['expected_top1']:g}" in entry.published.note


# --- options take effect


@pytest.mark.parametrize("name", RECIPES)
def test_batch_size_model_and_data_options_take_effect(name: str, tmp_path: Path):
    """In every stage, whatever the recipe states."""
    options = {"model": "convmixer", "model_kwargs.dim": 4, "model_kwargs.depth": 1, "model_kwargs.patch_size": 4}
    options |= {"batch_size": 6, "workers": 0, "image_size": 16, "resize": 16, "crop_padding": 3, "cutout": 5, "flip": False}
    options |= {"mean": [0.25, 0.5, 0.75], "std": [0.5, 0.5, 0.5], "random_erasing": 0.0, "rand_augment": None}
    recipe = make_recipe(name, options)
    stages = [recipe.for_stage(entry) for entry in recipe.stages] or [recipe]
    for stage in stages:
        model = tn.create_model(stage.model, num_classes=4, **stage.model_kwargs)
        assert (stage.model_kwargs, stage.augmentation.crop_padding, stage.augmentation.cutout) == (
            {"dim": 4, "depth": 1, "patch_size": 4},
            3,
            5,
        )
        trainer = Trainer(stage, source(12, train=24), model, tmp_path / "run", Distributed("cpu", "fp32"))
        images, labels = next(iter(trainer.train_loader(trainer.source.split("train"), 1, drop_last=True)))
        assert (images.shape, labels.shape) == ((6, 3, 16, 16), (6,))
        facts = data_facts(model)
        assert (facts.input_size, facts.resize) == ((3, 16, 16), 16)
        assert facts.normalisation == {"mean": (0.25, 0.5, 0.75), "std": (0.5, 0.5, 0.5)}


def test_one_stage_of_several():
    gate = load_recipe("ds-net-imagenet", stage="gate")
    assert (gate.stages, gate.stage.name, gate.epochs, gate.optimizer.weight_decay) == ((), "gate", 40, 0.01)
    assert gate.needs == ("model",)
    first = load_recipe("ds-net-imagenet", stage="supernet", lr=0.2)
    assert (first.stages, first.stage.name, first.needs, first.optimizer.lr) == ((), "supernet", (), 0.2)
    with pytest.raises(tn.ConfigError, match=r"stage='recalibrate'.*supernet, gate.*thriftnet recalibrate"):
        load_recipe("ds-net-imagenet", stage="recalibrate")
    with pytest.raises(tn.ConfigError, match=r"stage='widths'.*Expected one that trains: supernet, gate"):
        load_recipe("ds-net-imagenet", stage="widths")


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"epochs": 300, "warmup_epochs": 500}, "warmup_epochs=500 and cooldown_epochs=0 leave nothing of epochs=300"),
        ({"schedule": "piecewise", "points": {0: 0, 5: -1}}, r"points=.*-1.*a number >= 0"),
        ({"schedule": "piecewise", "points": {-1: 0, 5: 1}}, r"points=.*-1.*a number >= 0"),
        ({"schedule": "multistep", "milestones": {3: -0.1}}, r"milestones=.*3: -0\.1.*a number >= 0"),
    ],
)
def test_schedules_without_a_meaning_are_refused(fields: dict[str, Any], problem: str):
    with pytest.raises(tn.ConfigError, match=problem):
        Recipe().replace(**fields)


@pytest.mark.parametrize("field", ["cutout", "crop_padding"])
def test_a_square_larger_than_the_image_is_refused(field: str, tmp_path: Path):
    with pytest.raises(tn.ConfigError, match=rf"{field}=13 is more than the side of the images, 12 x 12"):
        train(Recipe(augmentation=Augmentation(**{field: 13})), source(12), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_trackers_are_known(tmp_path: Path):
    recipe = load_recipe("digits", max_steps=1, trackers=["tensorbord"])
    with pytest.raises(tn.ConfigError, match="unknown tracker 'tensorbord': did you mean 'tensorboard'"):
        train(recipe, "digits", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    absent = next(name for name in ("clearml", "wandb", "dvclive") if importlib.util.find_spec(name) is None)
    result = train(
        load_recipe(
            "digits",
            max_steps=1,
            trackers=[absent],
            model="convmixer",
            model_kwargs={"dim": 4, "depth": 1},
            **{"model_kwargs.patch_size": 4},
        ),
        "digits",
        tmp_path,
    )
    assert any(absent in note for note in result.notes)


# --- one step of each

# of four widths where the recipe has fourteen; tests/test_stages.py trains the whole network of ds-net-digits
DS_NET: dict[str, Any] = {
    "model": "dsnet",
    "model_kwargs": {
        "stem": [4, 6],
        "stages": [[[4, 8], 1, 3, 1, "ds", False], [[6, 8, 10, 12], 2, 3, 2, "ds", True]],
        "gate_choices": [0, 1, 2, 3],
    },
    "stages.2.recalibrate.indices": [0, 1, 2, 3],
}
SMALL: dict[str, dict[str, Any]] = {
    "swrn": {"model_kwargs": {"depth": 16, "width": 1, "templates": 2}},
    "swrn-imagenet": {"model": "torchvision:resnet18", "select": r"^layer\d\.[01]\.conv2$"},
    "convmixer": {"model_kwargs": {"dim": 16, "depth": 4}},
    "ws-convmixer": {"model_kwargs": {"dim": 16, "depth": 4}},
    "wfws-convmixer": {"model_kwargs": {"dim": 16, "depth": 4}},
    "filter-basis-cifar10": {"model": "resnet32_double_shared", "model_kwargs": {"shared_rank": 4}},
    "filter-basis-cifar100-resnet34": {"model": "cifar_resnet18_single_shared", "model_kwargs": {"shared_rank": 4}},
    "filter-basis-imagenet-resnet34": {"model_kwargs": {"shared_rank": 4}},
    "ds-net-imagenet": {**DS_NET, "cooldown_epochs": 0},
    "ds-net-digits": DS_NET,
    "ds-net-cifar": DS_NET,
}


def small(name: str) -> Recipe:
    """A recipe for four images a step on the CPU, with its network made smaller where it can be."""
    fields: dict[str, Any] = {
        "max_steps": 1,
        "batch_size": 4,
        "workers": 0,
        "trackers": (),
        "memory_format": "contiguous",
    }
    recipe = load_recipe(name)
    if recipe.run.precision == "fp16":
        fields["precision"] = "fp32"
    if recipe.augmentation.image_size:
        fields |= {"image_size": 64, "resize": 72}
    fields |= SMALL.get(name, SMALL.get(name.rpartition("-")[0], {}))
    return load_recipe(name, **fields)


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_takes_a_step(name: str, tmp_path: Path):
    recipe = small(name)
    size = recipe.augmentation.image_size or (8 if name == "digits" else 32)
    outcome = train(recipe, source(size, channels=1 if name == "digits" else 3), tmp_path, device="cpu")
    assert outcome.steps == 1
    assert torch.tensor(outcome.loss).isfinite()
    assert (Path(outcome.run) / "model" / "model.safetensors").exists()
    stages = [f"{number}-{entry.get('stage.name', 'recalibrate')}" for number, entry in enumerate(recipe.stages, 1)]
    assert [path.name for path in sorted(tmp_path.glob("[1-9]-*"))] == stages


def test_a_network_is_converted_and_recovers_from_its_teacher(tmp_path: Path):
    """From a trained folder, which is the teacher, too."""
    data = source(8, channels=1)
    fields = {"trackers": (), "workers": 0, "augmentation": Augmentation(), "precision": "fp32"}
    first = train(load_recipe("digits", max_steps=2, batch_size=8, **fields), data, tmp_path / "first", device="cpu")
    folder = str(Path(first.run) / "model")
    recipe = load_recipe("convert-and-recover", model=folder, select_on="last", epochs=2, batch_size=8, **fields)
    outcome = train(recipe, data, tmp_path / "second", teacher=folder, device="cpu")
    assert outcome.params < first.params
    assert json.loads((Path(outcome.run) / "run.json").read_text())["teacher"] == folder


CONVERTED = "the network is converted already: the recipe's soft-sharing(templates=2) is not applied on top"


@pytest.mark.parametrize(
    ("fields", "note", "rank"),
    [
        ({}, CONVERTED, True),
        ({"technique": "none"}, "", True),
        ({"technique": "low-rank(rank=1)"}, "", False),
        ({"convert_again": True, "technique": []}, "", True),
    ],
)
def test_a_converted_network_is_not_converted_again_without_being_told(fields: dict[str, Any], note: str, rank: bool):
    """Which a technique of one's own does."""
    plain = tn.create_model("resnet20", num_classes=3)
    converted = tn.convert(plain, "soft-sharing(templates=1)")
    recipe, notes = load_recipe("convert-and-recover", **fields), list[str]()
    found = prepare_model(recipe, source(32, classes=3), converted, notes.append)
    assert (found is converted) == rank
    assert [each.partition(". --technique")[0] for each in notes] == ([note] if note else [])
    folded = tn.fold(converted.eval())  # is plain: conversion as usual
    assert (prepare_model(recipe, source(32, classes=3), folded, notes.append) is folded) == (not recipe.technique)


def test_a_recipe_says_none_for_no_technique(tmp_path: Path):
    (tmp_path / "r.yaml").write_text("technique: none\n")
    for stated in (load_recipe(str(tmp_path / "r.yaml")), load_recipe("convert-and-recover", technique=["none"])):
        assert stated.technique == ()
        assert not stated.convert_again


# --- the rest of what the papers state


AS_STATED: dict[str, dict[str, Any]] = {
    r"(shift|depthwise)?resnet-cifar.*": {
        "epochs": 164, "batch_size": 128, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "clip_grad": None,
    },
    r"swrn-.*": {"epochs": 200, "batch_size": 128, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4},
    r"filter-basis-cifar.*": {
        "epochs": 300, "batch_size": 256, "momentum": 0.9, "nesterov": False, "weight_decay": 5e-4, "penalty": 1.0,
    },
    r"filter-basis-imagenet-.*": {"batch_size": 512, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "penalty": 1.0},
    r".*convmixer-imagenet": {
        "epochs": 300, "batch_size": 256, "lr": 0.01, "weight_decay": 2e-5, "clip_grad": 1.0,
        "label_smoothing": 0.1, "mixup": 0.5, "cutmix": 0.5, "mixup_switch": 0.5, "precision": "fp16",
    },
    "ds-net-imagenet": {
        "epochs": 160, "batch_size": 512, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "label_smoothing": 0.1,
        "clip_grad": None, "mixup": 0.0, "cutmix": 0.0, "seed": 42, "drop_last": True, "precision": "fp32",
    },
}  # fmt: skip
CUTOUT = {"swrn-cifar10": 16, "swrn-cifar100": 16}
MEANS = {  # of 255, or of 1
    r"(shift|depthwise)?resnet-cifar.*": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010), 1),
    r"swrn-cifar10": ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7), 255),
    r"swrn-cifar100": ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4), 255),
    r"filter-basis-cifar100-.*": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276), 1),
    r"filter-basis-cifar10|.*-imagenet.*": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), 1),
}


def value_of(recipe: Recipe, name: str) -> Any:
    """A field by its last name."""
    value: Any = recipe
    for part in str(full_name(name)).split("."):
        value = getattr(value, part)
    return value


def matching(table: dict[str, Any], name: str) -> Any:
    return next(value for pattern, value in table.items() if re.fullmatch(pattern, name))


@pytest.mark.parametrize("name", FAITHFUL)
def test_constants_and_augmentation_are_those_of_the_papers(name: str):
    recipe = load_recipe(name)
    for field, value in matching(AS_STATED, name).items():
        assert value_of(recipe, field) == value, field
    assert recipe.optimizer.name == ("adamw" if "convmixer" in name else "sgd")
    assert recipe.loss.distill_weight == Recipe().loss.distill_weight
    assert (recipe.optimizer.ema_decay, recipe.optimizer.ema_warmup) == (0.997 if name == "ds-net-imagenet" else 0, False)
    augmentation = recipe.augmentation
    mean, std, scale = matching(MEANS, name)
    assert augmentation.mean == pytest.approx([value / scale for value in mean], abs=1e-7)
    assert augmentation.std == pytest.approx([value / scale for value in std], abs=1e-7)
    assert augmentation.cutout == CUTOUT.get(name, 0)
    assert augmentation.flip
    if "imagenet" in name:
        assert (augmentation.image_size, augmentation.resize, augmentation.crop_pct) == (224, None, 0.875)  # 256 at 224
        assert augmentation.random_resized_crop == (0.08, 1.0)
        assert augmentation.crop_ratio == pytest.approx((3 / 4, 4 / 3))
    else:
        assert augmentation.crop_padding == 4
    if "convmixer" in name:
        assert (augmentation.interpolation, augmentation.eval_interpolation) == ("bicubic", "bicubic")
        assert (augmentation.rand_augment, augmentation.random_erasing) == ("rand-m9-mstd0.5-inc1", 0.25)
    if name == "ds-net-imagenet":
        assert (augmentation.rand_augment, augmentation.random_erasing) == ("rand-m9-mstd0.5", 0.2)
        assert (augmentation.interpolation, augmentation.eval_interpolation) == ("random", "bicubic")


NO_DECAY_KINDS = {  # who has no weight decay, by name
    r"(shift|depthwise)?resnet-.*|filter-basis-.*": r"$^",
    r"swrn-.*": r".*\.coefficients",
    r".*convmixer-imagenet": r"(.*\.)?norm\d?\.(weight|bias)",
    r"fast-cifar": r"(.*\.)?bn\d?\.(weight|bias)|fc\.bias|linear\.bias",
    r"convert-and-recover": r"(.*\.)?bn\d?\.(weight|bias)|fc\.bias|linear\.bias|.*\.coefficients",
    r"digits": r"$^",
    r"slimmable-resnet-cifar": r"(.*\.)?bn\d?\.(weight|bias)|fc\.bias",
    r"ds-net-.*": r".*\.norm\d\.(weight|bias)|norm\.(weight|bias)|.*\.se\.(reduce|expand)\.bias|fc\.bias",
}


@pytest.mark.parametrize("name", RECIPES)
def test_who_is_spared_weight_decay(name: str):
    recipe = load_recipe(name)
    model = network(recipe, 10)
    groups = decay_groups(model, recipe.optimizer.weight_decay, recipe.optimizer.no_decay)
    names = {id(parameter): key for key, parameter in model.named_parameters() if parameter.requires_grad}  # no gates yet
    found = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(names) == len(found)
    for key, decay in found.items():
        assert decay == (0.0 if re.fullmatch(matching(NO_DECAY_KINDS, name), key) else recipe.optimizer.weight_decay), key


# --- defects of the originals, corrected unless asked for


def test_no_faithful_recipe_looks_at_the_test_images_unasked():
    assert {load_recipe(name).run.select_on for name in FAITHFUL} == {"val", "last"}
    assert [name for name in FAITHFUL if load_recipe(name).run.select_on == "val"] == ["swrn-cifar10", "swrn-cifar100"]


@pytest.mark.parametrize("select_on", ["test", "last"])
def test_selection_on_test_images_is_said_in_the_output(select_on: str, tmp_path: Path):
    outcome = train(small("shiftresnet-cifar10").replace(select_on=select_on), source(32), tmp_path, device="cpu")
    assert any("test images" in note for note in outcome.notes) == (select_on == "test")


class Line(nn.Module):
    """The mean of an image times a weight, for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(1, 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.fc(x.mean((1, 2, 3))[:, None])
        return logits


def by_hand(model: Line, data: DataSource, epochs: int, resets: bool) -> torch.Tensor:
    """One step an epoch on all images, with torch's SGD."""
    images = data.split("train").resident().double() / 255  # the mean of each is not the same
    labels = data.split("train").labels
    model = model.double()

    def new() -> torch.optim.SGD:
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)

    optimizer = new()
    for epoch in range(epochs):
        optimizer = new() if resets and epoch else optimizer
        optimizer.zero_grad()
        nn.functional.cross_entropy(model((images - 0.5) / 0.25), labels).backward()
        optimizer.step()
    return model.fc.weight.detach()


@pytest.mark.parametrize("resets", [True, False])
def test_momentum_is_reset_each_epoch_where_that_is_asked_for(resets: bool, tmp_path: Path):
    images = ArrayImages(torch.arange(8, dtype=torch.uint8).view(8, 1, 1, 1).expand(8, 3, 4, 4) * 30, torch.arange(8) // 4)
    data = DataSource("grey", ("dark", "bright"), {"train": images, "test": images}, (0.5,) * 3, (0.25,) * 3)
    fields = {"epochs": 5, "batch_size": 8, "augmentation": Augmentation(), "trackers": ()}
    recipe = load_recipe("shiftresnet-cifar10", reset_momentum_every_epoch=resets, **fields)
    model = Line()
    start, other = Line(), Line()
    start.load_state_dict(model.state_dict())
    other.load_state_dict(model.state_dict())
    train(recipe, data, tmp_path, model=model, device="cpu")
    assert (model.fc.weight.double() - by_hand(start, data, 5, resets)).abs().max() < 1e-6
    assert (model.fc.weight.double() - by_hand(other, data, 5, not resets)).abs().max() > 1e-3


# --- what is said of them elsewhere


def test_one_recipe_is_shown_with_all_its_fields(capsys: pytest.CaptureFixture[str]):
    assert main(["recipes", "ws-convmixer-imagenet"]) == 0
    assert recipe_from(yaml.safe_load(capsys.readouterr().out)) == load_recipe("ws-convmixer-imagenet")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["shiftresnet-cifar"], "shiftresnet-cifar10"), (["digits", "--pattern", "x"], "unknown option '--pattern'")],
)
def test_what_cannot_be_listed_is_said(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    assert main(["recipes", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_table_of_fields_is_that_of_the_dataclasses():
    page = (DOCS / "training.md").read_text(encoding="utf-8").split("\n## Fields of a recipe\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `([\w.]+)` \| ([^|]+) \|", page, re.MULTILINE))
    names = [name for name in field_names() if not name.startswith("augmentation.")]  # docs/data.md has these
    assert list(rows) == names
    for name in names:
        default = json.loads(json.dumps(value_of(Recipe(), name)))
        assert yaml.safe_load(rows[name].strip().strip("`")) == default, name


def test_a_last_name_is_enough_where_one_group_has_it():
    leaves = [name.rpartition(".")[2] for name in field_names() if not name.endswith(".name")]
    assert len(set(leaves)) == len(leaves)
    for name in field_names():
        assert full_name(name) == name
        assert name.endswith(".name") or full_name(name.rpartition(".")[2]) == name
    assert full_name("name") is None
    assert {name.partition(".")[0] for name in field_names() if "." in name} == set(GROUPS)


def test_one_thing_has_one_name_in_python_and_on_the_command_line():
    wanted = load_recipe("digits", lr=0.05)
    assert wanted.optimizer.lr == 0.05
    assert load_recipe("digits", **{"optimizer.lr": 0.05}) == wanted
    assert load_recipe("digits", optimizer={"lr": 0.05}) == wanted
    assert make_recipe("digits", {"lr": "0.05"}) == make_recipe("digits", {"optimizer.lr": "5e-2"}) == wanted
    assert make_recipe("digits", {"optimizer": "adamw"}) == load_recipe("digits", optimizer="adamw")
    assert make_recipe("digits", {"no_decay": "norm"}) == load_recipe("digits", no_decay=["norm"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lrr": 1}, "unknown recipe field 'lrr': did you mean 'lr'"),
        ({"augmentation": {"flop": True}}, "unknown field of augmentation 'flop': did you mean 'flip'"),
        ({"lr": "fast"}, "optimizer.lr='fast': expected a number"),
        ({"lr": 0}, "lr=0.*: expected a number > 0"),
        ({"max_steps": "many"}, "max_steps='many': expected an integer or null"),
        ({"schedule": "cosin"}, "schedule.name='cosin': expected .*'cosine'"),
        ({"no_decay": ["nrm"]}, "optimizer.no_decay='nrm': expected 'technique', 'norm', 'bias'"),
        ({"augmentation": 3}, "augmentation=3: expected a mapping"),
        ({"model_kwargs": 5, "model_kwargs.depth": 3}, "model_kwargs=5: expected a mapping"),
        ({"stages": 3}, "stages: expected a list of mappings, got 3"),
        ({"stages": [{"recalibrate": None}]}, "recalibrate=None: expected a mapping"),
    ],
)
def test_a_value_that_a_field_cannot_have_is_refused_in_one_line(fields: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message) as caught:
        load_recipe("digits", **fields)
    assert "\n" not in str(caught.value)


def test_the_stages_on_the_page_are_those_there_are():
    page = (DOCS / "training.md").read_text(encoding="utf-8").split("\n## Stages\n")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(STAGES)


@pytest.mark.parametrize("fields", [{"lr": -1.0}, {"shedule": "cosine"}, {"schedule": "multistep", "milestones": {}}])
def test_a_recipe_that_cannot_be_is_refused(fields: dict[str, Any]):
    with pytest.raises(ConfigError):
        load_recipe("swrn-cifar10", **fields)
