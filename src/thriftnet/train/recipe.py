"""Recipes: how a network is trained, as plain data.

A recipe is a YAML file of the fields below, in their groups: one of ``train/recipes``, or your own. Each field can be replaced, in
Python (``load_recipe(name, lr=0.05)``) and on the command line (``--lr 0.05``), by its full name, ``optimizer.lr``, or by the last
part of it where only one group has such a field.
"""

from __future__ import annotations

import copy
import functools
import importlib.resources
import math
import re
from argparse import ArgumentError
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

from thriftnet.data.augmentation import Augmentation
from thriftnet.errors import ConfigError, unknown_name

RANGES: dict[str, Callable[[float], bool]] = {
    ">= 0": lambda value: 0 <= value < math.inf,
    ">= 1": lambda value: 1 <= value < math.inf,
    "> 0": lambda value: 0 < value < math.inf,
    "in [0, 1)": lambda value: 0 <= value < 1,
    "in [0, 1]": lambda value: 0 <= value <= 1,
}
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
)
MAPPINGS = ("model_kwargs", "about", "stage.options")  # of values of any type
LISTS = ("technique", "needs", "optimizer.no_decay", "run.trackers")  # one entry may be written without brackets
RECALIBRATION = ("widths", "indices", "momentum", "batches")


def number(default: float | None, expected: str) -> Any:
    """A field for a number in one of the `RANGES`, or its default None."""
    return field(default=default, metadata={"expected": expected})


@dataclass(frozen=True, kw_only=True)
class Group:
    """Fields whose ranges are checked."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value, expected = getattr(self, each.name), each.metadata.get("expected")
            if expected is not None and value is not None and not RANGES[expected](value):
                raise ConfigError(f"{each.name}={value!r}: expected a number {expected}")


@dataclass(frozen=True, kw_only=True)
class DataFields(Group):
    """How images are read.

    Args:
        batch_size: Images per optimizer step, over all processes and accumulated batches.
        drop_last: Whether to drop a last, smaller batch; mixup always does.
        workers: Processes that decode images, for data not held in memory.
        resident: Whether all images are held on the device; by default if they are small and of equal size.
        on_corrupt: Whether an image that cannot be decoded stops the training or is left out.
    """

    batch_size: int = number(128, ">= 1")
    drop_last: bool = False
    workers: int = number(2, ">= 0")
    resident: bool | None = None
    on_corrupt: Literal["error", "skip"] = "error"


@dataclass(frozen=True, kw_only=True)
class OptimizerFields(Group):
    """The optimizer, and the average of the weights.

    Args:
        name: ``sgd``, ``adamw``, or another name of timm's.
        lr: Learning rate at factor 1 of the schedule.
        momentum: Of SGD.
        nesterov: Nesterov momentum for SGD.
        weight_decay: For all parameters except those of ``no_decay``.
        no_decay: Parameters without weight decay: ``technique`` (what the technique lists, as coefficients), ``norm``, ``bias``.
        clip_grad: Largest L2 norm of the gradient.
        accumulate: Batches whose gradients are added up for one optimizer step.
        reset_momentum_every_epoch: Start each epoch with a new optimizer, as the ShiftResNet authors' script did.
        ema_decay: Decay of an average of the weights over steps, which is evaluated and saved; 0 for none.
        ema_warmup: Forget the first weights sooner: in step n the decay is at most (1 + n) / (10 + n).
    """

    name: str = "sgd"
    lr: float = number(0.1, "> 0")
    momentum: float = number(0.9, "in [0, 1)")
    nesterov: bool = True
    weight_decay: float = number(5e-4, ">= 0")
    no_decay: tuple[Literal["technique", "norm", "bias"], ...] = ("technique",)
    clip_grad: float | None = number(None, "> 0")
    accumulate: int = number(1, ">= 1")
    reset_momentum_every_epoch: bool = False
    ema_decay: float = number(0.0, "in [0, 1)")
    ema_warmup: bool = False


@dataclass(frozen=True, kw_only=True)
class ScheduleFields(Group):
    """The learning rate over the training.

    Args:
        name: ``constant``, ``multistep``, ``cosine`` or ``piecewise``.
        milestones: For ``multistep``: epoch (from 0) -> factor applied from then on.
        points: For ``piecewise``: epoch -> factor, straight lines between.
        per: Whether the learning rate changes each step or each epoch.
        warmup_epochs: Epochs from ``warmup_lr`` to the schedule; for ``cosine``.
        warmup_lr: Learning rate at the first step of the warm-up.
        min_lr: Learning rate at the end, for ``cosine``.
        cooldown_epochs: Epochs at the end, at ``min_lr``, among ``epochs``; for ``cosine``.
    """

    name: Literal["constant", "multistep", "cosine", "piecewise"] = "cosine"
    milestones: dict[int, float] = field(default_factory=dict)
    points: dict[float, float] = field(default_factory=dict)
    per: Literal["step", "epoch"] = "step"
    warmup_epochs: float = number(0.0, ">= 0")
    warmup_lr: float = number(0.0, ">= 0")
    min_lr: float = number(0.0, ">= 0")
    cooldown_epochs: float = number(0.0, ">= 0")

    def __post_init__(self) -> None:
        super().__post_init__()
        try:  # JSON has text for keys
            object.__setattr__(self, "points", {float(epoch): factor for epoch, factor in self.points.items()})
        except ValueError:
            raise ConfigError(f"points={self.points!r}: expected epoch -> factor, as {{0: 0, 5: 1, 30: 0}}") from None
        if self.name == "multistep" and not self.milestones:
            raise ConfigError("schedule='multistep' needs milestones, as {82: 0.1, 123: 0.1}")
        if self.name == "piecewise" and len(self.points) < 2:
            raise ConfigError("schedule='piecewise' needs points, as {0: 0, 5: 1, 30: 0}")


@dataclass(frozen=True, kw_only=True)
class LossFields(Group):
    """The loss.

    Args:
        label_smoothing: Share of the target spread over all classes.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        mixup_switch: Probability of CutMix where both are on.
        distill_weight: Share of the loss on the teacher's outputs.
        distill_temperature: Temperature of both outputs.
        penalty: Factor on the technique's penalty, beside that of its config.
    """

    label_smoothing: float = number(0.0, "in [0, 1)")
    mixup: float = number(0.0, ">= 0")
    cutmix: float = number(0.0, ">= 0")
    mixup_switch: float = number(0.5, "in [0, 1]")
    distill_weight: float = number(0.5, "in [0, 1]")
    distill_temperature: float = number(4.0, "> 0")
    penalty: float = number(1.0, ">= 0")


@dataclass(frozen=True, kw_only=True)
class StageFields(Group):
    """What one optimizer step does.

    Args:
        name: ``auto`` (all widths of a slimmable network, else the plain step), or a name of `thriftnet.train.stages.STAGES`.
        options: Options of the stage.
    """

    name: str = "auto"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunFields(Group):
    """How the training runs, which network it keeps, and what it writes.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16`` (autocast).
        memory_format: Of weights and images: ``contiguous`` or ``channels_last``.
        compile: Whether to compile the network with ``torch.compile``.
        find_unused_parameters: DDP's option, for networks in which a step leaves parameters without a gradient.
        select_on: Which network is kept: the best on ``val``, the ``last``, or the best on ``test``, as some papers did (which
            flatters the result).
        validation: Share of the training images held out for ``select_on: val``.
        evaluate_every: Epochs between evaluations.
        checkpoint_every: Optimizer steps between checkpoints; 0 for one at the end of each epoch only.
        keep_checkpoints: How many of the newest are kept.
        on_nan: Whether a loss that is not finite stops the training or skips the step.
        trackers: Accelerate's trackers, as ``tensorboard``, ``wandb``, ``mlflow``; those not installed are skipped.
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    memory_format: Literal["contiguous", "channels_last"] = "contiguous"
    compile: bool = False
    find_unused_parameters: bool = False
    select_on: Literal["val", "test", "last"] = "val"
    validation: float = number(0.1, "in [0, 1)")
    evaluate_every: int = number(1, ">= 1")
    checkpoint_every: int = number(0, ">= 0")
    keep_checkpoints: int = number(2, ">= 1")
    on_nan: Literal["stop", "skip"] = "stop"
    trackers: tuple[str, ...] = ("tensorboard",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.select_on == "val" and not self.validation:
            raise ConfigError(
                "select_on='val' needs a share of the training images in validation; otherwise set select_on='last'"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe(Group):
    """How to train.

    Args:
        model: The network: any name that ``--model`` takes.
        model_kwargs: For the function that builds it; classes and channels follow from the data.
        technique: Applied before training, as ``soft-sharing(templates=2)``; several are applied in this order.
        select: Regular expression on the layers that the techniques may convert.
        epochs: Passes over the training images.
        max_steps: Instead: optimizer steps; the schedule spans them.
        seed: Of weights, order and augmentation.
        data: How images are read.
        augmentation: What is done to them, as `thriftnet.data.augmentation.Augmentation`; mean and std default to the data's.
        optimizer: The optimizer, and the average of the weights.
        schedule: The learning rate over the training.
        loss: The loss.
        stage: What one optimizer step does.
        run: How the training runs, which network it keeps, and what it writes.
        stages: Instead of one training, several of the same network: for each the fields in which it differs, with ``stage``, or with
            ``recalibrate`` (arguments of `thriftnet.recalibrate`) to recompute norm statistics.
        needs: Options that must be given on the command line, as ``model`` for a recipe that starts from a trained network.
        about: Paper, table row, expected accuracy, parameters, hardware, time.
    """

    model: str = "resnet20"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    technique: tuple[str, ...] = ()
    select: str | None = None
    epochs: int = number(10, ">= 1")
    max_steps: int | None = number(None, ">= 1")
    seed: int = number(0, ">= 0")
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
    folder = importlib.resources.files("thriftnet.train") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


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

    path = Path(name)
    try:
        if path.suffix in (".yaml", ".yml"):
            text = path.read_text()
        elif name in list_recipes():
            text = (importlib.resources.files("thriftnet.train") / "recipes" / f"{name}.yaml").read_text()
        else:
            raise unknown_name("recipe", name, list_recipes())
        stated = yaml.safe_load(text)
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
    for path, value in flat.items():
        *above, last = path.split(".")
        place = nested
        for name in above:
            place = place.setdefault(name, {})
        place[last] = copy.deepcopy(value)
    stages = tuple(nested.pop("stages", ()))
    kwargs, about = nested.pop("model_kwargs", {}), nested.pop("about", {})
    options = nested.get("stage", {}).pop("options", {})
    for name, value in zip(MAPPINGS, (kwargs, about, options), strict=True):
        if not isinstance(value, dict):
            raise ConfigError(f"{name}={value!r}: expected a mapping")
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
            raise unknown_name("recipe field", name, {*last_names(), *GROUPS})
        if path == "stages":
            flat[path] = [_flat_stage(entry) for entry in value]
        elif path in LISTS and isinstance(value, str) and not value.startswith("["):
            flat[path] = [value]
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


def _flat_stage(entry: Any) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise ConfigError(f"stages: expected a list of mappings, got {entry!r}")
    flat = _flat({name: value for name, value in entry.items() if name != "recalibrate"})
    if ("stage.name" in flat) == ("recalibrate" in entry):
        raise ConfigError(f"a stage of a recipe has either a field stage or a field recalibrate, got {sorted(entry)}")
    if "recalibrate" not in entry:
        return flat
    for name in entry["recalibrate"]:
        if name not in RECALIBRATION:
            raise unknown_name("option of recalibrate", name, RECALIBRATION)
    return {"recalibrate": dict(entry["recalibrate"]), **flat}


def _replaced(stated: dict[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """With fields replaced, in all stages; ``stages.2.lr`` is that of the second only."""
    for_all = _flat({name: value for name, value in fields.items() if not name.startswith("stages.")})
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


def _with_stage_field(stages: list[dict[str, Any]], name: str, value: Any) -> list[dict[str, Any]]:
    _, number, path = (*name.split(".", 2), "")[:3]
    if not path or number not in map(str, range(1, len(stages) + 1)):
        raise ConfigError(
            f"{name}: expected stages.N.FIELD with N from 1 to {len(stages)}"
            if stages
            else f"{name}: the recipe has no stages to number; give the field itself, as lr=0.05 or --lr 0.05"
        )
    entry = stages[int(number) - 1]
    head, _, option = path.partition(".")
    own = {"recalibrate": {**entry.get("recalibrate", {}), option: value}} if head == "recalibrate" else {}
    for leaf, item in ({} if own else _flat({path: value})).items():
        mapping, _, key = leaf.rpartition(".")
        own |= {leaf: item} if leaf in field_names() else {mapping: {**entry.get(mapping, {}), key: item}}
    return [_flat_stage({**entry, **own}) if each is entry else each for each in stages]


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
        kinds = re.sub(r"<class '(\w+)'>|typing\.Literal\[([^]]*)\]", r"\1\2", expected).replace(", NoneType", " or null")
        return f"{name}={got!r}: expected {kinds}"
    return f"{name}: {problem}"
