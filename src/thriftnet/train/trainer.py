"""Training: from a recipe and a data set to a run folder that can be resumed, evaluated and loaded."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from thriftnet import __version__
from thriftnet.arguments import check, checked
from thriftnet.core.processes import failing_together
from thriftnet.core.provenance import add_data_facts
from thriftnet.core.recalibrate import recalibrate
from thriftnet.core.tied import count_params
from thriftnet.data.dataset import DataSource, ImageDataset, Subset
from thriftnet.data.loaders import Batch, Loader, make_loader
from thriftnet.data.sources import open_data
from thriftnet.data.split import limited, train_validation
from thriftnet.dynamic.network import DynamicNetwork
from thriftnet.errors import ConfigError
from thriftnet.resolve import open_model
from thriftnet.store.model_file import FINISHED
from thriftnet.train.checkpoints import PATTERN
from thriftnet.train.distributed import Distributed
from thriftnet.train.evaluate import evaluate
from thriftnet.train.interrupts import Interrupts
from thriftnet.train.loop import Progress, TrainLoop
from thriftnet.train.prepare import (
    augmentation_for,
    check_classes,
    input_size,
    notes_on,
    prepare_model,
    seed_everything,
    weights_hash,
    with_classes_of,
)
from thriftnet.train.recipe import Recipe, RunFields
from thriftnet.train.run_folder import RunFolder
from thriftnet.train.stages import GateStage, make_stage

TIMED_BATCHES = 8  # of an evaluation, to plan a training that has a time budget
PLANNED_SHARE = 0.95  # of the time; the rest is for checkpoints, and for what differs from the measurement
CALIBRATION = 2048  # training images on which a stage may calibrate what it needs for evaluation


AGREEMENT = "agreement with the teacher's top-1"  # what accuracy is for images without labels


@dataclass(frozen=True)
class TeacherLabels:
    """The batches of a loader, with a network's best class of each image for its label."""

    loader: Loader
    teacher: nn.Module

    def __iter__(self) -> Iterator[Batch]:
        for images, _ in self.loader:
            yield images, self.teacher(images).argmax(1)


@dataclass(frozen=True)
class TrainResult:
    """The result of a training.

    Args:
        run: The run's folder; ``model`` in it is the network.
        top1: Test accuracy of the network that was kept, in percent; on images without labels its agreement with the teacher.
        top5: Its top-5 accuracy; None with five classes or fewer.
        loss: Mean cross entropy on the test images.
        params: Stored parameters, shared ones once.
        world_size: Number of processes.
        steps: Optimizer steps in all.
        weights_sha256: Hash of the weights at the end of the training, to compare runs.
        seconds: Of this call.
        resumed_from: The checkpoint it was resumed from, or None.
        notes: For the user, as images that were left out.
        facts: Further metrics of the stage, as the mean multiply-accumulates of a gated network.
    """

    run: str
    top1: float
    top5: float | None
    loss: float
    params: int
    world_size: int
    steps: int
    weights_sha256: str
    seconds: float
    resumed_from: str | None
    notes: tuple[str, ...]
    facts: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self) | {"notes": list(self.notes), "loss": self.loss if math.isfinite(self.loss) else None}


@checked
def train(
    recipe: Recipe,
    data: str | DataSource,
    output: str | Path,
    *,
    model: nn.Module | None = None,
    teacher: str | nn.Module | None = None,
    device: str | None = None,
    resume: str = "auto",
    on_progress: Callable[[Progress], None] = lambda progress: None,
    on_note: Callable[[str], object] = lambda note: None,
) -> TrainResult:
    """Train a network by a recipe; call it in each of the processes that ``torchrun`` starts.

    Args:
        recipe: What to train, and how.
        data: A data set, or its name as `thriftnet.data.sources.open_data` takes it.
        output: Folder of the run, with one folder for each stage of a recipe that has several.
        model: Your own network instead of the recipe's; trained in place.
        teacher: A network, or a name that ``--model`` takes: its outputs are imitated, see ``distill_weight``.
        device: ``cpu`` or ``cuda``; by default a GPU if there is one.
        resume: ``auto`` resumes what the folder holds, ``none`` refuses to, otherwise the path of a checkpoint.
        on_progress: Called after each step.
        on_note: Called before the first step with what the user may not expect, which is among the result's notes, too.

    Returns:
        The result of the last stage.

    Raises:
        ConfigError: Settings that do not fit each other, the folder or the data.
        DataError: Images that cannot be read.
        CheckpointError: A checkpoint that cannot be written or read.
        DivergedError: The loss is not finite.
        Interrupted: Stopped by a signal; the same call resumes.
    """
    start = time.perf_counter()
    with Interrupts() as interrupts:
        if recipe.stages and resume not in ("auto", "none"):
            raise ConfigError(f"a recipe of several stages finds its checkpoints itself: take --resume auto, not {resume}")
        parts = [(recipe.for_stage(entry), entry) for entry in recipe.stages] or [
            (recipe, {"stage.name": recipe.stage.name})
        ]
        if recipe.stages and recipe.run.minutes is not None:
            raise ConfigError(
                f"minutes={recipe.run.minutes:g} is for one stage, and the recipe has {len(parts)}: say which, as --stages.1.minutes"
            )
        distributed = Distributed(device, parts[0][0].run.precision)
        with failing_together():
            source = open_data(data, on_corrupt=recipe.data.on_corrupt) if isinstance(data, str) else data
            for images in {id(images): images for images in map(source.split, ("train", "test"))}.values():
                images.look_over()
        described = {
            "model": recipe.model if model is None else type(model).__name__,
            "data": source.spec,
            "teacher": type(teacher).__name__ if isinstance(teacher, nn.Module) else teacher,
        }
        if isinstance(teacher, str):
            teacher = open_model(teacher)
        source = with_classes_of(teacher, source, [part for part, _ in parts])
        seed_everything(recipe.seed)
        notes: list[str] = []
        network = prepare_model(recipe, source, model, notes.append)
        check_stages(parts, network, source)
        results: list[TrainResult] = []
        notes += notes_on(recipe, network, given=model is not None)
        for note in notes:
            on_note(note)
        with RunFolder(Path(output), is_main=distributed.is_main).locked():
            for number, (part, entry) in enumerate(parts, 1):
                name = f"{number}-{entry.get('stage.name', 'recalibrate')}" if recipe.stages else ""
                interrupts.describe = lambda name=name: f"before the first step{name and ' of '}{name}"  # type: ignore[misc]
                if number > 1:
                    distributed = Distributed(device, part.run.precision)
                trainer = Trainer(part, source, network, Path(output) / name, distributed, on_note)
                if "recalibrate" in entry:
                    notes.append(trainer.recalibrate(entry["recalibrate"]))
                    results = [trainer.evaluated(result) for result in results[-1:]]
                else:
                    begun = start if len(parts) == 1 else time.perf_counter()
                    results.append(trainer.run(described, teacher, resume, on_progress, interrupts, begun))
                    notes += results[-1].notes
    return replace(results[-1], notes=tuple(dict.fromkeys(notes)), seconds=round(time.perf_counter() - start, 3))


def check_stages(parts: list[tuple[Recipe, dict[str, Any]]], model: nn.Module, source: DataSource) -> None:
    """Refuse before the first stage what the last would refuse, after days.

    Raises:
        ConfigError: No stage trains, unknown options, or a budget out of reach.
        IncompatibleModelError: A network that a stage cannot train.
    """
    from accelerate.utils import LoggerType

    trained = [part for part, entry in parts if "recalibrate" not in entry]
    if not trained:
        raise ConfigError("none of the recipe's stages trains: one must have a field stage")
    for part in trained:
        for name in part.run.trackers:
            check("tracker", name, Literal[tuple(LoggerType.list())])
        size = input_size(part, source)
        stage = make_stage(part.stage.name, model, part.stage.options, size)
        if isinstance(stage, GateStage):
            stage.objective.check_budget(DynamicNetwork(model, input_size=size).macs)


class Trainer:
    """One stage of a training: trains ``model`` in place, which gets to know the data."""

    def __init__(
        self,
        recipe: Recipe,
        source: DataSource,
        model: nn.Module,
        folder: Path,
        distributed: Distributed,
        on_note: Callable[[str], object] = lambda note: None,
    ) -> None:
        self.on_note = on_note
        source = replace(source, splits={**source.splits, "train": limited(source.split("train"), recipe.data.limit)})
        self.recipe, self.source, self.distributed = recipe, source, distributed
        self.folder = RunFolder(folder, is_main=distributed.is_main)
        self.augmentation = augmentation_for(model, recipe, source)
        self.input_size = input_size(recipe, source)
        self.model = model.to(distributed.device)
        facts = {**self.augmentation.facts(), "input_size": self.input_size, "class_names": source.classes}
        add_data_facts(model, facts)
        self.notes: list[str] = []
        if source.skipped:
            self.notes.append(f"{len(source.skipped)} images cannot be read and are left out, as {source.skipped[0]}")

    def run(
        self,
        described: Mapping[str, Any],
        teacher: nn.Module | None,
        resume: str,
        on_progress: Callable[[Progress], None],
        interrupts: Interrupts,
        start: float,
    ) -> TrainResult:
        """Train, keep the best network, and measure it; a time budget counts from ``start``."""
        recipe, distributed = self.recipe, self.distributed
        seed_everything(recipe.seed)
        if teacher is not None:
            teacher = teacher.to(distributed.device).eval().requires_grad_(False)
            check_classes(teacher, self.source, self.input_size, "the teacher")
        description = {**described, "recipe": recipe.to_dict(), "world_size": distributed.world_size}
        self.notes += self.folder.compare(description)
        if resume == "none" and any(self.folder.checkpoints.glob(PATTERN)):
            raise ConfigError(f"{self.folder.path} holds a training already: give another --output, or --resume auto")
        training, held_out = self._splits()
        few = torch.linspace(0, len(training) - 1, min(len(training), CALIBRATION)).long()
        self.calibration = self.eval_loader(Subset(training, few), shared=False)
        self.held_out = self._labelled(self.eval_loader(held_out), teacher)
        self.stage = make_stage(recipe.stage.name, self.model, recipe.stage.options, self.input_size)
        drop_last = recipe.data.drop_last or bool(recipe.loss.mixup or recipe.loss.cutmix)
        self.loop = TrainLoop(
            self.model,
            self.stage,
            recipe,
            self.train_loader(training, recipe.optimizer.accumulate, drop_last=drop_last),
            distributed,
            self.folder.checkpoints,
            classes=len(self.source.classes),
            teacher=teacher,
            on_progress=on_progress,
        )
        resumed_from = self._resume(None if resume in ("auto", "none") else Path(resume))
        if recipe.run.minutes is not None and not self.loop.state.planned:
            self.loop.plan(self.loop.state.step + self._steps_within(60 * recipe.run.minutes, start, len(held_out)))
        if self.loop.state.planned:
            epochs = self.loop.steps / self.loop.steps_per_epoch
            self.notes.append(
                f"{self.loop.steps:,} steps, {epochs:.1f} epochs, are planned for {recipe.run.minutes:g} minutes"
            )
            self.on_note(self.notes[-1])
        interrupts.describe = self._position
        versions = {"thriftnet": __version__, "torch": torch.__version__, "accelerate": version("accelerate")}
        description |= {"device": distributed.device.type, "versions": versions}
        self.folder.write(description)
        self._start_trackers()
        with interrupts.waiting():
            if self.loop.state.planned and not resumed_from:
                self.loop.checkpoint()  # a training that is resumed keeps the plan
            while not self.loop.finished:
                self._end_epoch(self.loop.train_epoch(interrupts), interrupts)
                if distributed.any(interrupts.seen):
                    interrupts.stop()
        self.folder.write_curves()
        self.folder.write({**description, FINISHED: True})
        self.loop.release()
        return self._result(resumed_from)

    def recalibrate(self, options: dict[str, Any]) -> str:
        """Recompute the network's norm statistics, or load those of an earlier start; says so."""
        description = {"recipe": self.recipe.to_dict(), "data": self.source.spec, "recalibrate": options}
        self.folder.compare(description)
        name = self.folder.path.name
        if self.folder.model.exists():
            self.folder.load_kept(self.model)
            note = f"{name}: loaded from {self.folder.path}"
        else:
            loader = self.train_loader(
                self.source.split("train"), 1, drop_last=True
            )  # a last batch of few images has poor variances
            recalibrate(self.model, loader, **options)
            self.folder.keep(self.model, {"data": self.source.spec})
            note = f"{name}: statistics recomputed on the training images"
        self.folder.write({**description, FINISHED: True})
        self.distributed.accelerator.wait_for_everyone()
        return note

    def evaluated(self, result: TrainResult) -> TrainResult:
        """The result of an earlier training, for the network as it is now."""
        found = evaluate(self.model.eval(), self.eval_loader(self.source.split("test")))
        return replace(result, run=str(self.folder.path), top1=found.top1, top5=found.top5, loss=found.loss)

    def train_loader(self, images: ImageDataset, accumulate: int, *, drop_last: bool) -> Loader:
        """Training batches of this process."""
        fields, world_size = self.recipe.data, self.distributed.world_size
        parts = world_size * accumulate
        if fields.batch_size % parts:
            raise ConfigError(
                f"batch_size={fields.batch_size} cannot be divided among {world_size} processes with accumulate={accumulate}: "
                f"expected a multiple of {parts}"
            )
        more: Any = {"seed": self.recipe.seed, "resident": fields.resident, "drop_last": drop_last}
        return self._loader(images, fields.batch_size // parts, train=True, **more)

    def eval_loader(self, images: ImageDataset, *, shared: bool = True) -> Loader:
        """Batches of this process for evaluation; unless ``shared``, each process gets all images."""
        size = min(max(2 * self.recipe.data.batch_size // self.distributed.world_size, 64), 512)
        return self._loader(images, size, train=False, **({} if shared else {"rank": 0, "world_size": 1}))

    def _loader(self, images: ImageDataset, size: int, **options: Any) -> Loader:
        common: Any = {
            "augmentation": self.augmentation,
            "device": self.distributed.device,
            "rank": self.distributed.rank,
            "world_size": self.distributed.world_size,
            "workers": min(self.recipe.data.workers, os.cpu_count() or 1),
        }
        with failing_together():  # a process may not be able to read what it keeps
            return make_loader(images, size, **{**common, **options})

    def _labelled(self, loader: Loader, teacher: nn.Module | None) -> Loader | TeacherLabels:
        """The loader, or where the data has no labels, its images with those that the teacher gives."""
        return loader if teacher is None or self.source.labelled else TeacherLabels(loader, teacher)

    def _splits(self) -> tuple[ImageDataset, ImageDataset]:
        """Images to train on, and those by which the network is selected."""
        fields = self.recipe.run
        if fields.select_on == "val":
            return train_validation(self.source.split("train"), fields.validation, self.recipe.seed)
        if fields.select_on == "test":
            self.notes.append("the network was selected on the test images, as the paper did: its accuracy is flattered")
        return self.source.split("train"), self.source.split("test")

    def _resume(self, checkpoint: Path | None) -> str | None:
        self.notes += self.loop.resume(checkpoint)
        state, resumed_from = self.loop.state, self.loop.checkpoints.last
        if state.step > self.loop.steps:
            raise ConfigError(
                f"{self.folder.path} has been trained for {state.step} steps already, and {self.loop.steps} are asked for: "
                "give more, or another --output"
            )
        self.folder.resume_metrics(state.step - state.epoch_ends)
        return None if resumed_from is None else str(resumed_from)

    def _steps_within(self, seconds: float, start: float, held_out: int) -> int:
        """Steps that fit into the time from ``start`` on, evaluations and those at the end included, by what some take now.

        Raises:
            ConfigError: Not a single one.
        """
        loop, run = self.loop, self.recipe.run
        test = len(self.source.split("test"))
        with loop.rehearsal():
            step = loop.time_step(0.02 * seconds)
            begin = time.perf_counter()
            network = self.stage.measured(loop.result, self.calibration)
            calibration = time.perf_counter() - begin
            begin = time.perf_counter()
            seen = evaluate(network, islice(self.held_out, TIMED_BATCHES)).images
            per_image = (time.perf_counter() - begin) / seen
            saving = 2 * loop.time_checkpoint()  # and the network
            evaluation = calibration + per_image * held_out + saving
            final = calibration + per_image * test
            if loop.criterion.teacher is not None:
                begin = time.perf_counter()
                evaluate(loop.criterion.teacher, islice(self.held_out, TIMED_BATCHES))
                final += (time.perf_counter() - begin) / seen * test
        step, evaluation, final = map(self.distributed.largest, (step, evaluation, final))
        spent = self.distributed.largest(time.perf_counter() - start) + evaluation + final
        fitting = (PLANNED_SHARE * seconds - spent) / (step + evaluation / (loop.steps_per_epoch * run.evaluate_every))
        if fitting < 1:
            least = math.ceil(100 * (spent + 2 * step) / PLANNED_SHARE / 60) / 100
            raise ConfigError(
                f"minutes={run.minutes:g} is too short: a step takes {step:.2g} s, and all else {spent:.2g} s. Give at least {least:g}"
            )
        return int(fitting)

    def _position(self) -> str:
        """Where the training is, and what is kept."""
        loop = self.loop
        return f"after step {loop.state.step} of {loop.steps}; checkpoint: {loop.checkpoints.last or 'none'}"

    def _start_trackers(self) -> None:
        """Accelerate's trackers, those that are installed."""
        from accelerate import tracking

        accelerator = self.distributed.accelerator
        available = {str(name): name for name in tracking.get_available_trackers()}
        chosen = self.recipe.run.trackers
        accelerator.log_with = [available[name] for name in chosen if name in available]
        if missing := [name for name in chosen if name not in available and chosen != RunFields.trackers]:
            self.notes.append(f"no library for the trackers {', '.join(missing)} is installed: they are left out")
        if accelerator.log_with and self.distributed.is_main:
            accelerator.project_configuration.set_directories(str(self.folder.path))
            accelerator.init_trackers("trackers")

    def _end_epoch(self, row: dict[str, Any], interrupts: Interrupts) -> None:
        """Evaluate the network where that is due, keep it if it is the best, and write the metrics."""
        loop, fields = self.loop, self.recipe.run
        if loop.state.step == loop.steps or round(row["epoch"]) % fields.evaluate_every == 0:
            self.distributed.share_buffers(loop.result)
            with failing_together():
                network = self.stage.measured(loop.result, self.calibration)
            found = evaluate(network, self.held_out, on_batch=lambda seen: self._stop_if_asked(interrupts))
            accuracy = "top1" if self.source.labelled else "agreement"
            row |= {accuracy: found.top1, "loss": found.loss, **self.stage.facts(network)}
            loop.state.stale += 1
            if fields.select_on == "last" or found.top1 > loop.state.best:
                loop.state.best, loop.state.stale = found.top1, 0
                metrics = {name: value for name, value in row.items() if isinstance(value, int | float)}
                self.folder.keep(self.stage.saved(loop.result), {"data": self.source.spec, "metrics": metrics})
        self.folder.add_metrics(row)
        loop.accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=loop.state.step)
        loop.end_epoch(row)

    def _stop_if_asked(self, interrupts: Interrupts) -> None:
        """Stop in the middle of an evaluation, which several processes finish, as each has batches of its own."""
        if interrupts.seen and self.distributed.world_size == 1:
            self.loop.checkpoint()
            interrupts.stop()

    def _result(self, resumed_from: str | None) -> TrainResult:
        """Measure the network that was kept, which the caller's becomes."""
        loop, stage = self.loop, self.stage
        digest = weights_hash(stage.saved(loop.result))
        if loop.stopped_early:
            self.notes.append(
                f"stopped after step {loop.state.step} of {loop.steps}: {loop.state.stale} evaluations without a better accuracy"
            )
        if loop.state.skipped:
            self.notes.append(f"{loop.state.skipped} of {loop.state.step} steps were skipped: their loss was not finite")
        self.distributed.accelerator.wait_for_everyone()
        self.folder.load_kept(stage.saved(loop.plain))
        with failing_together():
            network = stage.measured(loop.plain, self.calibration)
        test = self._labelled(self.eval_loader(self.source.split("test")), loop.criterion.teacher)
        found = evaluate(network, test)
        facts = stage.facts(network)
        if not math.isfinite(found.loss):
            self.notes.append("its loss on the test images is not finite: a lower learning rate, or more steps, may help")
        if not self.source.labelled:
            facts["top1_is"] = AGREEMENT
        elif loop.criterion.teacher is not None:
            facts["teacher_top1"] = evaluate(loop.criterion.teacher, test).top1
        return TrainResult(
            run=str(self.folder.path),
            top1=found.top1,
            top5=found.top5,
            loss=found.loss,
            params=count_params(stage.saved(loop.plain).eval()),
            world_size=self.distributed.world_size,
            steps=loop.state.step,
            weights_sha256=digest,
            seconds=0.0,  # of the whole call, which knows
            resumed_from=resumed_from,
            notes=tuple(self.notes),
            facts=facts,
        )
