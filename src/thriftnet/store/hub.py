"""Files of model folders to and from the Hugging Face Hub: the three of a model folder, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from thriftnet import __version__
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.hub_errors import hub_errors
from thriftnet.store.config import FILES

HUB = "hf-hub:"


def download(
    name: str,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder in huggingface_hub's cache that holds a repository's model; arguments and errors as `from_pretrained`."""
    repo_id, at = parse_name(name)
    if at and revision and at != revision:
        raise ConfigError(f"{name!r} names revision {at!r}, and revision={revision!r} another one: give one of them")
    revision = revision or at
    with _errors(repo_id, revision, "read"):
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            repo_id,
            revision=revision,
            token=token,
            cache_dir=None if cache_dir is None else Path(cache_dir),
            local_files_only=local_files_only,
            allow_patterns=list(FILES),
            library_name="thriftnet",
            library_version=__version__,
        )
    return Path(folder)


def upload(
    folder: Path,
    name: str,
    *,
    token: str | bool | None,
    private: bool | None,
    revision: str | None,
    commit_message: str,
    create_pr: bool,
) -> str:
    """Address of the commit that puts a model folder into a repository; arguments and errors as `push_to_hub`."""
    repo_id, at = parse_name(name)
    revision = revision or at
    with _errors(repo_id, revision, "written"):
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="thriftnet", library_version=__version__)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )
    return str(commit.commit_url)


def parse_name(text: str) -> tuple[str, str | None]:
    """Repository and revision in ``hf-hub:owner/name@revision``.

    Example:
        >>> parse_name("hf-hub:someone/resnet20-thin@v1.0")
        ('someone/resnet20-thin', 'v1.0')
    """
    repo_id, _, revision = text.removeprefix(HUB).partition("@")
    return repo_id, revision or None


@contextmanager
def _errors(repo_id: str, revision: str | None, action: str) -> Iterator[None]:
    where = repo_id + (f"@{revision}" if revision else "")
    hint = ". Connect to it" + (
        "" if action == "written" else ", or give a folder; only what was downloaded before is at hand"
    )
    token = ", or give token=..."
    subject = f"{where} cannot be {action}"
    with hub_errors(subject, CheckpointError, kind="repository", revision=revision, hint=hint, token=token):
        yield
