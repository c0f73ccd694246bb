"""Public borders: every argument has a type, every number a range, and both are checked in one place."""

from __future__ import annotations

import inspect
import pickle
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import pytest
import torch
from torch import nn

import thriftnet as tn
from thriftnet import arguments, memory
from thriftnet.arguments import InputSize, Range, Seed, Share, Steps, as_path, check, checked
from thriftnet.cli import main
from thriftnet.data.augmentation import Augmentation
from thriftnet.data.loaders import make_loader
from thriftnet.data.sources import open_data
from thriftnet.dynamic.objective import GateObjective
from thriftnet.dynamic.search import Evolution
from thriftnet.models.table import MODELS, builder
from thriftnet.train import load_recipe, train
from thriftnet.train.recipe import GROUPS, Recipe

PUBLIC = {name: getattr(tn, name) for name in tn.__all__ if name != "TECHNIQUES" and not name.endswith("Error")}
OTHERS = (Augmentation, Evolution, GateObjective, Recipe, *GROUPS.values(), load_recipe, make_loader, open_data, train)
RESULTS = ("ImportedCheckpoint", "Plan", "Report")  # made by us: their numbers are what was counted


def function_of(public: Any) -> Any:
    return public.__init__ if isinstance(public, type) else public


@pytest.mark.parametrize(
    "public",
    [*PUBLIC.values(), *OTHERS, *dict.fromkeys(builder(entry) for entry in MODELS.values())],
    ids=lambda public: public.__name__,
)
def test_everything_public_checks_its_arguments_and_every_number_has_a_range(public: Any):
    assert function_of(public).checks_arguments
    if public.__name__ not in RESULTS:
        for name, hint in arguments._hints(function_of(public)).items():
            assert name == "return" or not ({int, float} & bare(hint)), name


def bare(hint: Any) -> set[Any]:
    """The types in an annotation that have no range."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return set() if any(isinstance(extra, Range) for extra in inner[1:]) else bare(inner[0])
    if origin is Literal or "Callable" in str(origin):
        return set()
    return {hint}.union(*map(bare, inner)) if inner else ({hint} if isinstance(hint, type) else set())


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        *((bad, Seed) for bad in (-1, True, 0.5, 2**70, 10**5000, "1", None, float("nan"))),
        *((bad, Share) for bad in (float("nan"), float("inf"), 2, -0.1, "0.5", True, 1j)),
        *((bad, InputSize) for bad in ((3, 32), (3, 0, 3), "3,32,32", (3, 100_000, 100_000), [3, 32, True])),
        *((bad, Steps) for bad in (0, (1, 0), (1, 2, 3))),
    ],
    ids=lambda value: str(value)[:20] if not isinstance(value, int) or value < 2**80 else "huge",
)
def test_what_is_out_of_range_is_shown_in_one_short_line(value: object, hint: Any):
    with pytest.raises(tn.ConfigError, match=r"^it=.{1,70}: expected [^\n]{2,120}$"):
        check("it", value, hint)


def test_lists_are_taken_for_tuples_and_choices_are_named():
    assert check("size", [3, 32, 32], InputSize) == (3, 32, 32)
    with pytest.raises(tn.ConfigError, match="unknown init 'weihgts': did you mean 'weights'"):
        tn.SoftSharing(init="weihgts")


def test_a_checked_class_stays_what_it_was():
    assert str(inspect.signature(tn.Shift2d)).startswith("(channels: ")
    assert pickle.loads(pickle.dumps(tn.Shift2d(9))).channels == 9  # noqa: S301  # our own bytes
    with pytest.raises(TypeError, match="missing"):
        tn.Shift2d()


def test_a_value_whose_text_fails_is_shown_by_its_class():
    class Silent:
        def __repr__(self) -> str:
            raise RuntimeError

    @checked
    def half(share: Share) -> float:
        return share / 2

    endless: list[object] = []
    endless.append(endless)
    with pytest.raises(tn.ConfigError, match=r"share=\[\[\.\.\.\]\]"):
        half(endless)
    for value in (Silent(), [Silent()]):
        with pytest.raises(tn.ConfigError, match=r"share=<(Silent|list)>"):
            half(value)


@pytest.mark.parametrize(
    "path", ["", "x" * 300, "a/" * 3000, "a\0b", "\ud800", b"x", 5, None], ids=lambda path: repr(path)[:20]
)
def test_what_is_no_path(path: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for use in (as_path, tn.load, tn.import_checkpoint, tn.open_model, lambda path: tn.save(nn.Linear(1, 1), path)):
        with pytest.raises(tn.ConfigError):
            use(path)
    assert not list(tmp_path.iterdir())


def test_a_home_that_does_not_exist():
    with pytest.raises(tn.ConfigError, match="folder='~nouser/x': expected a path that the system knows"):
        open_data("folder:~nouser/x")


@pytest.mark.parametrize(
    "request_",
    [
        lambda: tn.create_model("convmixer", dim=1_000_000),
        lambda: tn.create_model("wrn", width=1000, depth=10),
        lambda: tn.TemplateBank(10_000, 1_000_000, 1_000_000, 3),
        lambda: loader(batch_size=1797, image_size=16_384),
        lambda: loader(crop_padding=16_384),
    ],
    ids=["dim", "width", "bank", "images", "padding"],
)
def test_what_does_not_fit_into_memory_is_refused(request_: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "available", lambda: 1 << 29)
    with pytest.raises(tn.ConfigError, match=r"needs at least [\d,.]+ GB of memory, and 0\.5 GB are available"):
        request_()


def loader(batch_size: int = 8, **how: Any) -> object:
    source = open_data("digits")
    return make_loader(source.split("train"), batch_size, augmentation=Augmentation(**how).for_source(source), train=True)


def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "memory.max").write_text("3000000")
    (tmp_path / "memory.current").write_text("1000000")
    monkeypatch.setattr(memory, "CONTAINER", tmp_path)
    assert memory.available() == 2_000_000
    (tmp_path / "memory.max").write_text("max")
    assert memory.available() > 2_000_000


def test_a_network_that_is_built_twice_draws_the_same_numbers(monkeypatch: pytest.MonkeyPatch):
    from thriftnet.core import allocation

    def built() -> torch.Tensor:
        torch.manual_seed(0)
        return torch.cat(
            [tensor.flatten().float() for tensor in tn.create_model("swrn", depth=16, width=1).state_dict().values()]
        )

    once = built()
    monkeypatch.setattr(allocation, "SMALL", 0)
    assert torch.equal(once, built())


@pytest.mark.parametrize(
    "words",
    [
        ["count", "resnet20", "--input-size", "3,100000,100000"],
        ["bench", "resnet20", "--batch-size", "1000000000"],
        ["train", "--data", "digits", "--output", "run", "--epochs", "999999999999999999999"],
        ["train", "--data", "digits", "--output", "run", "--crop-padding", "99999999999"],
        ["train", "--data", "digits", "--output", "run", "--image-size", "100000"],
        ["evaluate", "resnet20", "--data", "digits", "--crop-pct", "nan"],
        ["demo", "--seed", "-1"],
        ["plan", "resnet20", "--technique", "shift(expansion=1e9)"],
        ["count", "x" * 5000],
        ["count", "resnet20", "--depth", "1" * 5000],
        ["bench", "resnet20", "--svg", "times.png"],
    ],
    ids=" ".join,
)
def test_numbers_and_names_beyond_all_bounds(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    assert main(words) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 400
    assert not list(tmp_path.iterdir())
