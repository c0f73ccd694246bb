"""What reading from and writing to the Hugging Face Hub share: names, errors, and the download of a model folder's files."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from thriftnet import __version__
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.hub_errors import hub_errors
from thriftnet.store.config import FILES

HUB = "hf-hub:"
LIBRARY: Any = {"library_name": "thriftnet", "library_version": __version__}  # what the Hub is told of who asks


def download(name: str, revision: str | None = None, **options: Any) -> Path:
    """The folder in huggingface_hub's cache that holds a repository's model; options and errors as `from_pretrained`."""
    repo_id, at = parse_name(name)
    if at and revision and at != revision:
        raise ConfigError(f"{name!r} names revision {at!r}, and revision={revision!r} another one: give one of them")
    revision = revision or at
    with translated_errors(repo_id, revision, "read"):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(repo_id, revision=revision, allow_patterns=list(FILES), **LIBRARY, **options)
    return Path(folder)


def parse_name(text: str) -> tuple[str, str | None]:
    """Repository and revision in ``hf-hub:owner/name@revision``.

    Example:
        >>> parse_name("hf-hub:someone/resnet20-thin@v1.0")
        ('someone/resnet20-thin', 'v1.0')
    """
    repo_id, _, revision = text.removeprefix(HUB).partition("@")
    return repo_id, revision or None


def translated_errors(repo_id: str, revision: str | None, action: str) -> AbstractContextManager[None]:
    """What huggingface_hub raises within the block becomes a `CheckpointError`; the action is "read" or "written"."""
    where = repo_id + (f"@{revision}" if revision else "")
    cached = "" if action == "written" else ", or give a folder; only what was downloaded before is at hand"
    return hub_errors(
        f"{where} cannot be {action}",
        CheckpointError,
        kind="repository",
        revision=revision,
        hint=f". Connect to it{cached}",
        token=", or give token=...",
    )
