"""A network by any name: the zoo, other libraries, your own code, saved models, files of the authors' formats, the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from thriftnet.errors import ConfigError
from thriftnet.importing.importer import import_checkpoint
from thriftnet.store.builders import build
from thriftnet.store.hub import HUB
from thriftnet.store.model_file import is_model_file, load


def open_model(source: str, **kwargs: Any) -> nn.Module:
    """The network that the user names.

    Args:
        source: A folder written by `save` or by a training, ``hf-hub:owner/name[@revision]``, a file of the authors' formats, or what
            `store.builders.build` knows.
        kwargs: For the function that builds it.

    Raises:
        ConfigError: No such network, with close matches.
        CheckpointError: A folder or file that cannot be loaded.
    """
    path = Path(source)
    saved = source.startswith(HUB) or path.exists()
    if saved and kwargs:
        raise ConfigError(f"{source} is a saved network: it takes no further arguments, got {sorted(kwargs)}")
    if path.is_file() and not _is_ours(path):
        return import_checkpoint(path).model
    if saved:
        return load(source)
    if ":" not in source and ("/" in source or path.suffix[1:2].isalpha()):
        raise ConfigError(
            f"there is no folder or file {source!r}. Give a saved folder, a checkpoint file, hf-hub:OWNER/NAME, "
            "a model name (see list_models), or timm:NAME"
        )
    return build(source, kwargs, trusted=True)


def _is_ours(path: Path) -> bool:
    try:
        return is_model_file(path)
    except OSError:
        return False  # the importer says why it cannot be read
