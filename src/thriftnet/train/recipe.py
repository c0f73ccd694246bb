"""Recipes: how a network is trained, as plain data.

A recipe is a YAML file of the fields below, in their groups: one of ``train/recipes``, or your own. Each field can be replaced, in
Python (``load_recipe(name, lr=0.05)``) and on the command line (``--lr 0.05``), by its full name, ``optimizer.lr``, or by the last
part of it where only one group has such a field. docs/training.md lists all of them.
"""

from __future__ import annotations

import copy
import functools
import re
from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from thriftnet.arguments import (
    BatchSize,
    Count,
    Epochs,
    Natural,
    PositiveWeight,
    ProperShare,
    Seed,
    Share,
    Weight,
    Workers,
    as_path,
    checked,
)
from thriftnet.data.augmentation import Augmentation
from thriftnet.errors import ConfigError, unknown_name
from thriftnet.files import read_text
from thriftnet.models.table import normalize_name

# fields that do not change the result: a resumed run may differ in them
RESUMABLE_FIELDS = (
    "about",
    "needs",
    "epochs",
    "max_steps",
    "data.workers",
    "run.checkpoint_every",
    "run.keep_checkpoints",
    "run.on_nan",
    "run.trackers",
    "run.patience",
)
MAPPINGS = ("model_kwargs", "about", "stage.options")  # of values of any type
LISTS = ("technique", "needs", "optimizer.no_decay", "run.trackers")  # one entry may be written without brackets
NO_TECHNIQUE = "none"  # as the technique: convert nothing
SHIPPED = Path(__file__).parent / "recipes"
RECALIBRATION = ("widths", "indices", "momentum", "batches")


IN_WORDS = {  # types as jsonargparse names them
    "tuple[float, ...]": "a list of numbers",
    "tuple[float, float]": "two numbers, as [0.08, 1]",
    ", NoneType": " or null",
    "bool": "true or false",
    "float": "a number",
    "int": "an integer",
    "dict": "a mapping",
    "str": "text",
}


@checked
@dataclass(frozen=True, kw_only=True)
class DataFields:
    """How images are read."""

    batch_size: BatchSize = 128  # images per optimizer step, over all processes and accumulated batches
    limit: Count | None = None  # only so many images of the training split, evenly spread, held-out ones among them
    drop_last: bool = False  # whether to drop a last, smaller batch; mixup always does
    workers: Workers = 2  # processes that decode images, for data not held in memory
    resident: bool | None = None  # whether all images are held on the device; default: if small and of equal size
    on_corrupt: Literal["error", "skip"] = "error"  # whether an undecodable image stops the training or is left out


@checked
@dataclass(frozen=True, kw_only=True)
class OptimizerFields:
    """The optimizer, and the average of the weights."""

    name: str = "sgd"  # or adamw, or another name of timm's
    lr: PositiveWeight = 0.1  # learning rate at factor 1 of the schedule
    momentum: ProperShare = 0.9  # of SGD
    nesterov: bool = True  # Nesterov momentum for SGD
    weight_decay: Weight = 5e-4  # for all parameters except those of no_decay
    no_decay: tuple[Literal["technique", "norm", "bias"], ...] = ("technique",)  # technique: what it lists, as coefficients
    clip_grad: PositiveWeight | None = None  # largest L2 norm of the gradient
    accumulate: Count = 1  # batches whose gradients are added up for one optimizer step
    reset_momentum_every_epoch: bool = False  # a new optimizer in each epoch, as in the ShiftResNet authors' script
    ema_decay: ProperShare = 0.0  # of an average of the weights over steps, which is evaluated and saved
    ema_warmup: bool = False  # forget the first weights sooner: in step n the decay is at most (1 + n) / (10 + n)


@checked
@dataclass(frozen=True, kw_only=True)
class ScheduleFields:
    """The learning rate over the training; warm-up, minimum and cool-down are for the cosine."""

    name: Literal["constant", "multistep", "cosine", "piecewise"] = "cosine"
    milestones: dict[Natural, Weight] = field(default_factory=dict)  # for multistep: epoch (from 0) -> factor from then on
    points: dict[Weight, Weight] = field(default_factory=dict)  # for piecewise: epoch -> factor, straight lines between
    per: Literal["step", "epoch"] = "step"  # whether the learning rate changes each step or each epoch
    warmup_epochs: Weight = 0.0  # epochs from warmup_lr to the schedule
    warmup_lr: Weight = 0.0  # learning rate at the first step of the warm-up
    min_lr: Weight = 0.0  # learning rate at the end
    cooldown_epochs: Weight = 0.0  # epochs at the end, at min_lr, among the training's epochs

    def __post_init__(self) -> None:
        if self.name == "multistep" and not self.milestones:
            raise ConfigError("schedule='multistep' needs milestones, as {82: 0.1, 123: 0.1}")
        if self.name == "piecewise" and len(self.points) < 2:
            raise ConfigError("schedule='piecewise' needs points, as {0: 0, 5: 1, 30: 0}")


@checked
@dataclass(frozen=True, kw_only=True)
class LossFields:
    """The loss."""

    label_smoothing: ProperShare = 0.0  # share of the target spread over all classes
    mixup: Weight = 0.0  # alpha of mixup; 0 for none
    cutmix: Weight = 0.0  # alpha of CutMix; 0 for none
    mixup_switch: Share = 0.5  # probability of CutMix where both are on
    distill_weight: Share = 0.5  # share of the loss on the teacher's outputs
    distill_temperature: PositiveWeight = 4.0  # of both outputs
    penalty: Weight = 1.0  # factor on the technique's penalty, beside that of its config


@checked
@dataclass(frozen=True, kw_only=True)
class StageFields:
    """What one optimizer step does."""

    name: str = "auto"  # all widths of a slimmable network, else the plain step; or a name of stages.STAGES
    options: dict[str, Any] = field(default_factory=dict)


@checked
@dataclass(frozen=True, kw_only=True)
class RunFields:
    """How the training runs, which network it keeps, and what it writes."""

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of autocast
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"  # of weights and images
    compile: bool = False  # the network, with torch.compile
    find_unused_parameters: bool = False  # DDP's option, for networks in which a step leaves parameters without a gradient
    select_on: Literal["val", "test", "last"] = "val"  # keep the best on val, on test (flattering) or the last
    validation: ProperShare = 0.1  # share of the training images held out for select_on: val
    evaluate_every: Epochs = 1  # epochs between evaluations
    patience: Natural = 0  # evaluations without a better accuracy after which the training stops; 0: never
    minutes: PositiveWeight | None = None  # train as many steps as fit; the schedule of the recipe's epochs spans them
    checkpoint_every: Natural = 0  # optimizer steps between checkpoints; 0: at the end of each epoch only
    keep_checkpoints: Count = 2  # how many of the newest are kept
    on_nan: Literal["stop", "skip"] = "stop"  # whether a loss that is not finite stops the training or skips the step
    trackers: tuple[str, ...] = ("tensorboard",)  # Accelerate's, as wandb or mlflow; those not installed are skipped

    def __post_init__(self) -> None:
        if self.select_on == "val" and not self.validation:
            raise ConfigError(
                "select_on='val' needs a share of the training images in validation; otherwise set select_on='last'"
            )
        if self.select_on == "last" and self.patience:
            raise ConfigError(
                f"patience={self.patience} counts evaluations on held-out images, and select_on='last' looks at none: "
                "set select_on='val', or patience=0"
            )


@checked
@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train.

    Args:
        model: The network: any name that ``--model`` takes.
        model_kwargs: For the function that builds it; classes and channels follow from the data.
        technique: Applied before training, as ``soft-sharing(templates=2)``; several are applied in this order. None: ``none``.
        convert_again: Apply them to a network that is converted already, too; techniques given instead of a recipe's are.
        select: Regular expression on the layers that the techniques may convert.
        epochs: Passes over the training images.
        max_steps: Instead: optimizer steps; the schedule spans them.
        seed: Of weights, order and augmentation.
        data, augmentation, optimizer, schedule, loss, stage, run: Groups of fields; the augmentation's mean and std default to the
            data's.
        stages: Instead of one training, several of the same network: for each the fields in which it differs, with ``stage``, or with
            ``recalibrate`` (arguments of `thriftnet.recalibrate`) to recompute norm statistics.
        needs: Options that must be given on the command line, as ``model`` for a recipe that starts from a trained network.
        about: Paper, table row, expected accuracy, parameters, hardware, time.
    """

    model: str = "resnet20"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    technique: tuple[str, ...] = ()
    convert_again: bool = False
    select: str | None = None
    epochs: Epochs = 10
    max_steps: Count | None = None
    seed: Seed = 0
    data: DataFields = field(default_factory=DataFields)
    augmentation: Augmentation = field(default_factory=Augmentation)
    optimizer: OptimizerFields = field(default_factory=OptimizerFields)
    schedule: ScheduleFields = field(default_factory=ScheduleFields)
    loss: LossFields = field(default_factory=LossFields)
    stage: StageFields = field(default_factory=StageFields)
    run: RunFields = field(default_factory=RunFields)
    stages: tuple[dict[str, Any], ...] = ()
    needs: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ramps = self.schedule.warmup_epochs + self.schedule.cooldown_epochs
        if self.max_steps is None and self.schedule.name == "cosine" and ramps >= self.epochs:
            raise ConfigError(
                f"warmup_epochs={self.schedule.warmup_epochs:g} and cooldown_epochs={self.schedule.cooldown_epochs:g} leave nothing "
                f"of epochs={self.epochs} for the schedule: give fewer, as --warmup-epochs 0 --cooldown-epochs 0"
            )

    def replace(self, **fields: Any) -> Recipe:
        """The recipe with some fields replaced, in each of its stages.

        Raises:
            ConfigError: An unknown field, with close matches, or a value that it cannot have.

        Example:
            >>> Recipe().replace(lr=0.05, flip=True).optimizer.lr
            0.05
        """
        return recipe_from(self.to_dict(), fields)

    def for_stage(self, entry: Mapping[str, Any]) -> Recipe:
        """The recipe of one of the ``stages``."""
        return self.replace(stages=(), **{name: value for name, value in entry.items() if name != "recalibrate"})

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready dict; `recipe_from` reads it."""
        return asdict(self)


GROUPS: dict[str, Any] = {each.name: each.default_factory for each in fields(Recipe) if is_dataclass(each.default_factory)}


def list_recipes() -> list[str]:
    """Names of the recipes shipped with the package."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


@checked
def load_recipe(name: str, /, **fields: Any) -> Recipe:
    """The recipe of that name, or in that file.

    Args:
        name: One of `list_recipes`, or the path of a YAML file.
        fields: Replace those of the recipe, in each of its stages: ``lr=0.05`` or ``**{"optimizer.lr": 0.05}``; a mapping for a group
            replaces the fields that it names.

    Raises:
        ConfigError: No such recipe or field, with close matches, or a file that cannot be read.
    """
    return recipe_from(read_recipe(name), fields)


def read_recipe(name: str) -> dict[str, Any]:
    """The fields that a recipe file states."""
    import yaml

    path = as_path(name, "recipe")
    if path.suffix not in (".yaml", ".yml"):
        if name not in list_recipes() and path.exists():
            raise ConfigError(
                f"{name} is not a recipe: expected a file whose name ends in .yaml, or one of `thriftnet recipes`"
            )
        if name not in list_recipes():
            raise unknown_name("recipe", name, list_recipes())
        path = SHIPPED / f"{name}.yaml"
    try:
        stated = yaml.safe_load(read_text(path))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the recipe {name}: {' '.join(str(error).split())}") from None
    if not isinstance(stated, dict) or not all(isinstance(key, str) for key in stated):
        raise ConfigError(f"{name} is not a recipe: expected a mapping of fields, as 'epochs: 10'")
    return stated


def recipe_from(stated: Mapping[str, Any], replaced: Mapping[str, Any] | None = None) -> Recipe:
    """A recipe from plain data, as read from YAML or JSON, with some fields replaced.

    Raises:
        ConfigError: Unknown fields, or values that they cannot have.
    """
    flat = _replaced(_flat(stated), replaced or {})
    nested: dict[str, Any] = {}
    for path, value in sorted(flat.items(), key=lambda field: field[0].count(".")):  # a mapping before its entries
        *above, last = path.split(".")
        place = nested
        for name in above:
            place = place.setdefault(name, {})
        place[last] = copy.deepcopy(value)
    stages = tuple(nested.pop("stages", ()))
    kwargs, about = nested.pop("model_kwargs", {}), nested.pop("about", {})
    options = nested.get("stage", {}).pop("options", {})
    try:
        recipe = Recipe(**vars(_parser().instantiate(_parser().parse_object(nested))))
    except ArgumentError as error:
        raise ConfigError(_in_one_line(str(error))) from None
    return replace(recipe, model_kwargs=kwargs, about=about, stages=stages, stage=replace(recipe.stage, options=options))


def full_name(name: str) -> str | None:
    """The full name of a field, of a group, or of an entry of a field that is a mapping; None if there is none.

    Example:
        >>> full_name("lr"), full_name("stage.options.drawn"), full_name("rate")
        ('optimizer.lr', 'stage.options.drawn', None)
    """
    head, _, rest = name.partition(".")
    if head in GROUPS:
        return name if not rest or rest.partition(".")[0] in _names(GROUPS[head]) else None
    if head in _names(Recipe):
        return name
    owners = [group for group, kind in GROUPS.items() if head in _names(kind)]
    return f"{owners[0]}.{name}" if len(owners) == 1 else None


def field_names() -> list[str]:
    """The full names of all fields."""
    groups = [[f"{name}.{leaf}" for leaf in _names(GROUPS[name])] if name in GROUPS else [name] for name in _names(Recipe)]
    return [path for group in groups for path in group]


def last_names() -> set[str]:
    """The last parts of the fields' names."""
    return {path.rpartition(".")[2] for path in field_names()} - {"name"}


def _names(kind: type) -> list[str]:
    return [each.name for each in fields(kind)]


def _flat(stated: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by their full names."""
    flat: dict[str, Any] = {}
    for name, value in stated.items():
        path = full_name(name)
        if path is None:
            head, _, leaf = name.partition(".")
            if head in GROUPS:
                raise unknown_name(f"field of {head}", leaf, _names(GROUPS[head]))
            known = field_names() if leaf else {*last_names(), *GROUPS}
            raise unknown_name("recipe field", name, known)
        if path in MAPPINGS and not isinstance(value, Mapping):
            raise ConfigError(f"{path}={value!r}: expected a mapping")
        if path == "stages":
            flat[path] = [_flat_stage(entry) for entry in (value if isinstance(value, list | tuple) else [value])]
        elif path == "technique" and value in (NO_TECHNIQUE, [NO_TECHNIQUE], (NO_TECHNIQUE,)):
            flat[path] = []
        elif path in LISTS and isinstance(value, str) and not value.startswith("["):
            flat[path] = [value]
        elif path == "schedule.points" and isinstance(value, Mapping):
            flat[path] = {_number(epoch): factor for epoch, factor in value.items()}
        elif path not in GROUPS:
            flat[path] = value
        elif isinstance(value, Mapping) or is_dataclass(value):
            items = value if isinstance(value, Mapping) else asdict(value)  # type: ignore[arg-type]
            flat |= _flat({f"{path}.{leaf}": item for leaf, item in items.items()})
        elif "name" in _names(GROUPS[path]):
            flat[f"{path}.name"] = value  # optimizer: adamw
        else:
            raise ConfigError(f"{path}={value!r}: expected a mapping of its fields: {', '.join(_names(GROUPS[path]))}")
    return flat


def _number(key: Any) -> Any:
    """The number that a text is: JSON has text for keys."""
    try:
        return float(key)
    except (TypeError, ValueError):
        return key


def _flat_stage(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"stages: expected a list of mappings, got {entry!r}")
    flat = _flat({name: value for name, value in entry.items() if name != "recalibrate"})
    if ("stage.name" in flat) == ("recalibrate" in entry):
        raise ConfigError(f"a stage of a recipe has either a field stage or a field recalibrate, got {sorted(entry)}")
    if "recalibrate" not in entry:
        return flat
    options = entry["recalibrate"]
    if not isinstance(options, Mapping):
        raise ConfigError(f"recalibrate={options!r}: expected a mapping, as {{batches: 100}} or {{}}")
    for name in options:
        if name not in RECALIBRATION:
            raise unknown_name("option of recalibrate", name, RECALIBRATION)
    return {"recalibrate": dict(options), **flat}


def _replaced(stated: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """With fields replaced, in all stages; ``stages.2.lr`` is that of the second only.

    Another ``model`` does not get the arguments of the recipe's, ``stage`` selects one of several, and a ``technique`` that was
    asked for is applied to any network.
    """
    for_all = _flat({name: value for name, value in fields.items() if not name.startswith("stages.")})
    if for_all.get("technique"):
        for_all = {"convert_again": True, **for_all}
    if normalize_name(str(for_all.get("model", ""))) not in ("", normalize_name(str(stated.get("model", Recipe.model)))):
        stated = {path: value for path, value in stated.items() if path.partition(".")[0] != "model_kwargs"}
    for path in for_all:
        mapping, _, key = path.rpartition(".")
        if mapping in MAPPINGS and key in for_all.get(mapping, ()):
            raise ConfigError(f"{key} is given twice, in {mapping} and by itself")
    if stated.get("stages") and "stages" not in for_all and "stage.name" in for_all:
        stated = _one_stage(stated, str(for_all["stage.name"]))
    stages = for_all.get("stages", stated.get("stages", ()))
    if stages and "stages" not in for_all:
        for path in for_all:
            if path.startswith("stage."):
                raise ConfigError(
                    f"{path} of a recipe with several stages belongs to one of them: say stages.{len(stages)}.{path}"
                )
        stages = [{path: value for path, value in entry.items() if path not in for_all} for entry in stages]
    for name, value in fields.items():
        if name.startswith("stages."):
            stages = _with_stage_field(stages, name, value)
    return {**stated, **for_all, **({"stages": stages} if stages else {})}


def _one_stage(stated: dict[str, Any], name: str) -> dict[str, Any]:
    """The recipe of one stage; all but the first start from a trained network."""
    names = [entry.get("stage.name", "recalibrate") for entry in stated["stages"]]
    if name not in names or name == "recalibrate":
        possible = ", ".join(each for each in names if each != "recalibrate")
        raise ConfigError(
            f"stage={name!r}: the recipe has {', '.join(names)}. Expected one that trains: {possible}; "
            "`thriftnet recalibrate` does the other"
        )
    rest = {path: value for path, value in stated.items() if path != "stages"}
    needs = {} if name == names[0] else {"needs": [*stated.get("needs", ()), "model"]}
    return {**rest, **stated["stages"][names.index(name)], **needs}


def _with_stage_field(stages: list[dict[str, Any]], name: str, value: Any) -> list[dict[str, Any]]:
    _, number, path = (*name.split(".", 2), "")[:3]
    if not path or number not in map(str, range(1, len(stages) + 1)):
        raise ConfigError(
            f"{name}: expected stages.N.FIELD with N from 1 to {len(stages)}"
            if stages
            else f"{name}: the recipe has no stages to number; give the field itself, as lr=0.05 or --lr 0.05"
        )
    entry = stages[int(number) - 1]
    changed = dict(entry)
    for leaf, item in ({path: value} if path.startswith("recalibrate.") else _flat({path: value})).items():
        mapping, _, key = leaf.rpartition(".")
        changed |= {leaf: item} if leaf in field_names() else {mapping: {**entry.get(mapping, {}), key: item}}
    return [_flat_stage(changed) if each is entry else each for each in stages]


@functools.cache
def _parser() -> Any:
    """Checks and converts the values of all fields by their types."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recipe)
    return parser


def _in_one_line(message: str) -> str:
    """jsonargparse's error as one line."""
    text = " ".join(message.split())
    found = re.match(r'Parser key "([^"]+)": (.*)', text)
    if found is None:
        return text
    name, problem = found.groups()
    union = re.match(
        r"Does not validate against any of the Union subtypes Subtypes: \[(.*?)\] Errors: .* Given value: (.*)", problem
    )
    single = re.match(r"Expected a (.*)\. Got value: (.*)", problem)
    if union or single:
        expected, got = (union or single).groups()  # type: ignore[union-attr]
        kinds = re.sub(r"<class '(\w+)'>|typing\.Literal\[([^]]*)\]", r"\1\2", expected)
        for kind, words in IN_WORDS.items():
            kinds = kinds.replace(kind, words)
        return f"{name}={got!r}: expected {kinds}"
    return f"{name}: {problem}"
