"""Training: it learns, it is the same however it is interrupted and on however many processes it runs, and it says what is wrong."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL.Image import Image
from safetensors.torch import load_file
from torch import nn

import thriftnet as tn
from images import class_folders
from thriftnet.core.provenance import add_data_facts, data_facts
from thriftnet.data.dataset import ArrayImages, DataSource, ImageDataset
from thriftnet.errors import CheckpointError
from thriftnet.report.plots import run_curves
from thriftnet.store.sealed import sealed_json
from thriftnet.train import TrainResult, run_folder, train
from thriftnet.train.checkpoints import encode, is_intact, read
from thriftnet.train.interrupts import Interrupted
from thriftnet.train.loop import DivergedError, Progress, TrainLoop
from thriftnet.train.recipe import Recipe
from thriftnet.train.trainer import Trainer
from training import Net, in_children, kill_at, metrics, source

FAST = {"batch_size": 16, "trackers": (), "validation": 0.25, "lr": 0.05}


def recipe(**fields: object) -> Recipe:
    return Recipe().replace(**{**FAST, "epochs": 3, **fields})


def run(folder: Path, how: Recipe | None = None, net: nn.Module | None = None, **kwargs: object) -> TrainResult:
    return train(how or recipe(), source(), folder, model=net or seeded_net(), device="cpu", **kwargs)  # type: ignore[arg-type]


def seeded_net(dropout: float = 0.0) -> Net:
    torch.manual_seed(0)
    return Net(dropout=dropout)


def test_it_learns_and_leaves_a_run_that_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_folder, "run_curves", run_curves)
    outcome = run(tmp_path / "run", recipe(epochs=8, lr=0.1))
    assert outcome.top1 > 90
    assert outcome.steps == 8 * 5  # 72 training images in batches of 16
    assert outcome.world_size == 1
    rows = metrics(tmp_path / "run")
    assert [row["epoch"] for row in rows] == list(range(1, 9))
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert {"metrics.csv", "metrics.jsonl", "curves.svg", "run.json", "model", "checkpoints"} <= {
        path.name for path in (tmp_path / "run").iterdir()
    }
    loaded = tn.load(tmp_path / "run" / "model", model=Net())
    assert sum(p.numel() for p in loaded.parameters()) == outcome.params
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert "class2" in json.dumps(config)
    assert "learning rate" in (tmp_path / "run" / "curves.svg").read_text()


EVERYTHING = {
    "ema_decay": 0.8,
    "mixup": 0.3,
    "cutmix": 0.3,
    "clip_grad": 1.0,
    "label_smoothing": 0.1,
    "augmentation": {"crop_padding": 1, "flip": True, "cutout": 2},
    "checkpoint_every": 2,
    "accumulate": 2,
    "batch_size": 16,
}


def test_killed_at_random_steps_it_ends_with_the_same_bits(tmp_path: Path):
    """Twenty times: after each kill the run goes on from its newest checkpoint, with everything random in use."""
    how = recipe(epochs=6, **EVERYTHING)
    wanted = run(tmp_path / "whole", how, seeded_net(0.3))
    steps = random.Random(0)
    for trial in range(5):
        place = tmp_path / f"killed{trial}"
        for kill in sorted(steps.sample(range(1, wanted.steps), 4)):
            codes = in_children(
                lambda rank, kill=kill, place=place: run(place, how, seeded_net(0.3), on_progress=kill_at(kill))
            )  # type: ignore[misc]
            assert codes == [-signal.SIGKILL]
        resumed = run(place, how, seeded_net(0.3))
        assert resumed.resumed_from is not None
        assert resumed.weights_sha256 == wanted.weights_sha256
        assert metrics(place) == metrics(tmp_path / "whole")
        assert resumed.top1 == wanted.top1


def run_among(folder: Path, how: Recipe, rank: int, net: nn.Module, **kwargs: object) -> None:
    outcome = run(folder, how, net, **kwargs)
    (folder / f"outcome{rank}.json").write_text(json.dumps(outcome.to_dict()))


def outcome_of(folder: Path, rank: int = 0) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / f"outcome{rank}.json").read_text())
    return found


def test_killed_on_two_processes_it_ends_with_the_same_bits(tmp_path: Path):
    how = recipe(epochs=3, **{**EVERYTHING, "accumulate": 1})

    def both(folder: Path, **kwargs: object) -> list[int]:
        return in_children(lambda rank: run_among(folder, how, rank, seeded_net(0.3), **kwargs), ranks=2)

    assert both(tmp_path / "whole") == [0, 0]
    for kill in (3, 8):
        assert set(both(tmp_path / "killed", on_progress=kill_at(kill))) == {-signal.SIGKILL}
    assert both(tmp_path / "killed") == [0, 0]
    one, other = outcome_of(tmp_path / "whole"), outcome_of(tmp_path / "killed")
    assert one["world_size"] == other["world_size"] == 2
    assert other["resumed_from"] is not None
    assert one["weights_sha256"] == other["weights_sha256"]
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "killed")
    assert outcome_of(tmp_path / "killed", 1)["top1"] == other["top1"]


@pytest.mark.parametrize("technique", ["", "soft-sharing(templates=2)", "slimmable(widths=(0.5, 1.0))"])
def test_two_processes_equal_one(technique: str, tmp_path: Path):
    """In float64, without norms; 64 training images, so that no batch is smaller than the others."""
    how = recipe(epochs=2, validation=1 / 3, label_smoothing=0.1, ema_decay=0.5, crop_padding=1, flip=True)
    one, two = trained_by_one_and_two(how, lambda: without_norms(technique), tmp_path)
    assert two.keys() == one.keys()
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-8, msg=name)


def test_norms_make_two_processes_differ_from_one(tmp_path: Path):
    """So the test above can fail: each process's norms see its own part of a batch."""
    one, two = trained_by_one_and_two(recipe(epochs=1, validation=1 / 3), lambda: seeded_net().double(), tmp_path)
    assert not all(torch.allclose(two[name], one[name], rtol=1e-6) for name in one if two[name].is_floating_point())


def without_norms(technique: str) -> nn.Module:
    torch.manual_seed(0)
    plain = Net(norms=False).double()
    return tn.convert(plain, technique, select="^[36]$" if "soft" in technique else None) if technique else plain


class Unreadable(ArrayImages):
    """Image 33 cannot be read, which only the process that gets it notices."""

    def image(self, index: int) -> Image:
        if index == 33:
            raise tn.DataError("33.png cannot be decoded")
        return super().image(index)


class UnreadableAtOnce(Unreadable):
    """The same, read when the images of a process are put into memory."""

    resident = ImageDataset.resident


@pytest.mark.parametrize(
    ("split", "kind", "workers"), [("train", Unreadable, 0), ("train", Unreadable, 1), ("test", UnreadableAtOnce, 0)]
)
def test_an_image_that_one_process_cannot_read_ends_both_with_its_name(split: str, kind: type, workers: int, tmp_path: Path):
    data = source()
    images = data.split(split)
    data = replace(data, splits={**data.splits, split: kind(images.images, images.labels)})  # type: ignore[attr-defined]
    how = recipe(epochs=1, resident=False, workers=workers)

    def work(rank: int) -> None:
        with pytest.raises(tn.DataError, match=r"^33\.png cannot be decoded$"):
            train(how, data, tmp_path, model=seeded_net(), device="cpu")

    assert in_children(work, ranks=2) == [0, 0]


def test_data_are_looked_over_before_the_first_step(tmp_path: Path):
    class_folders(tmp_path / "data" / "train")
    class_folders(tmp_path / "data" / "val")
    (tmp_path / "data" / "val" / "dog" / "1.png").write_bytes(b"text")
    with pytest.raises(tn.DataError, match=r"1\.png cannot be decoded: not an image"):
        train(recipe(), f"folder:{tmp_path / 'data'}", tmp_path / "run", model=Net(classes=2), device="cpu")
    assert not (tmp_path / "run").exists()


def trained_by_one_and_two(
    how: Recipe, make: Callable[[], nn.Module], folder: Path
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The same batch size, on one process and shared by two."""
    assert in_children(lambda rank: run_among(folder / "two", how, rank, make()), ranks=2) == [0, 0]
    run_among(folder / "one", how, 0, make())
    assert outcome_of(folder / "two")["steps"] == outcome_of(folder / "one")["steps"] == how.epochs * 4
    return load_file(folder / "one" / "model" / "model.safetensors"), load_file(
        folder / "two" / "model" / "model.safetensors"
    )


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path: Path):
    with pytest.raises(tn.ConfigError, match=r"batch_size=16 cannot be divided .* expected a multiple of 3"):
        run(tmp_path, recipe(accumulate=3))
    assert not (tmp_path / "run.json").exists()


def test_equal_commands_end_with_equal_weights(tmp_path: Path):
    first, second = (run(tmp_path / name) for name in ("first", "second"))
    assert first.weights_sha256 == second.weights_sha256
    assert json.loads((tmp_path / "first" / "run.json").read_text())["recipe"]["run"]["memory_format"] == "contiguous"
    other = run(tmp_path / "other", recipe(seed=1))
    assert other.weights_sha256 != first.weights_sha256


def test_equal_commands_end_with_equal_weights_under_load(tmp_path: Path):
    """With two threads, beside busy processes."""
    quiet = in_children(lambda rank: trained_with_threads(tmp_path / "quiet"))
    busy: list[int] = []
    for _ in range(2):
        busy.append(os.fork())
        if not busy[-1]:
            signal.alarm(120)  # should nobody kill it
            while True:
                pass
    try:
        loaded = in_children(lambda rank: trained_with_threads(tmp_path / "busy"))
    finally:
        for child in busy:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    assert quiet == loaded == [0]
    one, other = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("quiet", "busy"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert outcome_of(tmp_path / "quiet")["weights_sha256"] == outcome_of(tmp_path / "busy")["weights_sha256"]
    assert metrics(tmp_path / "quiet") == metrics(tmp_path / "busy")


def trained_with_threads(folder: Path) -> None:
    torch.set_num_threads(2)
    how = recipe(max_steps=2, **EVERYTHING)
    run_among(folder, how, 0, seeded_net(0.3))


def interrupt_at(step: int, number: int = signal.SIGINT):
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), number)

    return on_progress


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_stops_after_the_step_with_a_checkpoint(number: int, tmp_path: Path, request: pytest.FixtureRequest):
    wanted = run(tmp_path / "whole")
    outside = signal.signal(number, signal.default_int_handler)  # the suite may run where it is ignored
    request.addfinalizer(lambda: signal.signal(number, outside))
    before = signal.getsignal(number)
    with pytest.raises(
        Interrupted, match=r"^stopped after step 4 of 15; checkpoint: .*step-000000004.* goes on from there$"
    ):
        run(tmp_path / "run", on_progress=interrupt_at(3, number))
    assert signal.getsignal(number) is before
    resumed = run(tmp_path / "run")
    assert resumed.resumed_from is not None
    assert resumed.resumed_from.endswith("step-000000004.safetensors")
    assert resumed.weights_sha256 == wanted.weights_sha256


def test_a_second_signal_stops_at_once(tmp_path: Path):
    def twice(progress: Progress) -> None:
        if progress.step == 7:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("it went on")

    with pytest.raises(Interrupted, match=r"stopped after step 7 of 15; checkpoint: .*step-000000006"):
        run(tmp_path / "run", recipe(checkpoint_every=3), on_progress=twice)
    assert run(tmp_path / "run", recipe(checkpoint_every=3)).weights_sha256 == run(tmp_path / "whole").weights_sha256


def test_an_ignored_signal_stays_ignored(tmp_path: Path):
    """As SIGHUP under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(tmp_path, on_progress=interrupt_at(3, signal.SIGHUP)).steps == 15
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("thriftnet.train.trainer.prepare_model", "before the training began"),
        ("thriftnet.train.trainer.make_stage", "before the training began|before the first step"),
        ("thriftnet.train.trainer.TrainLoop", "before the first step"),
        ("thriftnet.train.trainer.Trainer._result", "after step 15 of 15; checkpoint: .*step-000000015"),
    ],
)
def test_a_signal_beside_the_steps_stops_at_once(place: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def stop(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    wanted = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(place, stop)
        with pytest.raises(Interrupted, match=said):
            run(tmp_path / "run")
    assert (tmp_path / "run").exists() == ("_result" in place)
    assert run(tmp_path / "run").weights_sha256 == wanted.weights_sha256


class StopsInEvaluation(Net):
    """Gets SIGTERM in its first evaluation after a step."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        if not self.training and hasattr(self, "trained"):
            os.kill(os.getpid(), signal.SIGTERM)
        elif self.training:
            self.trained = True
        out: torch.Tensor = super().forward(input)
        return out


def test_a_signal_in_an_evaluation_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    stopping = StopsInEvaluation()
    with pytest.raises(Interrupted, match=r"after step 5 of 15; checkpoint: .*step-000000005"):
        run(tmp_path / "run", net=stopping)
    assert not (tmp_path / "run" / "model").exists()
    torch.manual_seed(0)
    plain = StopsInEvaluation()
    monkeypatch.setattr(StopsInEvaluation, "forward", Net.forward)
    resumed = run(tmp_path / "run", net=plain)
    wanted = run(tmp_path / "whole")
    assert (resumed.weights_sha256, resumed.top1) == (wanted.weights_sha256, wanted.top1)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


class StopsItself(Net):
    """Gets Ctrl-C in its n-th forward of training."""

    def __init__(self, when: int) -> None:
        super().__init__()
        self.when, self.calls = when, 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        self.calls += self.training
        if self.training and self.calls == self.when:
            os.kill(os.getpid(), signal.SIGINT)
        out: torch.Tensor = super().forward(input)
        return out


def stopping_net(when: int) -> StopsItself:
    torch.manual_seed(0)
    return StopsItself(when)


@pytest.mark.parametrize("step", [6, 12, 18])
def test_a_signal_in_the_last_step_of_an_epoch_leaves_nothing_out(step: int, tmp_path: Path):
    """The network of that step is evaluated and kept when the same command resumes: after 18 steps, the training's last, too."""
    how = recipe(select_on="last")
    wanted = run(tmp_path / "whole", how, stopping_net(0))
    place = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"after step {step} of 18; checkpoint: .*step-0000000{step:02d}"):
        run(place, how, stopping_net(step))
    resumed = run(place, how, stopping_net(0))
    assert resumed.resumed_from is not None
    assert (resumed.weights_sha256, resumed.top1, resumed.loss) == (wanted.weights_sha256, wanted.top1, wanted.loss)
    assert metrics(place) == metrics(tmp_path / "whole")
    one, other = (load_file(path / "model" / "model.safetensors") for path in (place, tmp_path / "whole"))
    assert all(torch.equal(one[name], other[name]) for name in other)
    again = run(place, how, stopping_net(0))
    assert (again.top1, metrics(place)) == (wanted.top1, metrics(tmp_path / "whole"))


def test_a_refused_start_leaves_the_description_of_the_run(tmp_path: Path):
    run(tmp_path, recipe(max_steps=5))
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(tn.ConfigError, match="trained for 5 steps already, and 4 are asked for"):
        run(tmp_path, recipe(max_steps=4))
    assert (tmp_path / "run.json").read_bytes() == before


def test_a_broken_checkpoint_is_passed_over_and_named(tmp_path: Path):
    wanted = run(tmp_path / "whole", recipe(checkpoint_every=2))
    with pytest.raises(Interrupted):
        run(tmp_path / "run", recipe(checkpoint_every=2), on_progress=interrupt_at(8))
    newest, older = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    resumed = run(tmp_path / "run", recipe(checkpoint_every=2))
    assert resumed.resumed_from == str(older)
    assert any(newest.name in note and "its checksum does not fit" in note for note in resumed.notes)
    assert resumed.weights_sha256 == wanted.weights_sha256


def test_only_intact_checkpoints_count_as_kept(tmp_path: Path):
    with pytest.raises(Interrupted):
        run(tmp_path, recipe(checkpoint_every=2), stopping_net(8))
    older, newest = sorted((tmp_path / "checkpoints").iterdir())
    assert (older.name[5:14], newest.name[5:14]) == ("000000006", "000000008")
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(Interrupted, match=r"checkpoint: .*step-000000007"):
        run(tmp_path, recipe(checkpoint_every=2, keep_checkpoints=1), stopping_net(1))
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert kept.name == "step-000000007.safetensors"
    assert is_intact(kept)


@pytest.mark.parametrize(
    "fields",
    [{"optimizer.name": "adamw", "memory_format": "channels_last"}, {"optimizer.name": "lamb"}, {"precision": "bf16"}],
    ids=str,
)
def test_every_optimizer_and_format_resumes_with_the_same_bits(fields: dict[str, object], tmp_path: Path):
    how = recipe(epochs=2, **{**EVERYTHING, "lr": 0.01, **fields})
    wanted = run(tmp_path / "whole", how, seeded_net(0.3))
    for step in (1, 3):
        with pytest.raises(Interrupted):
            run(tmp_path / "run", how, seeded_net(0.3), on_progress=interrupt_at(step))
    assert run(tmp_path / "run", how, seeded_net(0.3)).weights_sha256 == wanted.weights_sha256


class Trap:
    """Runs code where it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("trapped",)


def changed(**fields: object) -> Callable[[dict[str, Any]], object]:
    return lambda content: content["state"].update(fields)


TAMPERED: dict[str, Callable[[dict[str, Any]], object]] = {
    "nothing": lambda content: content.clear(),
    "no optimizer": lambda content: content.update(optimizer={}),
    "an empty group": lambda content: content["optimizer"].update(param_groups=[]),
    "states of nothing": lambda content: content["optimizer"]["state"].update({"0": {}, "1": {"exp_avg": [1]}, "x": {}}),
    "momentum of another shape": lambda content: content["optimizer"]["state"]["0"].update(momentum_buffer=torch.zeros(7)),
    "momentum is text": lambda content: content["optimizer"]["state"]["0"].update(momentum_buffer="much"),
    "position is a list": lambda content: content.update(state=[]),
    "position with more": changed(other=1),
    "step is text": changed(step="4"),
    "step is true": changed(step=True),
    "step is negative": changed(step=-1, epoch=-1),
    "step and epoch differ": changed(epoch=2),
    "not a number": changed(loss_sum=float("nan")),
    "huge": changed(loss_count=10**400),
    "data is a list": lambda content: content.update(data=[]),
    "other data": lambda content: content["data"].update(images=7),
    "no weights": lambda content: content.update(weights={}),
    "weights are text": lambda content: content.update(weights=dict.fromkeys(content["weights"], "x")),
    "weights of another shape": lambda content: content["weights"].update({"0.bias": torch.zeros(7)}),
    "weights of another type": lambda content: content["weights"].update({"0.bias": torch.zeros(6, dtype=torch.int64)}),
    "no average": lambda content: content.update(average=None),
}


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after four steps."""
    place = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        run(place, recipe(ema_decay=0.5), on_progress=interrupt_at(3))
    return place


@pytest.mark.parametrize("name", TAMPERED)
def test_a_tampered_checkpoint_gives_one_line(name: str, stopped: Path, tmp_path: Path):
    """Its checksum fits: someone made it so."""
    place = Path(shutil.copytree(stopped, tmp_path / "run"))
    (checkpoint,) = (place / "checkpoints").iterdir()
    content = read(checkpoint)
    TAMPERED[name](content)
    checkpoint.write_bytes(encode(content))
    with pytest.raises(tn.ThriftnetError) as caught:
        run(place, recipe(ema_decay=0.5))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_a_checkpoint_runs_no_code(stopped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    place = Path(shutil.copytree(stopped, tmp_path / "run"))
    (checkpoint,) = (place / "checkpoints").iterdir()
    for name in (checkpoint.name, "random_states_0.pkl", "optimizer.bin"):
        torch.save(Trap(), place / "checkpoints" / name)
    with pytest.raises(CheckpointError, match="is not a model file or checkpoint"):
        run(place, recipe(ema_decay=0.5))
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, "\0", '{"sha256": 1, "recipe": {}}', '{"recipe": {}}'])
def test_a_damaged_description_of_the_run_gives_one_line(text: str, stopped: Path, tmp_path: Path):
    place = Path(shutil.copytree(stopped, tmp_path / "run"))
    (place / "run.json").write_text(text)
    with pytest.raises(tn.ConfigError, match=r"run\.json is damaged: its checksum does not fit: put back the file"):
        run(place, recipe(ema_decay=0.5))
    (place / "run.json").write_text(sealed_json({"recipe": {"data": 5, "run": None, "lr": [[]]}}))
    with pytest.raises(tn.ConfigError, match="holds another training"):
        run(place, recipe(ema_decay=0.5))


def test_damaged_metrics_are_left_out(stopped: Path, tmp_path: Path):
    place = Path(shutil.copytree(stopped, tmp_path / "run"))
    lines = ["[" * 100_000, '{"step": 1, "top1": "much"}', '{"step": true}', "\0", '{"step": 1, "lr": 0.5}']
    (place / "metrics.jsonl").write_bytes("\n".join(lines).encode() + b"\xff")
    assert [row["step"] for row in run_folder.read_metrics(place)] == []
    (place / "metrics.jsonl").write_bytes("\n".join([*lines, ""]).encode() + b"\xff")
    assert run_folder.read_metrics(place) == [{"step": 1, "lr": 0.5}]
    assert len(metrics(Path(run(place, recipe(ema_decay=0.5)).run))) == 4


def test_a_model_folder_is_no_place_for_a_run(tmp_path: Path):
    place = tn.save(tn.create_model("resnet20"), tmp_path / "m")
    before = sorted(place.iterdir())
    with pytest.raises(tn.ConfigError, match="is a model folder, no place for a run"):
        run(place)
    assert sorted(place.iterdir()) == before


def test_when_all_checkpoints_are_corrupt_it_says_so(tmp_path: Path):
    run(tmp_path / "run")
    for place in (tmp_path / "run" / "checkpoints").iterdir():
        place.write_text("{")
    with pytest.raises(CheckpointError, match=r"none of the checkpoints .* is intact"):
        run(tmp_path / "run")


def test_what_cannot_be_written_leaves_the_last_checkpoint(tmp_path: Path):
    def fill(progress: Progress) -> None:
        if progress.step == 6:  # nothing can be written there any more
            os.rename(tmp_path / "run" / "checkpoints", tmp_path / "kept")
            (tmp_path / "run" / "checkpoints").write_text("")

    with pytest.raises(CheckpointError, match=r"cannot write .*step-000000008"):
        run(tmp_path / "run", recipe(checkpoint_every=4), on_progress=fill)
    kept = list((tmp_path / "kept").glob("step-*"))
    assert kept
    assert all(map(is_intact, kept))


class Explodes(Net):
    """Its outputs are no numbers in some forwards of training."""

    def __init__(self, when: tuple[int, ...]) -> None:
        super().__init__()
        self.when, self.calls = when, 0

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = super().forward(input)
        if self.training:
            self.calls += 1
            if self.calls - 1 in self.when:
                return out * float("nan")
        return out


def test_a_loss_that_is_no_number_stops_or_is_skipped(tmp_path: Path):
    with pytest.raises(
        DivergedError, match=r"not finite at step 7 \(learning rate 0.0\d+\). Last good checkpoint: .*step-000000006"
    ):
        run(tmp_path / "stop", recipe(checkpoint_every=3), Explodes((7,)))
    outcome = run(tmp_path / "skip", recipe(on_nan="skip"), Explodes((7, 8)))
    assert outcome.steps == 15
    assert metrics(tmp_path / "skip")[1]["skipped"] == 2
    assert all(torch.isfinite(t).all() for t in load_file(tmp_path / "skip" / "model" / "model.safetensors").values())


def test_a_teacher_pulls_the_network_to_its_outputs(tmp_path: Path):
    torch.manual_seed(1)
    teacher = Net().eval()
    images = torch.randn(8, 3, 8, 8)
    nets = {}
    for share in (0.0, 1.0):
        torch.manual_seed(0)
        nets[share] = Net()
        how = recipe(epochs=8, distill_weight=share, select_on="last", validation=0.0)
        train(how, source(), tmp_path / str(share), model=nets[share], teacher=teacher, device="cpu")
    wanted = teacher(images).softmax(1)
    far, near = ((nets[share].eval()(images).softmax(1) - wanted).abs().mean() for share in (0.0, 1.0))
    assert near < 0.7 * far
    assert all(p.grad is None for p in teacher.parameters())


def test_the_penalty_is_added_once_and_scaled(tmp_path: Path):
    """Under accumulation, too: a step with the penalty differs from one without by lr * its gradient."""
    torch.manual_seed(0)
    start = tn.convert(Net(), "filter-basis(shared_rank=4, init='random')", select="^[36]$")
    name = next(n for n, _ in start.named_parameters() if n.endswith("shared"))
    ends = {}
    for factor in (0.0, 1.0):
        how = recipe(max_steps=1, penalty=factor, momentum=0.0, weight_decay=0.0, schedule="constant", lr=0.01)
        how = how.replace(accumulate=2, select_on="last", validation=0.0)
        net = copy.deepcopy(start)
        train(how, source(), tmp_path / str(factor), model=net, device="cpu")
        ends[factor] = dict(net.named_parameters())[name].detach()
    (gradient,) = torch.autograd.grad(tn.penalty(start), dict(start.named_parameters())[name])
    torch.testing.assert_close(ends[0.0] - ends[1.0], 0.01 * gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2])
def test_patience_ends_a_training_that_no_longer_improves(ranks: int, tmp_path: Path):
    """Without learning the first network is the best; a kill between does not change that, and more patience goes on."""
    how = recipe(epochs=10, lr=1e-9, momentum=0.0, patience=2)

    def among(how: Recipe, **kwargs: object) -> list[int]:
        return in_children(lambda rank: run_among(tmp_path, how, rank, seeded_net(), **kwargs), ranks=ranks)

    killed, done = [-signal.SIGKILL] * ranks, [0] * ranks
    assert [among(how, on_progress=kill_at(12)), among(how), among(how)] == [killed, done, done]
    outcome = outcome_of(tmp_path, ranks - 1)
    assert outcome["steps"] == 3 * 5
    assert "stopped after step 15 of 50: 2 evaluations without a better accuracy" in outcome["notes"]
    assert among(how.replace(patience=4)) == done
    assert outcome_of(tmp_path)["steps"] == 5 * 5


def test_a_time_budget_sets_the_steps_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The measuring leaves no trace, the schedule of 6 epochs spans the 12 steps, and a resumed run keeps both."""
    how = recipe(epochs=6, minutes=1.0, schedule="multistep", milestones={3: 0.1}, ema_decay=0.5, crop_padding=1)
    measured = Trainer._steps_within

    def planned(steps: int) -> Callable[..., int]:
        return lambda *arguments: steps if measured(*arguments) else 0

    monkeypatch.setattr(Trainer, "_steps_within", planned(12))
    whole = run(tmp_path / "whole", how, seeded_net(0.3))
    assert whole.steps == 12
    assert "12 steps, 2.4 epochs, are planned for 1 minutes" in whole.notes
    assert [row["lr"] for row in metrics(tmp_path / "whole")] == pytest.approx([0.05, 0.005, 0.005])
    assert in_children(lambda rank: run(tmp_path / "cut", how, seeded_net(0.3), on_progress=kill_at(4))) == [-signal.SIGKILL]
    monkeypatch.setattr(Trainer, "_steps_within", planned(99))
    resumed = run(tmp_path / "cut", how, seeded_net(0.3))
    assert resumed.weights_sha256 == whole.weights_sha256
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    monkeypatch.setattr(Trainer, "_steps_within", lambda *_: 12)
    assert run(tmp_path / "unmeasured", how, seeded_net(0.3)).weights_sha256 == whole.weights_sha256


def test_two_processes_plan_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(TrainLoop, "time_step", lambda loop, seconds: (1 + loop.distributed.rank) * 3.0)
    how = recipe(minutes=1.0)
    assert in_children(lambda rank: run_among(tmp_path, how, rank, seeded_net()), ranks=2) == [0, 0]
    assert outcome_of(tmp_path, 0)["steps"] == outcome_of(tmp_path, 1)["steps"] <= 0.95 * 60 / 6


def test_a_time_in_which_no_step_fits_is_refused(tmp_path: Path):
    with pytest.raises(tn.ConfigError, match=r"minutes=1e-06 is too short: a step takes .* Give at least 0.0"):
        run(tmp_path, recipe(minutes=1e-6))
    assert not (tmp_path / "run.json").exists()
    with pytest.raises(tn.ConfigError, match=r"minutes=1 is for one stage, .* as --stages.1.minutes"):
        run(tmp_path, recipe(minutes=1.0, stages=[{"stage": "standard"}, {"recalibrate": {}}]))


def test_a_limit_is_of_the_training_images(tmp_path: Path):
    outcome = run(tmp_path, recipe(limit=40, epochs=1))  # a quarter of which is held out
    assert outcome.steps == 2
    with pytest.raises(tn.ConfigError, match="limit was 40, is 50"):
        run(tmp_path, recipe(limit=50, epochs=1))


def unlabelled() -> DataSource:
    data = source()
    splits: Any = {name: ArrayImages(images.images, 0 * images.labels) for name, images in data.splits.items()}  # type: ignore[attr-defined]
    return replace(data, classes=(), splits=splits, labelled=False)


@pytest.mark.parametrize("name", ["", "slimmable(widths=(0.5, 1.0))"])
def test_images_without_labels_are_enough_to_imitate_a_teacher(name: str, tmp_path: Path):
    teacher = Net()
    taught = train(recipe(epochs=8, lr=0.1), source(), tmp_path / "teacher", model=teacher, device="cpu")
    assert taught.top1 > 90
    net = tn.convert(seeded_net(), name) if name else seeded_net()
    how = recipe(epochs=12, lr=0.1, distill_weight=1.0)
    outcome = train(how, unlabelled(), tmp_path / "run", model=net, teacher=teacher, device="cpu")
    assert outcome.top1 > 90
    assert outcome.facts["top1_is"] == "agreement with the teacher's top-1"
    assert {"agreement", "loss"} <= {*metrics(tmp_path / "run")[-1]} - {"top1"}
    assert data_facts(net).class_names == ("class0", "class1", "class2")
    again = train(how, source(), tmp_path / "labelled", model=seeded_net(), teacher=teacher, device="cpu")
    assert again.facts["teacher_top1"] == taught.top1


@pytest.mark.parametrize(
    ("teacher", "fields", "needing"),
    [
        (False, {}, "a training without a teacher"),
        (True, {}, "the loss at distill_weight=0.5"),
        (True, {"distill_weight": 1.0, "stage": "gate"}, "a training of gates"),
    ],
)
def test_labels_are_missed_where_something_needs_them(teacher: bool, fields: dict[str, Any], needing: str, tmp_path: Path):
    with pytest.raises(tn.DataError, match=f"^tiny has no labels, and {needing}.* needs them: a folder for each class"):
        train(recipe(**fields), unlabelled(), tmp_path, model=Net(), teacher=Net() if teacher else None, device="cpu")


def tied_net() -> nn.Module:
    torch.manual_seed(0)
    convs = [nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)]
    return tn.convert(
        nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)), "weight-sharing", select="^[12]$"
    )


def test_the_average_moves_a_tied_weight_once(tmp_path: Path):
    """After the first step the average is the network; after the second 0.75 of that and 0.25 of the network."""
    how = recipe(max_steps=2, ema_decay=0.75, select_on="last", validation=0.0)
    net, states = tied_net(), []
    run(tmp_path, how, net, on_progress=lambda progress: states.append({k: v.clone() for k, v in net.state_dict().items()}))
    first, second = states
    average = load_file(tmp_path / "model" / "model.safetensors")
    assert any(not torch.equal(first[name], second[name]) for name in average)
    for name, value in average.items():
        torch.testing.assert_close(value, 0.75 * first[name] + 0.25 * second[name], msg=name)


def test_a_finished_run_does_not_believe_a_damaged_model(tmp_path: Path):
    """The same command again evaluates the network that was kept."""
    result = train(recipe(epochs=1), source(), tmp_path, model=Net(), device="cpu")
    path = tmp_path / "model" / "model.safetensors"
    intact = path.read_bytes()
    header = 8 + int.from_bytes(intact[:8], "little")
    path.write_bytes(intact[:header] + bytes(len(intact) - header))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its checksum does not fit"):
        train(recipe(epochs=1), source(), tmp_path, model=Net(), device="cpu")
    path.write_bytes(intact)
    assert train(recipe(epochs=1), source(), tmp_path, model=Net(), device="cpu").top1 == result.top1


def test_a_trained_network_knows_its_data(tmp_path: Path):
    """Also what it is no longer told of another training: ``resize``."""
    net = Net()
    add_data_facts(net, {"resize": 256, "class_names": ["cat"]})
    train(recipe(epochs=1, ema_decay=0.9), source(), tmp_path, model=net, device="cpu")
    kept = tn.load(tmp_path / "model", model=Net())
    for network in (net, kept, tn.fold(net.eval())):
        facts = data_facts(network)
        assert (facts.input_size, facts.class_names, facts.resize) == ((3, 8, 8), ("class0", "class1", "class2"), None)
        assert facts.normalisation == {"mean": (0.5,) * 3, "std": (0.25,) * 3}
