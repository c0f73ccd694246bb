"""Our model folder: every tensor once, what rebuilds the network, and a model card. No pickle.

folder/model.safetensors   each tensor once, under its first name
folder/config.json         format, model name and kwargs, what was done to it, hashes
folder/README.md           model card
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thriftnet import __version__
from thriftnet.core import verbs
from thriftnet.core.plan import Plan
from thriftnet.core.spec import format_spec
from thriftnet.errors import CheckpointError, ConfigError, ThriftnetError
from thriftnet.interop.sources import build
from thriftnet.models.entry import IDENTITY
from thriftnet.techniques import convert, resolve

FORMAT = 1
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def save(model: nn.Module, folder: str | os.PathLike[str], *, metadata: Mapping[str, Any] | None = None) -> Path:
    """Write a network to a folder, so that `load` gives it back bit by bit.

    The folder is written beside its place and moved there when complete; one that holds something else is not touched.

    Args:
        model: Any network; one outside the zoo needs its plain form again when loaded.
        folder: Where to; an earlier model folder there is replaced.
        metadata: JSON-ready facts to keep: input size, metrics, class names, ...

    Returns:
        The folder.

    Raises:
        CheckpointError: The place holds something that is not a model folder, or cannot be written.
    """
    from safetensors.torch import save_file

    place = Path(folder)
    _check_replaceable(place)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        draft = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {place}: {error.strerror}") from None
    try:
        save_file(unique_tensors(model), draft / WEIGHTS)
        config = _config(model, metadata or {})
        config["sha256"] = {WEIGHTS: _sha256(draft / WEIGHTS)}
        (draft / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        (draft / CARD).write_text(_card(model, config))
        for path in draft.iterdir():
            _sync(path)
        draft.chmod(0o755)
        _move_into_place(draft, place)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {place}: {error.strerror or error}. What was there before is unchanged"
        ) from None
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return place


def load(folder: str | os.PathLike[str], *, model: nn.Module | None = None) -> nn.Module:
    """The network that `save` wrote, in eval mode on the CPU.

    Args:
        folder: A model folder.
        model: The plain network, for one that is not in the zoo: what was done to the saved one is done to a copy of it.

    Raises:
        CheckpointError: Not a model folder, damaged, of a newer format, or not fitting the network.
    """
    place = Path(folder)
    config = read_config(place)
    expected = config.get("sha256", {}).get(WEIGHTS)
    if not (place / WEIGHTS).is_file() or _sha256(place / WEIGHTS) != expected:
        raise CheckpointError(
            f"{place / WEIGHTS} is missing or damaged: its hash is not the one in {CONFIG}. Copy the folder anew"
        )
    try:
        rebuilt = replay(_plain(place, config, model), config["history"])
    except (ThriftnetError, KeyError, TypeError) as error:
        raise CheckpointError(f"{place} cannot be rebuilt: {error}") from error
    _load_weights(rebuilt, place)
    return rebuilt.eval()


def open_model(source: str, **kwargs: Any) -> nn.Module:
    """The network that the user names: a folder written by `save`, or what `sources.build` knows.

    Raises:
        ConfigError: No such network, with close matches.
        CheckpointError: A folder that cannot be loaded.
    """
    if Path(source).is_dir():
        if kwargs:
            raise ConfigError(f"{source} is a saved network: it takes no further arguments, got {sorted(kwargs)}")
        return load(source)
    if "/" in source and ":" not in source:
        raise ConfigError(
            f"there is no folder {source!r}. Give a saved folder, a model name (see list_models), or timm:NAME"
        )
    return build(source, kwargs, trusted=True)


def read_config(place: Path) -> dict[str, Any]:
    """The folder's `config.json`, checked to be of a format that this version reads."""
    try:
        config = json.loads((place / CONFIG).read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{place} is no model folder: it has no {CONFIG}. Folders are written by thriftnet.save"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{place / CONFIG} cannot be read: {error}") from None
    version = config.get("thriftnet_format") if isinstance(config, dict) else None
    if not isinstance(version, int):
        raise CheckpointError(f"{place / CONFIG} is not of thriftnet: it has no thriftnet_format")
    if version > FORMAT:
        made_by = config.get("thriftnet_version", "a newer version")
        raise CheckpointError(
            f"{place} has format {version}, this version reads up to {FORMAT}: install thriftnet {made_by}"
        )
    return dict(config)


def replay(model: nn.Module, history: list[dict[str, Any]]) -> nn.Module:
    """Do to a plain network what was done to another."""
    model = model.eval()
    for step in history:
        verb = step.get("verb")
        if verb == "convert":
            model = convert(model, Plan.from_dict(step["plan"]))
        elif verb == "fold":
            model = verbs.fold(model)
        elif verb == "freeze":
            model = verbs.freeze(model, step["width"])
        elif verb == "tie":
            model = verbs.tie(model, step["groups"])
        else:
            raise CheckpointError(f"unknown step {verb!r} in its history")
        model = model.eval()
    return model


def unique_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with each tensor once, under its first name."""
    seen: set[int] = set()
    unique = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            unique[name] = tensor.detach().contiguous()
    return unique


def _load_weights(model: nn.Module, place: Path) -> None:
    from safetensors.torch import load_file

    stored = load_file(place / WEIGHTS)
    wanted = unique_tensors(model)
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointError(
            f"{place} does not fit the network: missing {missing[:3] or 'nothing'}, unexpected {extra[:3] or 'nothing'}"
        )
    with torch.no_grad():
        own = dict(model.state_dict(keep_vars=True))
        for name, tensor in stored.items():
            if own[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{place}: {name} has shape {tuple(tensor.shape)}, the network {tuple(own[name].shape)}"
                )
            own[name].data = tensor.to(own[name].device, copy=True)  # aligned: results depend on it in the last bit


def _plain(place: Path, config: Mapping[str, Any], model: nn.Module | None) -> nn.Module:
    if model is not None:
        return model
    identity = config.get("model")
    if identity is None:
        raise CheckpointError(
            f"{place} holds a {config.get('class')} whose making is not known: give its plain form, load(folder, model=...)"
        )
    return build(identity["name"], identity["kwargs"], trusted=False)


def _config(model: nn.Module, metadata: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "thriftnet_format": FORMAT,
        "thriftnet_version": __version__,
        "model": getattr(model, IDENTITY, None),
        "class": type(model).__name__,
        "history": verbs.history(model),
        "params": verbs.count_params(model),
        "metadata": dict(metadata),
    }


def steps(history: list[dict[str, Any]]) -> list[str]:
    """What was done to a network, a phrase each."""
    return [
        f"convert: {format_spec(resolve(step['plan']['technique']))}" if step["verb"] == "convert" else str(step["verb"])
        for step in history
    ]


def _card(model: nn.Module, config: Mapping[str, Any]) -> str:
    identity = config["model"]
    name = identity["name"] if identity else config["class"]
    argument = "" if identity else ", model=plain_network"
    lines = [
        "---",
        "library_name: thriftnet",
        "tags: [image-classification]",
        "---",
        "",
        f"# {name}",
        "",
        f"{config['params']:,} stored parameters. Made with thriftnet {config['thriftnet_version']}.",
        "",
        *(f"- {step}" for step in steps(config["history"])),
        *(f"- {key}: {value}" for key, value in config["metadata"].items()),
        "",
        "```python",
        "import thriftnet",
        "",
        f'model = thriftnet.load("this/folder"{argument})',
        "```",
        "",
    ]
    return "\n".join(lines)


def _check_replaceable(place: Path) -> None:
    if place.is_file() or (place.is_dir() and any(place.iterdir()) and not (place / CONFIG).is_file()):
        raise CheckpointError(f"{place} exists and is no model folder: it is left alone. Give another place")


def _move_into_place(draft: Path, place: Path) -> None:
    """Swap the complete draft in by two renames; a kill between them leaves the old one whole, as ``.NAME.old-PID``."""
    old = place.with_name(f".{place.name}.old-{os.getpid()}")
    if place.exists():
        place.rename(old)
    try:
        draft.rename(place)
    except OSError:
        if old.exists():
            old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)
    _sync(place.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _sha256_by_hand(file)


def _sha256_by_hand(file: Any) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()
