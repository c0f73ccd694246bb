"""Networks from and to the Hugging Face Hub."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from thriftnet.arguments import as_path, checked
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.store.config import FILES, MODEL
from thriftnet.store.hub import LIBRARY, download, parse_name, translated_errors
from thriftnet.store.model_file import load, model_path, read_config, save


@checked
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
    if as_path(source, "source").exists():
        return load(source, model=model)
    cache = None if cache_dir is None else Path(cache_dir)
    folder = download(os.fspath(source), revision, token=token, cache_dir=cache, local_files_only=local_files_only)
    return load(folder, model=model)


@checked
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
        repo_id, at = parse_name(repo_id)
        revision = revision or at
        with translated_errors(repo_id, revision, "written"):
            from huggingface_hub import HfApi

            api = HfApi(token=token, **LIBRARY)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not create_pr:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            commit = api.upload_folder(
                repo_id=repo_id,
                folder_path=path.parent,
                allow_patterns=list(FILES),
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
    return str(commit.commit_url)
