"""Our model file: a safetensors file that also holds what rebuilds the network. No pickle.

The tensors are there once, each under its first name; the header's metadata holds the config as JSON, which begins with a
checksum over the whole file. Beside it in a folder, `config.json` and `README.md` repeat the config for people and
for the Hub; nothing here reads them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thriftnet.arguments import as_path, checked
from thriftnet.core.convert import convert, tie
from thriftnet.core.fold import fold, freeze
from thriftnet.core.head import replace_head
from thriftnet.core.history import HISTORY, history
from thriftnet.core.plan import Plan
from thriftnet.core.provenance import add_data_facts
from thriftnet.core.tied import EXTRA_STATE, first_names, unique_tensors
from thriftnet.core.width import set_width
from thriftnet.core.wrappers import unwrapped
from thriftnet.dynamic.add_gate import add_gate
from thriftnet.errors import CheckpointError, ConfigError, ThriftnetError
from thriftnet.files import TEMPORARY, open_regular, write_together
from thriftnet.kernels.pack import pack
from thriftnet.models.table import IDENTITY
from thriftnet.store import sealed, shapes
from thriftnet.store.builders import build, candidates
from thriftnet.store.card import model_card
from thriftnet.store.config import CARD, CONFIG, MODEL, Config, check_sizes, describe, identity_of, parse_config
from thriftnet.store.hub import HUB, download
from thriftnet.techniques import resolve

# of a training: what it is, the folder of its network in its own, and what it says of itself at the end
RUN, RUN_MODEL, FINISHED = "run.json", "model", "finished"


@checked
def save(model: nn.Module, folder: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a network to a folder, so that `load` gives it back bit by bit, at the width it has now.

    Each file is replaced in one step: whenever the process dies, the old or the new network is there. Other files in the
    folder stay; a folder of something else is not touched.

    Args:
        model: Any network; one that was not built by name needs its plain form again when loaded. Of a compiled network,
            or one wrapped for training on several devices, the inner one is saved.
        folder: Where to; an earlier network there is replaced.
        metadata: JSON-ready facts to keep. ``metrics`` (numbers by name) and the facts about the data, which override what
            the network knows (`thriftnet.core.provenance.DataFacts`), are checked; others are kept as they are.

    Returns:
        The folder.

    Raises:
        CheckpointError: The folder holds something that is not a model, or cannot be written.
        ConfigError: Metadata that is not JSON, or a checked fact of another type.
    """
    place = check_place(folder)
    try:
        model = unwrapped(model)
        tensors = _separate(unique_tensors(model))
        _check_history(model)
        config = describe(model, metadata or {}, _identity(model))
        data = sealed.encode(config, tensors, MODEL)
        write_together(place, {MODEL: data, CONFIG: json.dumps(config, indent=2) + "\n", CARD: model_card(config)})
    except OSError as error:
        raise CheckpointError(f"cannot write {place}: {error.strerror or error}. What is there is whole") from error
    return place


def check_place(folder: str | os.PathLike[str]) -> Path:
    """The folder, if `save` may write to it; asked before hours of work whose result goes there.

    Raises:
        CheckpointError: It holds something that is not a model, or cannot be read.
    """
    place = as_path(folder, "folder")
    try:
        replaceable = _is_replaceable(place)
    except OSError as error:
        raise CheckpointError(f"cannot write {place}: {error.strerror or error}. What is there is whole") from error
    if not replaceable:
        raise CheckpointError(f"{place} exists and is no model folder: it is left alone. Give another place")
    return place


@checked
def load(source: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """The network that `save` wrote, in eval mode on the CPU, at the width it was saved at.

    Nothing is fitted again and the random state stays as it is. The file is opened once and its checksum is computed of the bytes
    that are loaded, so another process may replace it meanwhile.

    Args:
        source: A model folder, the model file itself, the folder of a training, or ``hf-hub:owner/name`` with an optional
            ``@revision``.
        model: The plain network, for one that was not built by name: the saved history is repeated on a copy of it.

    Raises:
        CheckpointError: No model, damaged, of a newer format, or not fitting the network.
    """
    if isinstance(source, str) and source.startswith(HUB):
        source = download(source)
    path = model_path(source)
    config, stored = read_model(path)
    if model is None and config["model"] is None:
        raise CheckpointError(
            f"{path} holds a {config['class']} that was not built by name, or was changed by other code: give its plain form, "
            "load(folder, model=...)"
        )
    check_sizes(config, sum(tensor.numel() for tensor in stored.values()), path)
    try:
        rebuilt = _skeleton(config, model)
        check_fit(rebuilt, stored, path)
        shapes.fill(rebuilt, stored)
        if shapes.unfilled(rebuilt):
            with torch.random.fork_rng(devices=[]):
                shapes.fill_rest(rebuilt, _plain(config) if model is None else model)
        for name, value in config["extra_state"].items():
            rebuilt.get_submodule(name.removesuffix(EXTRA_STATE).rstrip(".")).set_extra_state(value)
        if config["width"] is not None:
            set_width(rebuilt, config["width"])
        add_data_facts(rebuilt, config)
    except CheckpointError:
        raise
    except Exception as error:  # whatever a foreign config makes a network's own code raise
        kind = "" if isinstance(error, ThriftnetError) else f"{type(error).__name__} "
        raise CheckpointError(f"{path} cannot be rebuilt: {kind}{error}") from error
    return rebuilt.eval()


@checked
def read_config(source: str | os.PathLike[str]) -> Config:
    """The config of a model folder or file.

    Raises:
        CheckpointError: No model, damaged, or of a newer format.
    """
    path = model_path(source)
    return parse_config(sealed.verified(_content(path), path), path)


def model_path(source: str | os.PathLike[str]) -> Path:
    """The model file in a model folder, in the folder of a training, of its last finished stage or of a compression, or the file itself."""
    place = as_path(source, "source")
    if place.is_file():
        return place
    if (place / MODEL).exists():
        return place / MODEL
    if place.is_dir() and not (place / RUN).exists():
        stages = [path for path in place.iterdir() if path.name.partition("-")[0].isdecimal() and _is_finished(path / RUN)]
        place = max(stages, key=lambda stage: int(stage.name.partition("-")[0]), default=place)
    inside = place / RUN_MODEL / MODEL
    return inside if (place / RUN).exists() or inside.exists() else place / MODEL


def _is_finished(run: Path) -> bool:
    """Whether the training that wrote this file has ended; a `CheckpointError` if it is damaged."""
    try:
        return sealed.read_json(run).get(FINISHED) is True
    except OSError:
        return False


def is_model_file(path: Path) -> bool:
    """Whether a file begins as `save` writes it; an `OSError` if it cannot be read."""
    with open_regular(path) as file:
        return file.read(sealed.CHECKSUM.start).startswith(sealed.START, 8)


def replay(model: nn.Module, history: list[dict[str, Any]]) -> nn.Module:
    """Do to a plain network what was done to another."""
    before = getattr(model, HISTORY, [])
    model = model.eval()
    for step in history:
        verb = step.get("verb")
        if verb == "convert":
            planned = Plan.from_dict(step["plan"])
            model = convert(model, replace(planned, technique=resolve(planned.technique)), check=False)
        elif verb == "fold":
            if step.get("width") is not None:
                set_width(model, step["width"])
            model = fold(model, prefer=step.get("prefer", ""))
        elif verb == "freeze":
            model = freeze(model, **{name: value for name, value in step.items() if name != "verb"})
        elif verb == "add_gate":
            model = add_gate(model, step["after"])
        elif verb == "replace_head":
            model = replace_head(model, step["num_classes"])
        elif verb == "tie":
            model = tie(model, step["groups"])
        elif verb == "pack":
            model = pack(model, input_size=step["input_size"])
        else:
            raise ConfigError(
                f"unknown step {verb!r} in its history; expected add_gate, convert, fold, freeze, pack, replace_head or tie"
            )
        model = model.eval()
    setattr(model, HISTORY, [*before, *history])  # with the errors that were measured then
    return model


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path.parent} is no model folder: it has no {path.name}. Folders are written by thriftnet.save"
        ) from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None


def read_model(path: Path) -> tuple[Config, dict[str, Tensor]]:
    """The config and the tensors in a model file, its checksum verified.

    Raises:
        CheckpointError: No model, damaged, or of a newer format.
    """
    data = _content(path)
    return parse_config(sealed.verified(data, path), path), sealed.tensors_in(data, path)


def _skeleton(config: Config, plain: nn.Module | None) -> nn.Module:
    """The network with shapes and no values; where its plain form is not given, it is built by its name."""
    if plain is not None:
        plain = shapes.emptied(plain)
    else:
        try:
            with shapes.shapes_only():
                plain = _plain(config)
        except (
            NotImplementedError,
            ConfigError,
        ):  # it computes with numbers while it is built, as torchvision's RegNet does
            with torch.random.fork_rng(devices=[]):
                plain = shapes.emptied(_plain(config))
    with shapes.shapes_only():
        return replay(plain, config["history"])


def _plain(config: Config) -> nn.Module:
    return build(config["model"]["name"], config["model"]["kwargs"], trusted=False)


def _identity(model: nn.Module) -> Config | None:
    """How the plain form of a network is built: as it remembers, or as timm or torchvision builds it.

    Verified by building it and repeating the history: other code may have changed the network since.
    """
    wanted = {name: tensor.shape for name, tensor in first_names(model).items()}
    known = identity_of(model)
    for identity in candidates(model) if known is None else [known]:
        config = {"model": identity, "history": history(model)}
        try:
            rebuilt = _skeleton(config, None)
        except Exception:  # another network, on which these steps are impossible
            continue
        if {name: tensor.shape for name, tensor in first_names(rebuilt).items()} != wanted:
            continue
        if known is not None:
            return known
        if repr(rebuilt) == repr(model):
            setattr(model, IDENTITY, identity)
            return identity
    return None


def _check_history(model: nn.Module) -> None:
    """Refuse a network from which other code has taken converted layers: no plain network becomes it by its history."""
    first = next((step for step in history(model) if step["verb"] == "convert"), None)
    if first is None or first["plan"]["technique"].get("gate") or any(step["verb"] == "add_gate" for step in history(model)):
        return  # a gate gives the layers behind it other names
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    gone = next((name for row in first["plan"]["rows"] for name in row["names"] if name not in names), None)
    if gone is not None:
        raise CheckpointError(
            f"layer {gone!r} of {type(model).__name__} was converted, and is gone: other code changed the network afterwards (as "
            "timm's reparameterize_model does), so it could not be loaded. Change the plain network first, then convert it"
        )


def check_fit(model: nn.Module, stored: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors of other names or shapes than the network's."""
    wanted = first_names(model)
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(
            f"{path} does not fit the network: missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'}"
        )
    for name, tensor in stored.items():
        if wanted[name].shape != tensor.shape:
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensor.shape)}, the network {tuple(wanted[name].shape)}")


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none of which shares its memory with another."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()._cdata
        if tensor.is_meta:
            raise CheckpointError(f"{name} holds no values (it is on the meta device): load weights before saving")
        if storage in seen:
            tensors[name] = tensor.clone()
        seen.add(storage)
    return tensors


def _is_replaceable(place: Path) -> bool:
    """Whether there is nothing yet, or a model that `save` wrote."""
    if not place.exists():
        return True
    try:
        if place.is_dir() and all(path.name.startswith(TEMPORARY) for path in place.iterdir()):
            return True
        if (place / MODEL).exists() and is_model_file(place / MODEL):
            return True
        with open_regular(place / CONFIG) as file:
            return "thriftnet_format" in json.load(file)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, RecursionError):
        return False  # no config.json, or not ours
