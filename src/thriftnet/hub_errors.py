"""Errors of huggingface_hub, which run over many lines, as one line that says what to do: for networks and for data sets."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from thriftnet.errors import ThriftnetError, first_line


@contextmanager
def hub_errors(
    subject: str,  # how the messages begin, as "owner/name cannot be read"
    error_type: type[ThriftnetError],
    *,
    kind: str,  # "repository" or "data set"
    revision: str | None = None,  # the one that was asked for
    hint: str = "",  # what to do where the Hub cannot be reached
    token: str = "",  # how else a token can be given than by logging in
) -> Iterator[None]:
    """Raise ``error_type`` for what huggingface_hub raises within the block; errors of thriftnet pass through."""
    from huggingface_hub import errors

    unreachable: Any = errors.HfHubHTTPError.__bases__[0]  # of the HTTP client, which differs by version
    try:
        yield
    except ThriftnetError:
        raise
    except errors.HFValidationError as error:
        raise error_type(f"{subject}: it is neither a folder nor a {kind} owner/name: {first_line(error)}") from error
    except errors.GatedRepoError as error:
        raise error_type(f"{subject}: it is gated: ask for access on its page, then log in with `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise error_type(
            f"{subject}: there is no such {kind}, or it is private. Check the name, and log in with `hf auth login`{token}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise error_type(f"{subject}: no revision {revision!r}: give a branch, tag or commit of it") from error
    except errors.LocalTokenNotFoundError as error:
        raise error_type(f"{subject}: it needs a token: log in with `hf auth login`{token}") from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, unreachable) as error:
        refusal = error if isinstance(error, errors.HfHubHTTPError) else error.__cause__
        if isinstance(refusal, errors.HfHubHTTPError):
            raise error_type(f"{subject}: {_status(refusal, token)}") from error
        raise error_type(f"{subject}: the Hub cannot be reached{hint}") from error
    except (OSError, ValueError) as error:
        raise error_type(f"{subject}: {first_line(error)}") from error


def _status(error: Any, token: str) -> str:
    code = getattr(error.response, "status_code", None)
    if code in (401, 403):
        return f"access denied ({code}). Log in with `hf auth login`{token}, with a token that may do this"
    return f"the Hub answers {code}: {error.server_message or first_line(error)}. Try again later"
