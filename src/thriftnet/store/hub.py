"""Model folders on the Hugging Face Hub: the same three files, and nothing else is fetched or sent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from thriftnet import __version__
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.store.model_file import FILES, HUB, load, read_config, save


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
        local_files_only: Take what was downloaded before, and ask nobody.
        model: The plain network, for one that is not in the zoo.

    Raises:
        CheckpointError: No such repository, no access, no connection, or not a model folder.
        ConfigError: Two revisions.
    """
    if Path(source).exists():
        return load(source, model=model)
    repo_id, at = parse_name(os.fspath(source))
    if at and revision and at != revision:
        raise ConfigError(f"{source!r} names revision {at!r}, and revision={revision!r} another one: give one of them")
    revision = revision or at
    with _one_line(repo_id, revision):
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
        model: The network, or a folder written by `save`.
        repo_id: ``owner/name``.
        metadata: As in `save`; not for a folder, which has its own.
        token: One that may write; left out, the one that ``hf auth login`` stored.
        private: Whether a new repository is private; left out, as its owner's default.
        revision: Branch to commit to, created if it does not exist.
        commit_message: First line of the commit.
        create_pr: Open a pull request and leave the branch as it is.

    Returns:
        Address of the commit.

    Raises:
        CheckpointError: No access, no connection, or not a model folder.
        ConfigError: Metadata for a folder.
    """
    with ExitStack() as stack:
        if isinstance(model, nn.Module):
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            model = save(model, Path(scratch) / "model", metadata=metadata)
        elif metadata is not None:
            raise ConfigError(f"{os.fspath(model)} has its metadata in itself: give metadata to save, or push a network")
        read_config(model)
        repo_id, at = parse_name(repo_id)
        revision = revision or at
        stack.enter_context(_one_line(repo_id, revision, writing=True))
        from huggingface_hub import HfApi

        api = HfApi(token=token, library_name="thriftnet", library_version=__version__)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not create_pr:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id,
            folder_path=os.fspath(model),
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
def _one_line(repo_id: str, revision: str | None, *, writing: bool = False) -> Iterator[None]:
    """Errors of huggingface_hub, which run over many lines, as one line that says what to do."""
    from huggingface_hub import errors

    unreached: Any = errors.HfHubHTTPError.__bases__[0]  # of the HTTP client, which differs by version
    where = repo_id + (f"@{revision}" if revision else "")
    what = "written" if writing else "read"
    try:
        yield
    except errors.HFValidationError as error:
        raise CheckpointError(f"{where!r} is neither a folder nor a repository owner/name: {_first(error)}") from error
    except errors.GatedRepoError as error:
        raise CheckpointError(f"{where} is gated: ask for access on its page, then log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{where} cannot be {what}: there is no such repository, or it is private. Check the name, and log in with "
            "`hf auth login`, or give token=..."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repo_id} has no revision {revision!r}: give a branch, tag or commit of it") from error
    except errors.LocalTokenNotFoundError as error:
        raise CheckpointError(f"{where} needs a token: log in with `hf auth login`, or give token=...") from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, unreached) as error:
        refusal = error if isinstance(error, errors.HfHubHTTPError) else error.__cause__
        if isinstance(refusal, errors.HfHubHTTPError):
            raise CheckpointError(f"{where} cannot be {what}: {_status(refusal)}") from error
        hint = "" if writing else ", or give a folder; only what was downloaded before is at hand"
        raise CheckpointError(f"{where} cannot be {what}: the Hub cannot be reached. Connect to it{hint}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where} cannot be {what}: {_first(error)}") from error


def _status(error: Any) -> str:
    code = getattr(error.response, "status_code", None)
    if code in (401, 403):
        return f"access denied ({code}). Log in with `hf auth login`, or give a token=... that may do this"
    return f"the Hub answers {code}: {error.server_message or _first(error)}. Try again later"


def _first(error: Exception) -> str:
    """The first line of a message."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
