"""Names of the authors mean what their project, the arguments or the images decide; where nothing decides, the error asks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import thriftnet as tn
from images import class_folders
from thriftnet.cli import main
from thriftnet.core.history import history
from thriftnet.core.provenance import data_facts
from thriftnet.models import MODELS, zoo_name
from thriftnet.models.table import IDENTITY

SHIFT = MODELS["shiftresnet20"].paper
CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)


@pytest.mark.parametrize(
    ("name", "context", "expected"),
    [
        ("ResNet34_SingleShared", {"size": CIFAR}, "cifar_resnet34_single_shared"),
        ("ResNet34_SingleShared", {"size": IMAGENET}, "resnet34_single_shared"),
        ("resnet34_single_shared", {"size": CIFAR}, "resnet34_single_shared"),  # the zoo's own name
        ("MobileNetV2_Shared", {"size": CIFAR}, "cifar_mobilenetv2_shared"),
        ("MobileNetV2_Shared", {"size": (3, 160, 160)}, "mobilenetv2_shared"),
        ("ResNet34_SharedOnly", {}, "cifar_resnet34_shared_only"),
        ("ResNet34_NonShared", {}, "cifar_resnet34_non_shared"),
        ("ResNet18_SingleShared", {}, "cifar_resnet18_single_shared"),
        ("ResNet18_SharedOnly", {}, "cifar_resnet18_shared_only"),
        ("ResNet18_NonShared", {}, "cifar_resnet18_non_shared"),
        ("resnet20", {}, "resnet20"),
        ("resnet20", {"paper": SHIFT}, "resnet20_projection"),
        ("resnet20", {"kwargs": ["reduction"]}, "resnet20_projection"),
        ("wrn-16-4", {}, "wrn16_4"),
    ],
)
def test_what_a_name_means(name: str, context: dict[str, object], expected: str):
    assert zoo_name(name, **context) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("ResNet34_SingleShared", "cifar_resnet34_single_shared", "resnet34_single_shared"),
        ("MobileNetV2_Shared", "cifar_mobilenetv2_shared", "mobilenetv2_shared"),
        ("ResNet20", "resnet20", "resnet20_projection"),
    ],
)
def test_where_nothing_decides_the_error_asks(name: str, first: str, second: str):
    with pytest.raises(tn.ConfigError, match=f"{name} means {first} .*3x32x32.* or {second} .*give one of these names"):
        tn.create_model(name)


def test_count_decides_by_the_input_size(capsys: pytest.CaptureFixture[str]):
    for size, params in (("3,32,32", 6485844), ("3,224,224", 9436888)):
        classes = ["--num-classes", "100"] if size == "3,32,32" else []
        assert main(["count", "ResNet34_SingleShared", "--input-size", size, *classes, "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["params"] == params
    assert main(["count", "ResNet34_SingleShared"]) == 2
    assert "cifar_resnet34_single_shared" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--recipe", "resnet-cifar10", "--model", "resnet20"], ("resnet20_projection", {})),
        (["--recipe", "digits", "--model", "resnet20"], ("resnet20", {})),
        (["--recipe", "swrn-cifar10", "--model", "resnet20"], ("resnet20", {})),  # without the arguments of swrn
        (
            ["--recipe", "swrn-cifar10", "--model", "SWRN", "--depth", "16", "--width", "1", "--templates", "2"],
            ("swrn", {"depth": 16, "width": 1, "templates": 2}),
        ),
        (
            [
                "--model",
                "ws_convmixer",
                "--dim",
                "4",
                "--depth",
                "8",
                "--patch-size",
                "4",
                "--mapping",
                "random",
                "--seed",
                "3",
            ],
            ("ws_convmixer", {"dim": 4, "depth": 8, "patch_size": 4, "mapping": "random", "seed": 3}),
        ),
        (
            ["--model-kwargs", "{dim: 4, depth: 2}", "--patch-size", "4", "--model", "convmixer"],
            ("convmixer", {"dim": 4, "depth": 2, "patch_size": 4}),
        ),
        (
            ["--patch-size", "4", "--model", "convmixer", "--model-kwargs", "{dim: 4, depth: 2}"],
            ("convmixer", {"dim": 4, "depth": 2, "patch_size": 4}),
        ),
    ],
)
def test_what_train_builds(
    arguments: list[str], expected: tuple[str, dict[str, object]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    class_folders(tmp_path / "data" / "train")
    class_folders(tmp_path / "data" / "val")
    tiny = [
        "--max-steps",
        "1",
        "--batch-size",
        "4",
        "--workers",
        "0",
        "--precision",
        "fp32",
        "--select-on",
        "last",
        "--cutout",
        "4",
    ]
    data = ["--data", f"folder:{tmp_path / 'data'}", "--output", str(tmp_path / "run")]
    assert main(["train", *arguments, *tiny, *data]) == 0, capsys.readouterr().err
    identity = getattr(tn.load(tmp_path / "run"), IDENTITY)
    assert (identity["name"], identity["kwargs"]) == (expected[0], {**expected[1], "num_classes": 2})


@pytest.mark.parametrize("where", ["network", "technique"])
def test_the_seed_reaches_random_groups(where: str, tmp_path: Path):
    from thriftnet.data.sources import open_data
    from thriftnet.train import Recipe
    from thriftnet.train.prepare import prepare_model

    kwargs = {"dim": 4, "depth": 8, "patch_size": 2}
    of_network = {"model": "ws_convmixer", "model_kwargs": {**kwargs, "mapping": "random"}}
    of_technique = {"model": "convmixer", "model_kwargs": kwargs, "technique": ("weight-sharing(mapping='random')",)}
    groups = set()
    for seed in range(3):
        recipe = Recipe(seed=seed, **(of_network if where == "network" else of_technique))  # type: ignore[arg-type]
        model = prepare_model(recipe, open_data("digits"))
        names: dict[int, list[str]] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            if name.endswith("pointwise"):
                names.setdefault(id(module), []).append(name)
        groups.add(str(sorted(names.values())))
        loaded = tn.load(tn.save(model, tmp_path / str(seed)))
        images = torch.randn(2, 1, 8, 8)
        assert torch.equal(loaded(images), model.eval()(images))
    assert len(groups) == 3


def test_an_argument_given_twice_is_refused(capsys: pytest.CaptureFixture[str]):
    assert (
        main(
            [
                "train",
                "--model-kwargs",
                "{depth: 2}",
                "--depth",
                "3",
                "--model",
                "convmixer",
                "--data",
                "digits",
                "--output",
                "x",
            ]
        )
        == 2
    )
    assert "depth is given twice" in capsys.readouterr().err


def test_another_classifier_for_a_saved_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """`--num-classes` replaces the classifier, says so, and the network trains and comes back."""
    class_folders(tmp_path / "data" / "train", names=("a", "b", "c"))
    class_folders(tmp_path / "data" / "val", names=("a", "b", "c"))
    model = tn.convert(tn.create_model("resnet20", num_classes=7), "soft-sharing(templates=2)")
    tn.save(model, tmp_path / "seven")
    command = [
        "train",
        "--model",
        str(tmp_path / "seven"),
        "--data",
        f"folder:{tmp_path / 'data'}",
        "--output",
        str(tmp_path / "run"),
    ]
    command += ["--max-steps", "1", "--batch-size", "4", "--select-on", "last"]
    assert main(command) == 2
    assert "give num_classes=3 (--num-classes 3)" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert main([*command, "--num-classes", "3"]) == 0
    assert "a new classifier for 3 classes" in capsys.readouterr().out
    loaded = tn.load(tmp_path / "run")
    assert loaded(torch.zeros(1, 3, 12, 12)).shape == (1, 3)
    assert main(["count", str(tmp_path / "run"), "--num-classes", "5", "--json"]) == 0
    shown = capsys.readouterr()
    assert "a new classifier for 5 classes, with random weights" in shown.err
    assert main(["count", str(tmp_path / "run"), "--depth", "5"]) == 2
    assert "--num-classes" in capsys.readouterr().err


def test_the_other_layers_keep_their_weights(tmp_path: Path):
    model = tn.convert(tn.create_model("resnet20", num_classes=7), "slimmable(widths=(0.5, 1.0))").eval()
    other = tn.open_model(str(tn.save(model, tmp_path / "m")), num_classes=3)
    before, after = model.state_dict(), other.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["fc.weight", "fc.bias"]
    again = tn.load(tn.save(other.eval(), tmp_path / "n"))
    images = torch.randn(2, 3, 32, 32)
    for width in (0.5, 1.0):
        tn.set_width(again, width)
        tn.set_width(other, width)
        assert torch.equal(again(images), other(images))


@pytest.mark.parametrize("source", ["checkpoint-149.pth.tar", "runs/nothing", "dsne.pth"])
def test_a_mistyped_path_is_no_model(source: str):
    with pytest.raises(tn.ConfigError, match=r"no such file: "):
        tn.open_model(source)


@pytest.mark.parametrize("verb", ["recalibrate", "search"])
def test_a_network_is_saved_with_the_preprocessing_that_was_used(verb: str, tmp_path: Path):
    class_folders(tmp_path / "data" / "train")
    class_folders(tmp_path / "data" / "val")
    model = tn.convert(tn.create_model("resnet20", num_classes=2), "slimmable(widths=(0.5, 1.0))")
    tn.save(model, tmp_path / "m", metadata={"normalisation": {"mean": [0.5] * 3, "std": [0.5] * 3}})
    command = [
        verb,
        str(tmp_path / "m"),
        "--data",
        f"folder:{tmp_path / 'data'}",
        "--output",
        str(tmp_path / "out"),
        "--batch-size",
        "4",
    ]
    command += [
        "--mean",
        "0.1,0.2,0.3",
        "--std",
        "0.9,0.8,0.7",
        "--image-size",
        "16",
        "--crop-pct",
        "0.5",
        "--interpolation",
        "bicubic",
    ]
    if verb == "search":
        command += ["--macs", "20M", "--population", "2", "--generations", "1", "--recalibration", "4"]
    assert main(command) == 0
    facts = data_facts(tn.load(tmp_path / "out"))
    assert facts.normalisation == {"mean": (0.1, 0.2, 0.3), "std": (0.9, 0.8, 0.7)}
    assert (facts.input_size, facts.crop_pct, facts.eval_interpolation) == ((3, 16, 16), 0.5, "bicubic")


def test_a_new_classifier_is_compared_with_one_as_large(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tn.save(tn.create_model("shiftresnet20_e3", num_classes=100), tmp_path / "m")
    against = []
    for source in (str(folder), "shiftresnet20_e3"):
        assert main(["count", source, "--num-classes", "7", "--json"]) == 0
        against.append(json.loads(capsys.readouterr().out.splitlines()[-1])["against"])
    assert against[0] == against[1]
    assert against[0]["kwargs"] == {"num_classes": 7}


def test_what_was_measured_at_conversion_stays_in_the_history(tmp_path: Path):
    model = tn.convert(tn.create_model("resnet20"), "soft-sharing(templates=2)")
    again = tn.load(tn.save(tn.load(tn.save(model, tmp_path / "a")), tmp_path / "b"))
    rows = [row["relative_error"] for row in history(again)[0]["plan"]["rows"]]
    assert rows == [row["relative_error"] for row in history(model)[0]["plan"]["rows"]]
    assert any(error for error in rows)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ["evaluate", "resnet20", "--in-chans", "1", "--data", "digits", "--topk", "11"],
            "--topk 11: the data has 10 classes",
        ),
        (["evaluate", "resnet20", "--data", "digits", "--workers", "-1"], "--workers -1: expected an integer from 0 to"),
        (["evaluate", "resnet20", "--data", "digits", "--mean", "5,5,5"], "numbers in [0, 1], one per channel"),
        (["train", "--recipe", "swrn-cifar10", "--cutout", "--data", "digits", "--output", "x"], "here it is `--cutout 16`"),
        (["train", "-c", "bn_uniform.yml", "--data", "digits", "--output", "x"], "DS-Net has -c; here it is `--recipe"),
        (["train", "--recipe", __file__, "--data", "digits", "--output", "x"], "expected a file whose name ends in .yaml"),
        (
            ["plan", "resnet20", "--technique", "soft-sharing(templates=x)"],
            "cannot read the fields of 'soft-sharing(templates=x)' (malf",
        ),
    ],
)
def test_one_line_says_what_is_wrong(arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1
    assert " object at 0x" not in error


def test_a_file_tells_its_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    torch.save(tn.create_model("resnet20").state_dict(), tmp_path / "theirs.pth")
    assert main(["evaluate", str(tmp_path / "theirs.pth"), "--shared_rank", "8", "--data", "digits"]) == 2
    assert "a file tells its own: leave it out" in capsys.readouterr().err


def test_lists_are_written_as_in_other_verbs():
    from thriftnet.cli.train import make_recipe

    assert make_recipe("digits", {"mean": "0.1,0.2,0.3", "std": "1,1,1"}).augmentation.mean == (0.1, 0.2, 0.3)
