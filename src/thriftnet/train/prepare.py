"""What a training starts from: the network for the data, random states, and the run that a folder holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from thriftnet.core.tied import unique_tensors
from thriftnet.data.dataset import DataSource
from thriftnet.data.transforms import Augmentation
from thriftnet.errors import CheckpointError, ConfigError, unknown_name
from thriftnet.models.table import NAMES, normalize_name
from thriftnet.resolve import open_model
from thriftnet.store.model_file import save
from thriftnet.techniques import convert
from thriftnet.train.recipe import RESUMABLE_FIELDS, Recipe

Size = tuple[int, int, int]


def prepare_model(recipe: Recipe, source: DataSource, size: Size, model: nn.Module | None) -> nn.Module:
    """The recipe's network (or yours) for the classes and channels of the data, converted by the recipe's techniques.

    Raises:
        ConfigError: No such network, or one that does not fit the data.
    """
    if model is None:
        model = open_model(recipe.model, **fitting_kwargs(recipe, source, size))
    check_classes(model, source, size, recipe.model)
    for technique in recipe.technique:
        model = convert(model, technique, select=recipe.select)
    return model


def input_size(augmentation: Augmentation, source: DataSource) -> Size:
    """Channels, height and width that a network is given.

    Raises:
        ConfigError: The images differ in size, and the augmentation does not bring them to one.
    """
    stored, wanted = source.input_size, augmentation.image_size
    channels = len(augmentation.normalisation()[0])
    if wanted is not None:
        return channels, wanted, wanted
    if stored is None:
        raise ConfigError(
            f"the images of {source.spec} differ in size: say to which to bring them, as --augmentation.image_size 224"
        )
    return stored


def fitting_kwargs(recipe: Recipe, source: DataSource, size: Size) -> dict[str, Any]:
    """The recipe's arguments for its network, with classes and channels of the data where it does not state them."""
    kwargs = dict(recipe.model_kwargs)
    origin, colon, _ = recipe.model.partition(":")
    if normalize_name(recipe.model) in NAMES or (colon and origin in ("timm", "torchvision")):
        kwargs.setdefault("num_classes", len(source.classes))
    if size[0] != 3 and (normalize_name(recipe.model) in NAMES or origin == "timm"):
        kwargs.setdefault("in_chans", size[0])
    return kwargs


@torch.no_grad()
def check_classes(model: nn.Module, source: DataSource, size: Size, name: str) -> None:
    """One image through the network.

    Raises:
        ConfigError: It does not take such images, or has other classes than the data.
    """
    like = next(model.parameters(), torch.zeros(()))
    training = model.training
    try:
        outputs = model.eval()(torch.zeros(1, *size, device=like.device, dtype=like.dtype))
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name} does not take images of {size[0]} x {size[1]} x {size[2]}: {problem}") from None
    finally:
        model.train(training)
    if not isinstance(outputs, torch.Tensor) or outputs.shape != (1, len(source.classes)):
        found = tuple(outputs.shape[1:]) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise ConfigError(
            f"{name} gives {found} outputs, {source.spec} has {len(source.classes)} classes: give num_classes={len(source.classes)}"
        )


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's random numbers."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def augmentation_from(fields: Mapping[str, Any]) -> Augmentation:
    """The augmentation that a recipe states.

    Raises:
        ConfigError: An unknown field, with close matches, or a value that is not possible.
    """
    known = {field.name for field in dataclasses.fields(Augmentation)}
    for name in fields:
        if name not in known:
            raise unknown_name("augmentation field", name, known)
    try:
        return Augmentation(**fields)
    except TypeError as error:
        raise ConfigError(f"augmentation {dict(fields)}: {error}") from None


def read_run(path: Path) -> dict[str, Any] | None:
    """What the folder's training is; None for a folder without one.

    Raises:
        ConfigError: It cannot be read.
    """
    try:
        stored = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read ({error}): give another --output") from None
    if not isinstance(stored, dict) or not isinstance(stored.get("recipe"), dict):
        raise ConfigError(f"{path} is not of a training: give another --output")
    return stored


def compare_runs(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> list[str]:
    """Notes on harmless differences between the training that a folder holds and the one wanted.

    Raises:
        ConfigError: They differ in what is computed.
    """
    wanted = json.loads(json.dumps(wanted, default=str))
    before, now = dict(stored["recipe"]), dict(wanted["recipe"])
    differing = {name: (before.get(name), now[name]) for name in now if before.get(name) != now[name]}
    differing |= {
        name: (stored.get(name), wanted[name]) for name in wanted if name != "recipe" and stored.get(name) != wanted[name]
    }
    fatal = {name: pair for name, pair in differing.items() if name not in RESUMABLE_FIELDS}
    if fatal:
        words = "; ".join(f"{name} was {old!r}, is {new!r}" for name, (old, new) in fatal.items())
        raise ConfigError(f"{folder} holds another training: {words}. Give another --output, or the settings it began with")
    return [
        f"{name} was {old}, is {new}: the schedule is that of the new length from here on"
        for name, (old, new) in differing.items()
        if name in ("epochs", "max_steps")
    ]


def save_trained(
    model: nn.Module, folder: Path, source: DataSource, augmentation: Augmentation, size: Size, metrics: Mapping[str, Any]
) -> None:
    """Save a trained network with what its users need to know."""
    mean, std = augmentation.normalisation()
    facts: dict[str, Any] = {
        "input_size": list(size),
        "normalisation": {"mean": list(mean), "std": list(std)},
        "class_names": list(source.classes),
        "resize": augmentation.resize,
        "crop_pct": augmentation.crop_pct,
        "eval_interpolation": augmentation.eval_interpolation,
        "data": source.spec,
    }
    numbers = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    save(model, folder, metadata={**facts, "metrics": numbers})


def load_kept(model: nn.Module, folder: Path) -> None:
    """Put the weights of a saved network into one of the same form."""
    from safetensors.torch import load_file

    stored = load_file(folder / "model.safetensors")
    if stored.keys() != unique_tensors(model).keys():
        raise CheckpointError(f"{folder} does not fit the network that was trained")
    model.load_state_dict(stored, strict=False)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of all tensors with their names, shared ones once."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unique_tensors(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(
            tensor.cpu().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
