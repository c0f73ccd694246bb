"""Networks from and to the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.store.config import MODEL
from thriftnet.store.hub import download, upload
from thriftnet.store.model_file import load, model_path, read_config, save


def from_pretrained(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    model: nn.Module | None = None,
) -> nn.Module:
    """The network in a folder, or in a repository of the Hub.

    Args:
        source: A folder or model file that exists, else ``owner/name``, with or without ``hf-hub:`` before and ``@revision`` behind.
        revision: Branch, tag or commit.
        token: For private and gated repositories; left out, the one that ``hf auth login`` stored.
        cache_dir: Where downloads are kept; left out, where huggingface_hub keeps them.
        local_files_only: Use the cache only, without network access.
        model: The plain network, for one that is not in the zoo.

    Raises:
        CheckpointError: No such repository, no access, no connection, or not a model folder.
        ConfigError: Two revisions.
    """
    if Path(source).exists():
        return load(source, model=model)
    folder = download(
        os.fspath(source), revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    return load(folder, model=model)


def push_to_hub(
    model: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    metadata: Mapping[str, Any] | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str = "Push model using thriftnet.",
    create_pr: bool = False,
) -> str:
    """Save a network to a repository of the Hub, which is created if it does not exist.

    Args:
        model: The network, or a model folder, its model file, or the folder of a training.
        repo_id: ``owner/name``.
        metadata: As in `save`; not for a folder, which has its own.
        token: One that may write; left out, the one that ``hf auth login`` stored.
        private: Whether a new repository is private; left out, as its owner's default.
        revision: Branch to commit to, created if it does not exist.
        commit_message: First line of the commit.
        create_pr: Open a pull request instead of committing to the branch.

    Returns:
        Address of the commit.

    Raises:
        CheckpointError: No access, no connection, or not a model folder.
        ConfigError: Metadata for a folder.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if isinstance(model, nn.Module):
            model = save(model, Path(scratch) / "model", metadata=metadata)
        elif metadata is not None:
            raise ConfigError(f"{os.fspath(model)} has its metadata in itself: give metadata to save, or push a network")
        read_config(model)
        path = model_path(model)
        if path.name != MODEL:
            raise CheckpointError(f"{path} is not called {MODEL}, as a model is on the Hub: load it, and push the network")
        return upload(
            path.parent,
            repo_id,
            token=token,
            private=private,
            revision=revision,
            commit_message=commit_message,
            create_pr=create_pr,
        )
