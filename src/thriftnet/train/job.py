"""A whole training: from a recipe and a data set to a run folder that can be resumed, evaluated and loaded.

run/run.json             what is trained, how and with what
run/metrics.jsonl, .csv  one row for each epoch; curves.svg draws them
run/model/               the network selected (see `Recipe`), as `thriftnet.save` writes it
run/checkpoints/         what a resumed training needs
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thriftnet import __version__
from thriftnet.core.tied import count_params
from thriftnet.data.dataset import DataSource, ImageDataset, Subset
from thriftnet.data.loaders import make_loader
from thriftnet.data.sources import open_data
from thriftnet.data.split import train_validation
from thriftnet.errors import ConfigError
from thriftnet.files import write_atomically
from thriftnet.resolve import open_model
from thriftnet.store.model_file import RUN
from thriftnet.store.model_file import RUN_MODEL as MODEL
from thriftnet.train import prepare
from thriftnet.train.engine import Hooks, Progress, TrainLoop
from thriftnet.train.evaluate import evaluate
from thriftnet.train.lock import locked
from thriftnet.train.memory_format import faster_format
from thriftnet.train.processes import Distributed
from thriftnet.train.recipe import Recipe
from thriftnet.train.stages import Stage, make_stage

CALIBRATION = 2048  # training images on which a stage may find what it needs for measuring
AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TrainResult:
    """What a training gave.

    Args:
        run: The run's folder; ``model`` in it is the network.
        top1: Of the selected network on the test images, in percent.
        top5: The same, among the five best; None with five classes or fewer.
        loss: Mean cross entropy on the test images.
        params: Stored parameters, shared ones once.
        world_size: Processes that trained together.
        steps: Optimizer steps in all.
        weights_sha256: Hash of the weights at the end of the training, to compare runs.
        seconds: Of this start.
        resumed_from: The checkpoint that it took up, or None.
        notes: What the user should know.
        facts: What the stage measured beside, as the mean multiply-accumulates of a gated network.
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


def train_once(
    recipe: Recipe,
    data: str | DataSource,
    output: str | Path,
    *,
    model: nn.Module | None = None,
    teacher: str | nn.Module | None = None,
    device: str | None = None,
    resume: str = "auto",
    watch: Callable[[Progress], None] | None = None,
) -> TrainResult:
    """Train one stage; arguments and errors as for `thriftnet.train.sequence.train`."""
    start = time.perf_counter()
    processes = Distributed(device, recipe.precision)
    job = Trainer(recipe, processes, Path(output), start)
    with locked(Path(output), processes.is_main):
        return job.run(data, model, teacher, resume, watch or (lambda progress: None))


class Trainer:
    """The parts of one training, put together.

    Args:
        recipe: As given; `run` completes it by what the data and the processes decide.
        processes: This one among the others.
        folder: Of the run.
        start: When it began.
    """

    def __init__(self, recipe: Recipe, processes: Distributed, folder: Path, start: float) -> None:
        self.recipe, self.processes, self.folder, self.start = recipe, processes, folder, start
        self.notes: list[str] = []

    def run(
        self,
        data: str | DataSource,
        model: nn.Module | None,
        teacher: str | nn.Module | None,
        resume: str,
        watch: Callable[[Progress], None],
    ) -> TrainResult:
        """Train, and measure what came out."""
        recipe, processes = self.recipe, self.processes
        source = self.source = open_data(data, on_corrupt=recipe.on_corrupt) if isinstance(data, str) else data
        if source.skipped:
            self.notes.append(f"{len(source.skipped)} images cannot be read and are left out, as {source.skipped[0]}")
        self.augmentation = prepare.augmentation_from(recipe.augmentation).for_source(source)
        prepare.seed_everything(recipe.seed)
        described = type(model).__name__ if model is not None else recipe.model
        network = prepare.prepare_model(recipe, source, self.input_size(), model)
        teacher_model = self._teacher(teacher)
        known = self._agree_on_run(described, network, teacher, resume)
        loader, held_out = self._loaders()
        stage = make_stage(recipe.stage, network, recipe.stage_options, self.input_size())
        loop = TrainLoop(
            network.to(processes.device),
            stage,
            recipe,
            loader,
            processes,
            self.folder,
            Hooks(
                lambda module: self._score(stage, module, held_out), lambda m, row: self._keep(stage.saved(m), row), watch
            ),
            memory_format=known["memory_format"],
            classes=len(source.classes),
            teacher=teacher_model,
        )
        prepare.seed_everything(recipe.seed + processes.rank)
        taken_up = self._resume(loop, resume)
        self._start_trackers()
        loop.run()
        loop.release()
        return self._outcome(loop, taken_up)

    def input_size(self) -> tuple[int, int, int]:
        """Channels, height and width that the network is given."""
        return prepare.input_size(self.augmentation, self.source)

    def _teacher(self, teacher: str | nn.Module | None) -> nn.Module | None:
        if teacher is None:
            return None
        model = open_model(teacher) if isinstance(teacher, str) else teacher
        model = model.to(self.processes.device).eval().requires_grad_(False)
        prepare.check_classes(model, self.source, self.input_size(), "the teacher")
        return model

    def _agree_on_run(
        self, described: str, network: nn.Module, teacher: str | nn.Module | None, resume: str
    ) -> dict[str, Any]:
        """Write what this run is, or check that the folder holds the same one."""
        wanted = {
            "model": described,
            "recipe": self.recipe.to_dict(),
            "data": self.source.spec,
            "teacher": teacher if isinstance(teacher, str) or teacher is None else type(teacher).__name__,
            "world_size": self.processes.world_size,
        }
        path = self.folder / RUN
        stored = prepare.read_run(path)
        if stored is not None:
            if resume == "none" and any((self.folder / "checkpoints").glob("step-*")):
                raise ConfigError(f"{self.folder} holds a training already: give another --output, or --resume auto")
            self.notes += prepare.compare_runs(stored, wanted, self.folder)
        self.processes.wait()
        chosen = self.recipe.memory_format if stored is None else stored.get("memory_format", "contiguous")
        if chosen == "auto":
            chosen = self.processes.from_main(self._faster_format(network) if self.processes.is_main else None)
        versions = {"thriftnet": __version__, "torch": torch.__version__, "accelerate": version("accelerate")}
        known = {**wanted, "memory_format": chosen, "device": str(self.processes.device.type), "versions": versions}
        if self.processes.is_main:
            try:
                write_atomically(path, json.dumps(known, indent=1, default=str) + "\n")
            except OSError as error:
                raise ConfigError(f"cannot write to {self.folder}: {error.strerror}") from None
        return known

    def _faster_format(self, network: nn.Module) -> str:
        images = torch.randn(self.per_process_batch(), *self.input_size(), device=self.processes.device)
        return faster_format(network.to(self.processes.device), images, AUTOCAST[self.recipe.precision])

    def per_process_batch(self) -> int:
        """Images per batch and process."""
        total, parts = self.recipe.total_batch_size, self.processes.world_size * self.recipe.accumulate
        if total is None:
            return self.recipe.batch_size
        if total % parts:
            raise ConfigError(
                f"total_batch_size={total} cannot be divided among {self.processes.world_size} processes with "
                f"accumulate={self.recipe.accumulate}: take a multiple of {parts}, or batch_size instead"
            )
        return total // parts

    def _loaders(self) -> tuple[Any, Any]:
        """Training batches, and those by which the network is selected."""
        recipe, processes = self.recipe, self.processes
        training: ImageDataset = self.source.split("train")
        held_out: ImageDataset = self.source.split("test")
        if recipe.select_on == "val":
            training, held_out = train_validation(training, recipe.validation, recipe.seed)
        elif recipe.select_on == "test":
            self.notes.append("the network was selected on the test images, as the paper did: its accuracy is flattered")
        few = torch.linspace(0, len(training) - 1, min(len(training), CALIBRATION)).long()
        self.plain_images = self._eval_loader(Subset(training, few), shared=False)
        loader = make_loader(
            training,
            self.per_process_batch(),
            augmentation=self.augmentation,
            train=True,
            seed=recipe.seed,
            device=processes.device,
            rank=processes.rank,
            world_size=processes.world_size,
            workers=recipe.workers,
            resident=recipe.resident,
            drop_last=recipe.drop_last or bool(recipe.mixup or recipe.cutmix),
        )
        return loader, self._eval_loader(held_out)

    def _eval_loader(self, images: ImageDataset, *, shared: bool = True) -> Any:
        """Images as they are evaluated, shared among the processes or all of them for each."""
        return make_loader(
            images,
            min(max(2 * self.per_process_batch(), 64), 512),
            augmentation=self.augmentation,
            train=False,
            device=self.processes.device,
            rank=self.processes.rank if shared else 0,
            world_size=self.processes.world_size if shared else 1,
            workers=self.recipe.workers,
        )

    def _resume(self, loop: TrainLoop, resume: str) -> str | None:
        place, problems = loop.resume(None if resume in ("auto", "none") else Path(resume))
        self.notes += problems
        if loop.position.step > loop.steps:
            raise ConfigError(
                f"{self.folder} has been trained for {loop.position.step} steps already, and {loop.steps} are asked for: give more, "
                "or another --output"
            )
        return None if place is None else str(place)

    def _start_trackers(self) -> None:
        """Accelerate's trackers, those that are installed."""
        import accelerate.tracking as tracking

        accelerator, wanted = self.processes.accelerator, self.recipe.trackers
        possible = {str(name): name for name in tracking.get_available_trackers()}
        accelerator.log_with = [possible[name] for name in wanted if name in possible]
        if accelerator.log_with and self.processes.is_main:
            accelerator.project_configuration.set_directories(str(self.folder))
            accelerator.init_trackers("trackers")

    def _score(self, stage: Stage, module: nn.Module, held_out: Any) -> dict[str, Any]:
        network = stage.measured(module, self.plain_images)
        found = evaluate(network, held_out)
        return {"top1": found.top1, "loss": found.loss, **stage.facts(network)}

    def _keep(self, model: nn.Module, row: Mapping[str, Any]) -> None:
        if self.processes.is_main:
            prepare.save_trained(model, self.folder / MODEL, self.source, self.augmentation, self.input_size(), row)

    def _outcome(self, loop: TrainLoop, taken_up: str | None) -> TrainResult:
        """Measure the network that was kept, which the caller's becomes."""
        stage = loop.stage
        digest = prepare.weights_hash(stage.saved(loop.result()))
        if loop.position.skipped:
            self.notes.append(
                f"{loop.position.skipped} of {loop.position.step} steps were skipped: their loss was not finite"
            )
        self.processes.wait()
        kept = stage.saved(loop.plain)
        prepare.load_kept(kept, self.folder / MODEL)
        network = stage.measured(loop.plain, self.plain_images)
        test = self._eval_loader(self.source.split("test"))
        found = evaluate(network, test)
        facts = stage.facts(network)
        if loop.criterion.teacher is not None:
            facts["teacher_top1"] = evaluate(loop.criterion.teacher, test).top1
        kept.eval()
        return TrainResult(
            run=str(self.folder),
            top1=found.top1,
            top5=found.top5,
            loss=found.loss,
            params=count_params(kept),
            world_size=self.processes.world_size,
            steps=loop.position.step,
            weights_sha256=digest,
            seconds=round(time.perf_counter() - self.start, 3),
            resumed_from=taken_up,
            notes=tuple(self.notes),
            facts=facts,
        )
