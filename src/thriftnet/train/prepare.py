"""Before a training: the network for the data, and seeds."""

from __future__ import annotations

import dataclasses
import hashlib
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from thriftnet.core.fold import is_foldable
from thriftnet.core.head import note_on, outputs
from thriftnet.core.probe import Size
from thriftnet.core.provenance import data_facts
from thriftnet.core.tied import unique_tensors
from thriftnet.core.width import eval_mode
from thriftnet.data.augmentation import Augmentation
from thriftnet.data.dataset import DataSource
from thriftnet.errors import ConfigError
from thriftnet.models.table import IDENTITY, MODELS, is_zoo_name, model_kwargs
from thriftnet.resolve import network_name, open_model
from thriftnet.techniques import convert, resolve
from thriftnet.train.recipe import Recipe


def input_size(recipe: Recipe, source: DataSource) -> Size:
    """Channels, height and width of the network's input."""
    stored, fields = source.input_size, recipe.augmentation
    size = stored
    if fields.image_size is not None:
        size = (len(fields.for_source(source).normalisation()[0]), fields.image_size, fields.image_size)
    if size is None:
        raise ConfigError(f"the images of {source.spec} differ in size: give the one to resize to, as --image-size 224")
    for name in ("cutout", "crop_padding"):
        if getattr(fields, name) > min(size[1:]):
            raise ConfigError(f"{name}={getattr(fields, name)} is more than the side of the images, {size[1]} x {size[2]}")
    return size


def augmentation_for(model: nn.Module, recipe: Recipe, source: DataSource) -> Augmentation:
    """The recipe's, normalising as a network that was trained before did, else as suits the data, where it does not say."""
    fields, known = recipe.augmentation, data_facts(model).normalisation
    if known is not None and fields.mean is None and fields.std is None and len(known["mean"]) == len(source.mean):
        return dataclasses.replace(fields, mean=known["mean"], std=known["std"])
    return fields.for_source(source)


def prepare_model(
    recipe: Recipe, source: DataSource, model: nn.Module | None = None, note: Callable[[str], object] = lambda text: None
) -> nn.Module:
    """The recipe's network (or yours) for the classes and channels of the data, converted by the recipe's techniques.

    A network that is converted already stays as it is, unless the recipe says ``convert_again``; ``note`` is called with that.

    Raises:
        ConfigError: No such network, or one that does not fit the data.
    """
    size = input_size(recipe, source)
    if model is None:
        kwargs = dict(recipe.model_kwargs)
        name = network_name(recipe.model, kwargs, size, str(recipe.about.get("paper", "")))
        in_zoo = name in MODELS and not Path(name).exists()
        if in_zoo and "seed" in model_kwargs(name):
            kwargs.setdefault("seed", recipe.seed)
        if in_zoo or recipe.model.startswith(("timm:", "torchvision:")):
            kwargs.setdefault("num_classes", len(source.classes))
        if size[0] != 3 and (in_zoo or recipe.model.startswith("timm:")):
            kwargs.setdefault("in_chans", size[0])
        model = open_model(name, **kwargs)
    check_classes(model, source, size, recipe.model)
    if recipe.technique and not recipe.convert_again and any(is_foldable(module) for module in model.modules()):
        techniques = ", ".join(recipe.technique)
        note(
            f"the network is converted already: the recipe's {techniques} is not applied on top. --technique '{techniques}' does"
        )
        return model
    for text in recipe.technique:
        technique: Any = resolve(text)
        if getattr(technique, "seed", 0) is None:
            technique = dataclasses.replace(technique, seed=recipe.seed)
        model = convert(model, technique, select=recipe.select)
    return model


def notes_on(recipe: Recipe, model: nn.Module, *, given: bool) -> list[str]:
    """For the user: a new classifier, and which network the recipe's name meant, unless the network was given."""
    notes = [note] if (note := note_on(model)) else []
    built = getattr(model, IDENTITY, {}).get("name", recipe.model)
    if not given and is_zoo_name(recipe.model) and built in MODELS and built != recipe.model:
        notes.append(f"{recipe.model} is {built} in this training")
    return notes


def with_classes_of(teacher: nn.Module | None, source: DataSource, parts: Sequence[Recipe]) -> DataSource:
    """The data, where it has no labels with the classes of the teacher: whatever looks at labels is refused.

    Raises:
        DataError: Images without labels, for something that needs them.
    """
    if source.labelled:
        return source
    if teacher is None:
        source.require_labels("a training without a teacher")
    elif len(parts) > 1 or parts[0].stage.name == "gate":
        source.require_labels("a training of gates, or of several stages,")
    elif parts[0].loss.distill_weight < 1:
        source.require_labels(f"the loss at distill_weight={parts[0].loss.distill_weight:g}")
    names = data_facts(cast(nn.Module, teacher)).class_names
    return dataclasses.replace(source, classes=tuple(names or map(str, range(outputs(cast(nn.Module, teacher))))))


@torch.no_grad()
def check_classes(model: nn.Module, source: DataSource, size: Size, name: str) -> None:
    """Run the network on one image; refuse one that does not take it, or has other classes than the data."""
    like = next(model.parameters(), torch.zeros(()))
    try:
        with eval_mode(model):
            logits = model(torch.zeros(1, *size, device=like.device, dtype=like.dtype))
    except RuntimeError as error:
        problem = " ".join(str(error).split())[:200]
        raise ConfigError(f"{name} does not take images of {size[0]} x {size[1]} x {size[2]}: {problem}") from None
    if not isinstance(logits, torch.Tensor) or logits.shape != (1, len(source.classes)):
        found = tuple(logits.shape[1:]) if isinstance(logits, torch.Tensor) else type(logits).__name__
        count = len(source.classes)
        raise ConfigError(
            f"{name} gives {found} outputs, {source.spec} has {count} classes: give num_classes={count} (--num-classes {count})"
        )


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's random numbers."""
    import numpy as np

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def weights_hash(model: nn.Module) -> str:
    """SHA-256 of all tensors with their names, shared ones once."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unique_tensors(model).items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(
            tensor.cpu().reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
