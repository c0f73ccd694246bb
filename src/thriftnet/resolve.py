"""A network by any name: the zoo, other libraries, your own code, saved models, files of the authors' formats, the Hub."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from thriftnet.arguments import as_path, checked
from thriftnet.core.head import outputs, replace_head
from thriftnet.errors import ConfigError
from thriftnet.importing.importer import import_checkpoint
from thriftnet.models.table import is_zoo_name, zoo_name
from thriftnet.store.builders import build
from thriftnet.store.hub import HUB
from thriftnet.store.model_file import is_model_file, load


@checked
def open_model(source: str | os.PathLike[str], **kwargs: Any) -> nn.Module:
    """The network that the user names.

    Args:
        source: A folder written by `save` or by a training, ``hf-hub:owner/name[@revision]``, a file of the authors' formats, or what
            `store.builders.build` knows.
        kwargs: For the function that builds it. A saved network takes ``num_classes``: its classifier is replaced if it has
            another number of outputs; a file of the authors takes the hints of `import_checkpoint`, too.

    Raises:
        ConfigError: No such network, with close matches.
        CheckpointError: A folder or file that cannot be loaded.
    """
    path, source = as_path(source, "source"), os.fspath(source)
    if not (source.startswith(HUB) or path.exists()):
        if ":" not in source and ("/" in source or (path.suffix[1:2].isalpha() and not is_zoo_name(source))):
            raise ConfigError(
                f"no such file: {source!r}. Give a saved folder, a checkpoint file, hf-hub:OWNER/NAME, a model name (see "
                "thriftnet models), or timm:NAME"
            )
        return build(source, kwargs, trusted=True)
    hints = {name: value for name, value in kwargs.items() if name != "num_classes" or "model" in kwargs}
    if path.is_file() and not _is_ours(path):
        model = import_checkpoint(path, **hints).model
    elif hints:
        raise ConfigError(f"{source} is a saved network: it takes no arguments but num_classes, got {sorted(hints)}")
    else:
        model = load(source)
    if "num_classes" in hints or kwargs.get("num_classes", outputs(model)) == outputs(model):
        return model
    return replace_head(model, kwargs["num_classes"], inplace=True)


def network_name(source: str, kwargs: Iterable[str], size: Sequence[int] | None, paper: str = "") -> str:
    """A name of the zoo for an author's, as `zoo_name` decides; whatever else names a network stays as it is."""
    if as_path(source, "source").exists() or not is_zoo_name(source):
        return source
    return zoo_name(source, kwargs=kwargs, size=size, paper=paper)


def _is_ours(path: Path) -> bool:
    try:
        return is_model_file(path)
    except OSError:
        return False  # the importer says why it cannot be read
