"""Trainings of one network after each other, as a supernet, then its statistics, then its gate."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from thriftnet.core.recalibrate import recalibrate
from thriftnet.data.dataset import DataSource
from thriftnet.data.loaders import make_loader
from thriftnet.data.sources import open_data
from thriftnet.dynamic.network import DynamicNetwork
from thriftnet.errors import ConfigError, unknown_name
from thriftnet.files import write_atomically
from thriftnet.store.model_file import RUN
from thriftnet.store.model_file import RUN_MODEL as MODEL
from thriftnet.train import prepare
from thriftnet.train.engine import Progress
from thriftnet.train.evaluate import evaluate
from thriftnet.train.job import TrainResult, train_once
from thriftnet.train.recipe import Recipe
from thriftnet.train.stages import GateStage, make_stage

RECALIBRATION = ("widths", "momentum", "batches")
NOTHING = "none of the recipe's stages trains: one must have a field stage"


def train(
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
    """Train a network by a recipe; call it in each of the processes that ``torchrun`` starts.

    Args:
        recipe: What to train, and how.
        data: A data set, or as `thriftnet.data.sources.open_data` takes it.
        output: Folder of the run; of a recipe with several stages, each has a folder in it.
        model: Your own network instead of the recipe's; trained in place.
        teacher: A network, or what ``--model`` takes: its outputs are imitated, see ``distill_weight``.
        device: ``cpu`` or ``cuda``; left out, a GPU where there is one.
        resume: ``auto`` takes up what the folder holds, ``none`` refuses to, else the path of a checkpoint.
        watch: Told of each step.

    Returns:
        What came out; of the last of several stages.

    Raises:
        ConfigError: Settings that do not fit each other, the folder or the data.
        DataError: Images that cannot be read.
        CheckpointError: A checkpoint that cannot be written or read.
        DivergedError: The loss is no number.
        Interrupted: Stopped by a signal; the same call goes on.
    """
    options: dict[str, Any] = {"teacher": teacher, "device": device, "watch": watch}
    if not recipe.stages:
        return train_once(recipe, data, output, model=model, resume=resume, **options)
    if resume not in ("auto", "none"):
        raise ConfigError(f"a recipe of several stages finds its checkpoints itself: take --resume auto, not {resume}")
    source = open_data(data, on_corrupt=recipe.on_corrupt) if isinstance(data, str) else data
    prepare.seed_everything(recipe.seed)
    augmentation = prepare.augmentation_from(recipe.augmentation).for_source(source)
    model = prepare.prepare_model(recipe, source, prepare.input_size(augmentation, source), model)
    parts = [single(recipe, fields) for fields in recipe.stages]
    _check(parts, recipe.stages, model, prepare.input_size(augmentation, source))
    outcome: TrainResult | None = None
    notes: list[str] = []
    for number, (part, fields) in enumerate(zip(parts, recipe.stages, strict=True), 1):
        place = Path(output) / f"{number}-{fields.get('stage', 'recalibrate')}"
        if "recalibrate" in fields:
            notes.append(_recalibrated(model, part, source, place, fields["recalibrate"]))
            if outcome is not None and number == len(parts):
                outcome = _measured(outcome, model, part, source, place)
        else:
            outcome = train_once(part, source, place, model=model, resume=resume, **options)
            notes += outcome.notes
    if outcome is None:
        raise ConfigError(NOTHING)
    return replace(outcome, notes=tuple(dict.fromkeys(notes)))


def single(recipe: Recipe, fields: dict[str, Any]) -> Recipe:
    """The recipe of one stage: what all have in common, with this one's fields; the network is converted already."""
    if not ("stage" in fields) ^ ("recalibrate" in fields):
        raise ConfigError(f"a stage of a recipe has either a field stage or a field recalibrate, got {sorted(fields)}")
    own = {name: value for name, value in fields.items() if name != "recalibrate"}
    return recipe.replace(**{"technique": (), "stages": (), **own})


def _check(parts: Sequence[Recipe], stages: Sequence[dict[str, Any]], model: nn.Module, size: tuple[int, int, int]) -> None:
    """Refuse before the first stage what the last would refuse, after days.

    Raises:
        ConfigError: No stage trains, unknown options, or a budget out of reach.
        IncompatibleModelError: A network that a stage cannot train.
    """
    if all("recalibrate" in fields for fields in stages):
        raise ConfigError(NOTHING)
    for part, fields in zip(parts, stages, strict=True):
        for name in fields.get("recalibrate", ()):
            if name not in RECALIBRATION:
                raise unknown_name("option of recalibrate", name, RECALIBRATION)
        if "recalibrate" not in fields:
            stage = make_stage(part.stage, model, part.stage_options, size)
            if isinstance(stage, GateStage):
                stage.objective.check_budget(DynamicNetwork(model, input_size=size).macs)


def _measured(outcome: TrainResult, model: nn.Module, recipe: Recipe, source: DataSource, place: Path) -> TrainResult:
    """The outcome of a training whose network has got fresh statistics since."""
    rank, world_size = _processes()
    loader = make_loader(
        source.split("test"),
        256,
        augmentation=prepare.augmentation_from(recipe.augmentation).for_source(source),
        train=False,
        device=next(model.parameters()).device,
        rank=rank,
        world_size=world_size,
        workers=recipe.workers,
    )
    found = evaluate(model.eval(), loader)
    return replace(outcome, run=str(place), top1=found.top1, top5=found.top5, loss=found.loss)


def _processes() -> tuple[int, int]:
    """Number of this process, and of all."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _recalibrated(model: nn.Module, recipe: Recipe, source: DataSource, place: Path, options: dict[str, Any]) -> str:
    """Give a network fresh statistics, or those that an earlier start gave it; says so."""
    wanted = {"recipe": recipe.to_dict(), "data": source.spec, "recalibrate": options}
    stored = prepare.read_run(place / RUN)
    if stored is not None:
        prepare.compare_runs(stored, wanted, place)
    if (place / MODEL).is_dir():
        prepare.load_kept(model, place / MODEL)
        return f"{place.name}: taken from {place}"
    augmentation = prepare.augmentation_from(recipe.augmentation).for_source(source)
    rank, world_size = _processes()
    loader = make_loader(
        source.split("train"),
        recipe.batch_size if recipe.total_batch_size is None else recipe.total_batch_size // world_size,
        augmentation=augmentation,
        train=True,
        seed=recipe.seed,
        device=next(model.parameters()).device,
        rank=rank,
        world_size=world_size,
        workers=recipe.workers,
        resident=recipe.resident,
        drop_last=True,  # every batch counts alike
    )
    recalibrate(model, loader, **options)
    if rank == 0:
        write_atomically(place / RUN, json.dumps(wanted, indent=1) + "\n")
        prepare.save_trained(model, place / MODEL, source, augmentation, prepare.input_size(augmentation, source), {})
    if world_size > 1:
        dist.barrier()
    return f"{place.name}: fresh statistics from the training images"
