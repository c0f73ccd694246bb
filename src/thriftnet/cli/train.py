"""`thriftnet train`: train a network by a recipe, on one process or many; the same command resumes."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from thriftnet.cli.common import KWARGS_HELP, Parser, accepted_kwargs, parse_with_kwargs, unknown_option
from thriftnet.cli.machine import use_machine
from thriftnet.cli.options import MACHINE_OPTIONS, OPTIONS, quantity
from thriftnet.cli.output import emit, has_terminal, is_main_process, say
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from thriftnet.train.loop import Progress
    from thriftnet.train.recipe import Recipe
    from thriftnet.train.trainer import TrainResult

# options that are named like a field of recipes
FIELDS = {
    "model": ("MODEL", OPTIONS["model"]["help"]),
    "technique": (
        "T",
        "applied before training, as 'soft-sharing(templates=2)', also to a network that is converted already; may be given several "
        "times; none: convert nothing",
    ),
    "stage": ("NAME", "of a recipe with several stages: train this one only; else what a step does, as widths"),
    "epochs": ("N", "passes over the training images"),
    "max_steps": ("N", "instead: optimizer steps"),
    "minutes": ("M", "instead: as many steps as fit into so many minutes, by what the first ones take"),
    "patience": ("N", "stop after so many evaluations without a better accuracy"),
    "limit": ("N", "only N training images, evenly spread over the split, those held out among them"),
    "batch_size": ("N", "images per optimizer step, over all processes"),
    "lr": ("LR", "learning rate"),
    "seed": ("N", "of weights, order and augmentation"),
    "precision": ("P", "fp32, bf16 or fp16"),
    "checkpoint_every": ("N", "optimizer steps between checkpoints; one is also written after each epoch"),
}


def run(arguments: Sequence[str]) -> None:
    description = "Train a network; on several processes: torchrun --nproc-per-node N -m thriftnet train ..."
    parser = Parser("train", description, "--data")
    parser.further = last_names
    parser.epilog = (
        "Each field of a recipe is an option, too: --weight-decay 0.0001 (or --optimizer.weight-decay), --flip true "
        f"(docs/training.md lists them). {KWARGS_HELP}"
    )
    add = parser.add_argument
    add("--recipe", metavar="R", help="a name that thriftnet recipes lists, or a YAML file")
    add("--output", metavar="DIR", required=True, help="folder of the run")
    add("--device", metavar="cpu|cuda", help="default: a GPU where there is one")
    resume = "resume the folder's training, none, or a checkpoint"
    add("--resume", metavar="auto|none|PATH", default="auto", help=resume)
    add("--teacher", metavar="F", help="a network to imitate: its folder, or whatever MODEL may be")
    add("--budget", type=quantity, metavar="MACS", help="for the stage gate: mean MACs per image, as 300M")
    parser.add_shared(*MACHINE_OPTIONS)
    for name, (metavar, text) in FIELDS.items():
        action = "append" if name == "technique" else "store"
        add(f"--{name.replace('_', '-')}", metavar=metavar, action=action, help=text)
    options, others = parse_with_kwargs(parser, arguments, literals=False)

    from thriftnet.train.trainer import train

    given = {name: value for name, value in vars(options).items() if value is not None}
    recipe = make_recipe(options.recipe, {name: given[name] for name in FIELDS if name in given} | others)
    if options.budget is not None:
        recipe = with_budget(recipe, options.budget)
    for name in recipe.needs:
        if name not in given:
            raise ConfigError(
                f"the recipe {options.recipe} starts from a trained network: give --{name} FOLDER, as RUN/model"
            )
    use_machine(options, recipe.data.batch_size)
    with Bar() as bar:
        how: Any = {"teacher": options.teacher, "device": options.device, "resume": options.resume}
        result = train(recipe, options.data, options.output, **how, on_progress=bar.on_progress, on_note=bar.on_note)
    emit(describe(result), result.to_dict(), as_json=options.json)


def make_recipe(name: str | None, texts: Mapping[str, Any]) -> Recipe:
    """The recipe with fields replaced by the command line's; other names are arguments of the network.

    Raises:
        ConfigError: Neither a field nor an argument of the network, with close matches.
    """
    from thriftnet.train.recipe import Recipe, full_name, read_recipe, recipe_from

    stated = read_recipe(name) if name else {}
    lengths = [f"--{key.replace('_', '-')}" for key in ("epochs", "max_steps", "minutes") if key in texts]
    if len(lengths) > 1:
        raise ConfigError(f"say how long to train with either {' or '.join(lengths)}")
    fields = {}
    for key, text in texts.items():
        if full_name(key) is None and "." not in key:
            _check_kwarg(str(texts.get("model") or stated.get("model", Recipe.model)), key)
            key = f"model_kwargs.{key}"
        fields[key] = _value(key, text)
    return recipe_from(stated, fields)


def _value(name: str, text: Any) -> Any:
    """Text unchanged for a field that has a type, otherwise read as YAML."""
    import yaml

    from thriftnet.train.recipe import MAPPINGS, field_names, full_name

    own = name.split(".", 2)[-1] if name.startswith("stages.") else name
    path = full_name(own)
    if isinstance(text, str) and re.fullmatch(r"[\d.]+(,[\d.]+)+", text):
        return [float(part) for part in text.split(",")]  # as other verbs take them
    if not isinstance(text, str) or (path in field_names() and path not in (*MAPPINGS, "stages")):
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def with_budget(recipe: Recipe, budget: float) -> Recipe:
    """The recipe with a budget of multiply-accumulates per image for its gate; one without a gate is refused."""
    found = [entry.get("stage.name", "recalibrate") for entry in recipe.stages] or [recipe.stage.name]
    if "gate" not in found:
        raise ConfigError(
            f"--budget is for a stage gate; this recipe has {', '.join(found)}. "
            "Take one with gates, as --recipe ds-net-cifar, or --stage gate for a network that has one"
        )
    prefixes = [f"stages.{number}." for number, name in enumerate(found, 1) if name == "gate"] if recipe.stages else [""]
    return recipe.replace(**{f"{prefix}stage.options.budget": budget for prefix in prefixes})


def _check_kwarg(model: str, key: str) -> None:
    """Refuse a name that neither recipes nor this network have."""
    accepted = accepted_kwargs(model)
    if accepted is not None and key not in accepted:
        raise unknown_option(key, {f"--{name.replace('_', '-')}" for name in last_names()}, accepted)


def last_names() -> set[str]:
    """Fields of recipes, which are options, too."""
    from thriftnet.train.recipe import last_names

    return last_names()


class Bar:
    """On stderr: a progress bar for each training on a terminal, elsewhere a line for each epoch; from the main process only."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self.bars = Bars(
            TextColumn("{task.description}epoch {task.fields[epochs]:.1f}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]:,.0f} images/s  {task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not has_terminal(),
        )
        self.start("")

    def start(self, name: str) -> None:
        """Give the next training a bar of its own."""
        self.name, self.note = name and f"{name:<16} ", ""
        self.task: Any = None
        self.step = 0

    def __enter__(self) -> Bar:
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def on_note(self, note: str) -> None:
        """Show what the user may not expect, before the first step."""
        if is_main_process():
            say(f"note: {note}")

    def on_progress(self, progress: Progress) -> None:
        """Show one step."""
        if not is_main_process():
            return
        now, row = time.perf_counter(), progress.row or {}
        if self.task is None or progress.step <= self.step:  # each stage of a recipe counts from 1
            fields: Any = {"epochs": 0.0, "rate": 0.0, "note": ""}
            self.task = self.bars.add_task(self.name, total=progress.steps, completed=progress.step, **fields)
            self.first, self.seen, self.since = progress.step - 1, 0, now - row.get("seconds", 0.0)
        self.step = progress.step
        self.seen += progress.images
        if row:
            names = {"top1": "top-1", "agreement": "agreement"}
            accuracy = "".join(f", {text} {row[name]:.2f} %" for name, text in names.items() if name in row)
            self.note = f"train loss {row['train_loss']:.3f}{accuracy}, lr {row['lr']:.3g}"
        rate = self.seen / max(now - self.since, 1e-9)
        self.bars.update(self.task, completed=progress.step, epochs=progress.epochs, rate=rate, note=self.note)
        if row and self.bars.disable:
            left = (progress.steps - progress.step) * (now - self.since) / (progress.step - self.first)
            epochs = f"{progress.epochs:g}/{progress.epochs * progress.steps / progress.step:g}"
            speed = f"{row['images_per_second']:,.0f} images/s, {timedelta(seconds=round(left))} left"
            say(f"{self.name}epoch {epochs}: {self.note}, {speed}")


def describe(result: TrainResult) -> str:
    """The result as text."""
    lines = [f"note: {note}" for note in result.notes]
    if result.resumed_from:
        lines.append(f"resumed from {result.resumed_from}")
    lines += [
        f"test {result.facts.get('top1_is', 'top-1')} {result.top1:.2f} %, loss {result.loss:.4f}; {result.params:,} stored parameters",
        *(f"{name.replace('_', ' ')}: {value}" for name, value in result.facts.items() if name != "top1_is"),
        f"{result.steps:,} steps, {result.seconds:.1f} s, {result.world_size} process{'es' if result.world_size > 1 else ''}",
        f"run: {result.run}    (thriftnet evaluate {result.run} --data ...)",
    ]
    return "\n".join(lines)
