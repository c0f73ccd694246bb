"""`thriftnet train`: train a network by a recipe, on one process or many, and take it up again."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import (
    KWARGS_HELP,
    MODEL_HELP,
    emit,
    new_parser,
    parse_with_kwargs,
    quantity,
)
from thriftnet.cli.machine import add_machine_options, use_machine
from thriftnet.errors import ConfigError, unknown_name

if TYPE_CHECKING:
    from thriftnet.train.engine import Progress
    from thriftnet.train.job import TrainResult
    from thriftnet.train.recipe import Recipe

DATA_HELP = "digits, cifar10:DIR, cifar100:DIR, folder:DIR or parquet:DIR"
# options that are named like a field of recipes
FIELDS = {
    "--model": MODEL_HELP,
    "--technique": "applied before training, as 'soft-sharing(templates=2)'; may be given several times",
    "--epochs": "passes over the training images",
    "--max-steps": "instead: optimizer steps",
    "--seed": "of weights, order and augmentation",
    "--precision": "fp32, bf16 or fp16",
    "--checkpoint-every": "optimizer steps between checkpoints; one is also written after each epoch",
}


def run(arguments: Sequence[str]) -> None:
    parser = new_parser("train", "Train a network; on several processes: torchrun --nproc-per-node N -m thriftnet train ...")
    parser.epilog = (
        "Each field of a recipe is an option, too: --lr 0.05, --batch-size 256, --augmentation.flip true "
        f"(docs/training.md lists them). {KWARGS_HELP}"
    )
    parser.add_argument("--recipe", metavar="R", help="a name that thriftnet recipes lists, or a YAML file")
    parser.add_argument("--data", metavar="D", required=True, help=DATA_HELP)
    parser.add_argument("--output", metavar="DIR", required=True, help="folder of the run")
    parser.add_argument("--device", metavar="cpu|cuda", help="left out: a GPU where there is one")
    parser.add_argument("--resume", metavar="auto|none|PATH", default="auto", help="take up what the folder holds (default)")
    parser.add_argument("--teacher", metavar="F", help="a network to imitate: its folder, or whatever MODEL may be")
    parser.add_argument("--budget", metavar="MACS", help="what an image may cost on average, for the stage gate, as 300M")
    add_machine_options(parser)
    for option, text in FIELDS.items():
        action: Any = {"action": "append"} if option == "--technique" else {}
        parser.add_argument(option, metavar=option[2].upper(), help=text, **action)
    options, others = parse_with_kwargs(parser, arguments, literals=False)

    from thriftnet.train.sequence import train

    stated = {option[2:].replace("-", "_"): options[option[2:].replace("-", "_")] for option in FIELDS}
    fields = {name: value for name, value in stated.items() if value is not None}
    recipe = make_recipe(options.recipe, fields | others)
    if options.budget is not None:
        recipe = with_budget(recipe, options.budget)
    for name in recipe.needs:
        if options[name] is None:
            raise ConfigError(
                f"the recipe {options.recipe} starts from a trained network: give --{name} FOLDER, as RUN/model"
            )
    use_machine(options, recipe.batch_size)
    with Bar() as bar:
        outcome = train(
            recipe,
            options.data,
            options.output,
            teacher=options.teacher,
            device=options.device,
            resume=options.resume,
            watch=bar.watch,
        )
    if bar.is_main:
        emit(describe(outcome), outcome.to_dict(), as_json=options.json)


def make_recipe(name: str | None, texts: Mapping[str, Any]) -> Any:
    """The recipe with fields replaced as written on the command line; what is no field goes to the network.

    Raises:
        ConfigError: Neither a field nor an argument of the network, with close matches.
    """
    import yaml

    from thriftnet.train.recipe import Recipe, read_recipe, recipe_from, with_fields

    stated = read_recipe(name) if name else {}
    known = Recipe.__dataclass_fields__
    if "max_steps" in texts and "epochs" in texts:
        raise ConfigError("say how long to train with either --epochs or --max-steps")
    for key, text in texts.items():
        try:
            value = yaml.safe_load(text) if isinstance(text, str) and key != "model" else text
        except yaml.YAMLError:
            value = text
        head, dot, rest = key.partition(".")
        if head not in known:
            _check_kwarg(str(texts.get("model") or stated.get("model", Recipe.model)), key, known)
            head, dot, rest = "model_kwargs", ".", key
        if dot and head == "stages":
            _set_in_stage(stated, rest, value)
        else:
            stated = with_fields(stated, {head: {**stated.get(head, {}), rest: value} if dot else value})
    return recipe_from(stated)


def _set_in_stage(stated: dict[str, Any], place: str, value: Any) -> None:
    """Replace a field of one stage: its number, from 1 as in the run's folders, and the field's name."""
    stages = stated.get("stages") or ()
    number, _, field = place.partition(".")
    if not field or number not in map(str, range(1, len(stages) + 1)):
        raise ConfigError(
            f"--stages.{place}: possible is --stages.N.FIELD with N from 1 to {len(stages)}"
            if stages
            else f"--stages.{place}: the recipe has no stages to number; give the field itself, as --lr 0.05"
        )
    field, dot, rest = field.partition(".")
    fields = dict(stages[int(number) - 1])
    fields[field] = {**fields.get(field, {}), rest: value} if dot else value
    stated["stages"] = [fields if place == int(number) else other for place, other in enumerate(stages, 1)]


def with_budget(recipe: Recipe, text: str) -> Recipe:
    """The recipe whose gate keeps to so many multiply-accumulates per image.

    Raises:
        ConfigError: No such number, or no stage that trains a gate.
    """
    budget = {"budget": quantity("--budget", text)}
    if recipe.stage == "gate" and not recipe.stages:
        return recipe.replace(stage_options=recipe.stage_options | budget)
    found = [fields.get("stage", "recalibrate") for fields in recipe.stages] or [recipe.stage]
    if "gate" not in found:
        raise ConfigError(
            f"--budget {text} is for a stage gate; this recipe has {', '.join(found)}. "
            "Take one with gates, as --recipe ds-net-cifar, or --stage gate for a network that has one"
        )
    stages = [
        {**fields, "stage_options": fields.get("stage_options", {}) | budget} if fields.get("stage") == "gate" else fields
        for fields in recipe.stages
    ]
    return recipe.replace(stages=stages)


def _check_kwarg(model: str, key: str, fields: Mapping[str, Any]) -> None:
    """Refuse what neither the recipe nor a network of the zoo knows."""
    from thriftnet.models import model_kwargs
    from thriftnet.models.table import NAMES, normalize_name

    if normalize_name(model) in NAMES and key not in model_kwargs(model):
        raise unknown_name(f"recipe field, nor argument of {model},", key, [*fields, *model_kwargs(model)])


class Bar:
    """A progress bar with rate and time left on a terminal; nothing elsewhere."""

    def __init__(self) -> None:
        import os

        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.is_main = int(os.environ.get("RANK", "0")) == 0
        self.bars = Bars(
            TextColumn("epoch {task.fields[epochs]:.1f}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f} images/s  {task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not (self.is_main and sys.stderr.isatty()),
        )
        self.task: Any = None
        self.note = ""

    def __enter__(self) -> Bar:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def watch(self, progress: Progress) -> None:
        """Show one step."""
        import time

        if self.bars.disable:
            return
        now = time.perf_counter()
        if self.task is None:
            self.task = self.bars.add_task("", total=progress.steps, completed=progress.step, epochs=0.0, rate=0.0, note="")
            self.seen, self.since = 0, now
        self.seen += progress.images
        if progress.row is not None:
            self.note = f"train loss {progress.row['train_loss']:.3f}"
            if "top1" in progress.row:
                self.note += f", top-1 {progress.row['top1']:.2f} %"
        rate = self.seen / max(now - self.since, 1e-9)
        self.bars.update(self.task, completed=progress.step, epochs=progress.epochs, rate=rate, note=self.note)


def describe(outcome: TrainResult) -> str:
    """The result in words."""
    lines = [f"note: {note}" for note in outcome.notes]
    if outcome.resumed_from:
        lines.append(f"resumed from {outcome.resumed_from}")
    lines += [
        f"test top-1 {outcome.top1:.2f} %, loss {outcome.loss:.4f}; {outcome.params:,} stored parameters",
        *(f"{name.replace('_', ' ')}: {value}" for name, value in outcome.facts.items()),
        f"{outcome.steps:,} steps, {outcome.seconds:.1f} s, {outcome.world_size} process{'es' if outcome.world_size > 1 else ''}",
        f"run: {outcome.run}    (thriftnet evaluate {outcome.run} --data ...)",
    ]
    return "\n".join(lines)
