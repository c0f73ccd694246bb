"""A recipe: everything that decides how a network is trained, as plain data.

Recipes are YAML files of these fields. Those shipped with the package lie in ``train/recipes``; a path to a file of your own
is taken, too. Each field can be replaced on the command line (``--lr 0.05``) or in Python (``load_recipe(name, lr=0.05)``).
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from thriftnet.errors import ConfigError, unknown_name

PRECISIONS = ("fp32", "bf16", "fp16")
SCHEDULES = ("constant", "multistep", "cosine", "piecewise")
CHOICES: dict[str, tuple[str, ...]] = {
    "precision": PRECISIONS,
    "schedule": SCHEDULES,
    "schedule_per": ("step", "epoch"),
    "memory_format": ("auto", "contiguous", "channels_last"),
    "select_on": ("val", "test", "last"),
    "on_nan": ("stop", "skip"),
    "on_corrupt": ("error", "skip"),
}
NO_DECAY_KINDS = ("technique", "norm", "bias")
# fields that do not change what is computed: a resumed run may have others
RESUMABLE_FIELDS = (
    "about",
    "needs",
    "checkpoint_every",
    "keep_checkpoints",
    "trackers",
    "workers",
    "on_nan",
    "epochs",
    "max_steps",
)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train; each field is one line of a recipe file.

    Args:
        model: The network: any name that ``--model`` takes.
        model_kwargs: For the function that builds it; classes and channels follow from the data.
        technique: Applied before training, as ``soft-sharing(templates=2)``; several are applied in this order.
        select: Regular expression on the layers that the techniques may take.
        stage: What one step does: ``auto`` (all widths of a slimmable network, else the plain step), or a name of
            `thriftnet.train.stages.STAGES`.
        stage_options: Fields of the stage.
        stages: Instead: trainings after each other, each a mapping of the fields in which it differs, with ``stage``, or with
            ``recalibrate`` (fields of `thriftnet.recalibrate`) for fresh norm statistics.
        epochs: Passes over the training images.
        max_steps: Instead: optimizer steps; the schedule spans them.
        batch_size: Images per step and process.
        total_batch_size: Instead: images per optimizer step over all processes; what papers state.
        drop_last: Whether a last, smaller batch is left out; with mixup it always is.
        accumulate: Batches whose gradients are added up for one optimizer step.
        optimizer: ``sgd``, ``adamw``, or another name of timm's.
        lr: Learning rate, at the schedule's factor 1.
        momentum: Of SGD.
        nesterov: Whether SGD's momentum is Nesterov's.
        weight_decay: For all parameters but those spared.
        no_decay: Who is spared: ``technique`` (what the technique lists, as coefficients), ``norm``, ``bias``.
        clip_grad: Largest L2 norm of the gradient.
        reset_momentum_every_epoch: Start each epoch with a new optimizer, as the ShiftResNet authors' script did.
        schedule: ``constant``, ``multistep``, ``cosine`` or ``piecewise``.
        milestones: For ``multistep``: epoch (from 0) -> factor applied from then on.
        points: For ``piecewise``: epoch -> factor, straight lines between.
        schedule_per: Whether the learning rate moves each step or each epoch.
        warmup_epochs: Epochs from ``warmup_lr`` up to the schedule; for ``cosine``.
        warmup_lr: Learning rate at the first step of the warm-up.
        min_lr: Learning rate at the end, for ``cosine``.
        cooldown_epochs: Epochs at the end, at ``min_lr``, among ``epochs``; for ``cosine``.
        label_smoothing: Share of the target spread over all classes.
        mixup: Alpha of mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        mixup_switch: How often CutMix is taken where both are on.
        distill_weight: Share of the loss that compares with the teacher's outputs.
        distill_temperature: Softens both outputs.
        penalty: Factor on the technique's own penalty, which its config has scaled already.
        ema_decay: Of an average of the weights over steps; 0 for none. What is evaluated and saved is the average.
        ema_warmup: Let the average forget the beginning: in step n its decay is at most (1 + n) / (10 + n).
        augmentation: Fields of `thriftnet.data.transforms.Augmentation`; mean and std follow from the data if not given.
        precision: ``fp32``, ``bf16`` or ``fp16`` (autocast).
        memory_format: ``auto`` times both for a few steps.
        compile: Whether to compile the network with ``torch.compile``.
        sync_batchnorm: Whether batch norms take their statistics over all processes.
        find_unused_parameters: For networks of which a step leaves parameters unused; needed with several processes only.
        validation: Share of the training images kept for choosing the best network.
        select_on: ``val``, ``last`` for none, or ``test`` as some papers did (which flatters the result).
        evaluate_every: Epochs between evaluations.
        seed: Of weights, order and augmentation.
        workers: Processes that decode images, for data not held in memory.
        resident: Whether all images are held on the device; left out, where they are of one size and small.
        checkpoint_every: Optimizer steps between checkpoints; 0 for one at the end of each epoch only.
        keep_checkpoints: How many of the newest are kept.
        on_nan: Whether a loss that is no number stops the training or skips the step.
        on_corrupt: Whether an image that cannot be read stops the training or is left out.
        trackers: Of Accelerate, as ``tensorboard``, ``wandb``, ``mlflow``; those not installed are left out.
        needs: Options that must be given on the command line, as ``model`` for a recipe that starts from a trained network.
        about: Paper, table row, expected accuracy, parameters, hardware, time.
    """

    model: str = "resnet20"
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    technique: tuple[str, ...] = ()
    select: str | None = None
    stage: str = "auto"
    stage_options: dict[str, Any] = field(default_factory=dict)
    stages: tuple[dict[str, Any], ...] = ()
    epochs: int = 10
    max_steps: int | None = None
    batch_size: int = 128
    total_batch_size: int | None = None
    drop_last: bool = False
    accumulate: int = 1
    optimizer: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    no_decay: tuple[str, ...] = ("technique",)
    clip_grad: float | None = None
    reset_momentum_every_epoch: bool = False
    schedule: str = "cosine"
    milestones: dict[int, float] = field(default_factory=dict)
    points: dict[float, float] = field(default_factory=dict)
    schedule_per: str = "step"
    warmup_epochs: float = 0.0
    warmup_lr: float = 0.0
    min_lr: float = 0.0
    cooldown_epochs: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_switch: float = 0.5
    distill_weight: float = 0.5
    distill_temperature: float = 4.0
    penalty: float = 1.0
    ema_decay: float = 0.0
    ema_warmup: bool = False
    augmentation: dict[str, Any] = field(default_factory=dict)
    precision: str = "fp32"
    memory_format: str = "auto"
    compile: bool = False
    sync_batchnorm: bool = False
    find_unused_parameters: bool = False
    validation: float = 0.1
    select_on: str = "val"
    evaluate_every: int = 1
    seed: int = 0
    workers: int = 2
    resident: bool | None = None
    checkpoint_every: int = 0
    keep_checkpoints: int = 2
    on_nan: str = "stop"
    on_corrupt: Literal["error", "skip"] = "error"
    trackers: tuple[str, ...] = ("tensorboard",)
    needs: tuple[str, ...] = ()
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, possible in CHOICES.items():
            if getattr(self, name) not in possible:
                raise ConfigError(f"{name}={getattr(self, name)!r}: possible are {', '.join(possible)}")
        for name in self.no_decay:
            if name not in NO_DECAY_KINDS:
                raise unknown_name("entry of no_decay", name, NO_DECAY_KINDS)
        self._check_ranges()

    def _check_ranges(self) -> None:
        rules: tuple[tuple[str, tuple[str, ...], Callable[[Any], bool]], ...] = (
            ("at least 1", ("epochs", "batch_size", "accumulate", "evaluate_every", "keep_checkpoints"), lambda v: v >= 1),
            ("at least 1, or left out", ("max_steps", "total_batch_size"), lambda v: v is None or v >= 1),
            ("greater than 0", ("lr", "distill_temperature"), lambda v: 0 < v < math.inf),
            ("greater than 0, or left out", ("clip_grad",), lambda v: v is None or 0 < v < math.inf),
            ("in [0, 1)", ("momentum", "ema_decay", "label_smoothing", "validation"), lambda v: 0 <= v < 1),
            ("in [0, 1]", ("distill_weight", "mixup_switch"), lambda v: 0 <= v <= 1),
            (
                "at least 0",
                ("weight_decay", "warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs", "mixup", "cutmix", "penalty"),
                lambda v: 0 <= v < math.inf,
            ),
            ("at least 0", ("workers", "checkpoint_every", "seed"), lambda v: v >= 0),
        )
        for possible, names, fits in rules:
            for name in names:
                value = getattr(self, name)
                if not fits(value):
                    raise ConfigError(f"{name}={value!r}: possible is a number {possible}")
        if self.schedule == "multistep" and not self.milestones:
            raise ConfigError("schedule='multistep' needs milestones, as {82: 0.1, 123: 0.1}")
        if self.schedule == "piecewise" and len(self.points) < 2:
            raise ConfigError("schedule='piecewise' needs points, as {0: 0, 5: 1, 30: 0}")
        if self.select_on == "val" and not self.validation:
            raise ConfigError(
                "select_on='val' needs a share of the training images in validation; else take select_on='last'"
            )

    def replace(self, **fields: Any) -> Recipe:
        """The recipe with some fields replaced, each checked.

        Raises:
            ConfigError: An unknown field, with close matches, or a value that it cannot have.
        """
        hints = get_type_hints(Recipe)
        for name in fields:
            if name not in hints:
                raise unknown_name("recipe field", name, hints)
        return dataclasses.replace(self, **{name: _typed(name, value, hints[name]) for name, value in fields.items()})

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `recipe_from` reads it."""
        return dataclasses.asdict(self)


def recipe_from(fields: Mapping[str, Any]) -> Recipe:
    """A recipe from plain data, as read from YAML or JSON.

    Raises:
        ConfigError: Unknown fields, or values that they cannot have.
    """
    return Recipe().replace(**fields)


def list_recipes() -> list[str]:
    """Names of the recipes shipped with the package."""
    folder = importlib.resources.files("thriftnet.train") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_recipe(name: str, **fields: Any) -> Recipe:
    """The recipe of that name, or in that file.

    Args:
        name: One of `list_recipes`, or the path of a YAML file.
        fields: Replace those of the recipe, in each of its stages.

    Raises:
        ConfigError: No such recipe or field, with close matches, or a file that cannot be read.
    """
    return recipe_from(with_fields(read_recipe(name), fields))


def with_fields(stated: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe file states, with fields replaced; they hold for stages that state others, too.

    Raises:
        ConfigError: A field that says what a stage does, for a recipe of several.
    """
    stages = stated.get("stages") or ()
    if not stages or "stages" in fields:
        return {**stated, **fields}
    for name in ("stage", "stage_options"):
        if name in fields:
            raise ConfigError(
                f"{name} of a recipe with several stages belongs to one of them: say stages.{len(stages)}.{name}"
            )
    kept = [{name: value for name, value in part.items() if name not in fields} for part in stages]
    return {**stated, **fields, "stages": kept}


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
        raise ConfigError(f"{name} is no recipe: it must be a mapping of fields, as 'lr: 0.1'")
    return stated


def _typed(name: str, value: Any, hint: Any) -> Any:
    """A value as its field's type, where nothing is lost: lists as tuples, whole numbers as floats."""
    if get_origin(hint) is Literal:
        hint = str
    options = get_args(hint) if get_origin(hint) not in (dict, tuple) else ()
    if options:
        if value is None:
            return None
        hint = next(option for option in options if option is not type(None))
    origin = get_origin(hint) or hint
    if origin is tuple and isinstance(value, str):
        return (value,)
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(value)
    if origin is dict and isinstance(value, Mapping):
        key_type = get_args(hint)[0]
        return {_typed(name, key, key_type): item for key, item in value.items()}
    if origin is float and isinstance(value, str):
        value = _number(value)
    if origin is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{name}={value!r}: possible is {getattr(hint, '__name__', str(hint))}")


def _number(text: str) -> float | str:
    """YAML reads 5e-4 as text."""
    try:
        return float(text)
    except ValueError:
        return text
