"""Our model folder: every tensor once, what rebuilds the network, and a model card. No pickle.

folder/model.safetensors   each tensor once, under its first name
folder/config.json         format, model name and kwargs, what was done to it, what it reads and reaches, hashes
folder/README.md           model card
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thriftnet.core.convert import tie
from thriftnet.core.fold import fold, freeze
from thriftnet.core.plan import Plan
from thriftnet.core.tied import first_names, unique_tensors
from thriftnet.core.width import set_width
from thriftnet.errors import CheckpointError, ConfigError, ThriftnetError
from thriftnet.kernels.pack import pack
from thriftnet.store import shapes
from thriftnet.store.atomic import recover, replace_folder
from thriftnet.store.builders import build
from thriftnet.store.card import model_card
from thriftnet.store.card import steps as steps
from thriftnet.store.config import (
    CARD,
    CONFIG,
    FILES,
    FORMAT,
    WEIGHTS,
    Config,
    check_sizes,
    described,
    no_folder,
    open_regular,
    parse_config,
    read_config,
)
from thriftnet.techniques import convert

__all__ = ["FORMAT", "load", "read_config", "replay", "save", "steps"]

ATTEMPTS = 100  # of reading a folder that others replace meanwhile
HUB = "hf-hub:"


RUN, RUN_MODEL = "run.json", "model"  # of a training: what it is, and the folder of its network in its own


def save(model: nn.Module, folder: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a network to a folder, so that `load` gives it back bit by bit, at the width it has now.

    The folder is replaced whole: whenever the process dies, the old or the new one is there. Other files in an earlier
    model folder stay; a folder of something else is not touched.

    Args:
        model: Any network; one outside the zoo needs its plain form again when loaded. Of a compiled network, or one
            wrapped for training on several devices, what it holds is saved.
        folder: Where to; an earlier model folder there is replaced.
        metadata: JSON-ready facts to keep. ``input_size`` (C, H, W), ``normalisation`` (``mean`` and ``std``),
            ``class_names`` and ``metrics`` (numbers by name) are checked; others are kept as they are.

    Returns:
        The folder.

    Raises:
        CheckpointError: The place holds something that is not a model folder, or cannot be written.
        ConfigError: Metadata that is not JSON, or a checked fact of another type.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"save needs a network (nn.Module), got a {type(model).__name__}")
    place = place_of(folder)
    if place.resolve() == Path.cwd():
        raise CheckpointError(
            f"{folder} is the working directory, which cannot be replaced: give the name of a folder in it"
        )
    _check_replaceable(place)
    model = _unwrapped(model)
    tensors = _separate(unique_tensors(model))
    config = described(model, metadata or {})

    def write(draft: Path) -> None:
        (draft / CARD).write_text(model_card(config), encoding="utf-8")
        _write_weights(tensors, draft / WEIGHTS)
        shutil.copymode(draft / CARD, draft / WEIGHTS)  # safetensors lets only its writer read it
        config["sha256"] = {name: _sha256(draft / name) for name in (WEIGHTS, CARD)}
        (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _keep_others(place, draft)

    return replace_folder(place, write)


def load(folder: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """The network that `save` wrote, in eval mode on the CPU, at the width it was saved at.

    Nothing is fitted anew and the random state stays as it is. The hash is checked of the very bytes that are loaded, so
    that another process may replace the folder meanwhile.

    Args:
        folder: A model folder, the folder of a training, or ``hf-hub:owner/name`` with an optional ``@revision``.
        model: The plain network, for one that is not in the zoo: what was done to the saved one is done to a copy of it.

    Raises:
        CheckpointError: Not a model folder, damaged, of a newer format, or not fitting the network.
    """
    if isinstance(folder, str) and folder.startswith(HUB):
        from thriftnet.store.hub import from_pretrained

        return from_pretrained(folder, model=model)
    if not (model is None or isinstance(model, nn.Module)):
        raise ConfigError(f"model={model!r}: possible is the plain network, an nn.Module")
    place = place_of(folder)
    if (place / RUN).is_file() and not (place / CONFIG).exists():
        place = place / RUN_MODEL
    config, stored = _read(place)
    check_sizes(config, sum(tensor.numel() for tensor in stored.values()), place)
    try:
        rebuilt = _skeleton(place, config, model)
        _check_fit(rebuilt, stored, place)
        shapes.fill(rebuilt, stored)
        if shapes.unfilled(rebuilt):
            with torch.random.fork_rng(devices=[]):
                shapes.fill_rest(rebuilt, _plain(place, config, model))
        if config["width"] is not None:
            set_width(rebuilt, config["width"])
    except CheckpointError:
        raise
    except Exception as error:  # whatever a foreign config.json makes a network's own code raise
        kind = "" if isinstance(error, ThriftnetError) else f"{type(error).__name__} "
        raise CheckpointError(f"{place} cannot be rebuilt: {kind}{error}") from error
    return rebuilt.eval()


def place_of(folder: str | os.PathLike[str]) -> Path:
    """A folder's path.

    Raises:
        CheckpointError: It is none.
    """
    if not isinstance(folder, str | os.PathLike) or "\0" in os.fspath(folder):
        raise CheckpointError(f"{folder!r} is no path of a folder: give text or a pathlib.Path")
    return Path(folder)


def replay(model: nn.Module, history: list[dict[str, Any]]) -> nn.Module:
    """Do to a plain network what was done to another.

    Raises:
        ConfigError: An unknown step, or one that does not fit the network.
    """
    model = model.eval()
    for step in history:
        verb = step.get("verb")
        if verb == "convert":
            model = convert(model, Plan.from_dict(step["plan"]))
        elif verb == "fold":
            if step.get("width") is not None:
                set_width(model, step["width"])
            model = fold(model, prefer=step.get("prefer", ""))
        elif verb == "freeze":
            model = freeze(model, step["width"])
        elif verb == "tie":
            model = tie(model, step["groups"])
        elif verb == "pack":
            model = pack(model, input_size=step["input_size"])
        else:
            raise ConfigError(f"unknown step {verb!r} in its history; possible are convert, fold, freeze, pack and tie")
        model = model.eval()
    return model


def _read(place: Path) -> tuple[Config, dict[str, Tensor]]:
    """Config and tensors that belong together, though another process may replace the folder meanwhile."""
    from safetensors import SafetensorError
    from safetensors.torch import load as tensors_of

    for _ in range(ATTEMPTS):
        seen = _config_file(place)
        if seen is None:
            if not recover(place) and not (place / CONFIG).exists():
                raise no_folder(place)
            time.sleep(0.01)  # a living process is between two renames, where the system has no exchange
            continue
        config = parse_config(seen[0], place)
        try:
            with open_regular(place / WEIGHTS) as file:
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            data = b""
        except OSError as error:
            raise CheckpointError(f"{place / WEIGHTS} cannot be read: {error.strerror or error}") from None
        if hashlib.sha256(data).hexdigest() == config["sha256"][WEIGHTS]:
            try:
                return config, tensors_of(data)
            except (SafetensorError, ValueError, KeyError) as error:
                raise CheckpointError(f"{place / WEIGHTS} is no safetensors file: {error}") from None
        if _config_file(place) == seen:
            raise CheckpointError(
                f"{place / WEIGHTS} is missing or damaged: its hash is not the one in {CONFIG}. Copy the folder anew"
            )
    raise CheckpointError(f"{place} is replaced faster than it can be read: {ATTEMPTS} attempts. Try again later")


def _config_file(place: Path) -> tuple[bytes, int, int] | None:
    """Content of the config file and which file it is; None where there is none."""
    try:
        with open_regular(place / CONFIG) as file:
            facts = os.fstat(file.fileno())
            return file.read(), facts.st_ino, facts.st_ctime_ns
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise CheckpointError(f"{place / CONFIG} cannot be read: {error.strerror or error}") from None


def _skeleton(place: Path, config: Config, model: nn.Module | None) -> nn.Module:
    """The network with shapes and no values."""
    with shapes.shapes_only():
        if model is not None:
            return replay(shapes.emptied(model), config["history"])
        try:
            plain = _plain(place, config, None)
        except NotImplementedError:
            plain = None  # it computes with numbers while it is built, as torchvision's RegNet does
    if plain is None:
        with torch.random.fork_rng(devices=[]):
            plain = shapes.emptied(_plain(place, config, None))
    with shapes.shapes_only():
        return replay(plain, config["history"])


def _plain(place: Path, config: Config, model: nn.Module | None) -> nn.Module:
    if model is not None:
        return model
    identity = config["model"]
    if identity is None:
        raise CheckpointError(
            f"{place} holds a {config['class']} whose making is not known: give its plain form, load(folder, model=...)"
        )
    return build(identity["name"], identity["kwargs"], trusted=False)


def _check_fit(model: nn.Module, stored: Mapping[str, Tensor], place: Path) -> None:
    wanted = first_names(model)
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(
            f"{place} does not fit the network: missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'}"
        )
    for name, tensor in stored.items():
        if wanted[name].shape != tensor.shape:
            raise CheckpointError(
                f"{place}: {name} has shape {tuple(tensor.shape)}, the network {tuple(wanted[name].shape)}"
            )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The network inside what compiles, averages or distributes it."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel, torch.optim.swa_utils.AveragedModel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = model._modules["_orig_mod"]  # type: ignore[assignment]
        else:
            return model


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, none of which lies in memory that another one uses, too."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()._cdata
        if tensor.is_meta:
            raise CheckpointError(f"{name} holds no values (it is on the meta device): load weights before saving")
        if storage in seen:
            tensors[name] = tensor.clone()
        seen.add(storage)
    return tensors


def _write_weights(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path)
    except SafetensorError as error:
        raise OSError(str(error)) from error
    except (ValueError, RuntimeError, KeyError) as error:
        raise CheckpointError(f"{path.name} cannot hold these tensors: {error}") from error


def _check_replaceable(place: Path) -> None:
    """Raise unless the place is empty or holds a folder that `save` wrote."""
    try:
        if not place.exists() or (place.is_dir() and not any(place.iterdir())):
            return
        if place.is_dir():
            with open_regular(place / CONFIG) as file:
                if "thriftnet_format" in json.load(file):
                    return
    except (FileNotFoundError, ValueError, TypeError, RecursionError):
        pass  # no config.json, or not ours
    except OSError as error:
        raise CheckpointError(f"cannot write {place}: {error.strerror or error}. What is there is unchanged") from error
    raise CheckpointError(f"{place} exists and is no model folder: it is left alone. Give another place")


def _keep_others(place: Path, draft: Path) -> None:
    """Files of the user's in the old folder belong to the new one, too: the same files, not copies."""
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(place.iterdir()):
            if path.name in FILES:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.copytree(path, draft / path.name, symlinks=True, copy_function=_link)
            else:
                _link(path, draft / path.name)


def _link(source: str | Path, target: str | Path, **_: Any) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(source, target, follow_symlinks=False)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
