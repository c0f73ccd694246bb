"""Image data sets of the Hugging Face Hub: their parquet files are downloaded, and none of their code is run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from thriftnet.data.dataset import DataSource
from thriftnet.data.parquet import files_by_split, read_parquet, require_pyarrow
from thriftnet.errors import ConfigError, DataError, unknown_name
from thriftnet.hub_errors import hub_errors

SPEC = re.compile(r"([\w.-]+(?:/[\w.-]+)?)(?::([^:@]+))?(?:@([^:@]+))?")
CONVERTED = "refs/convert/parquet"  # where the Hub keeps data sets of other formats, as CONFIG/SPLIT/0000.parquet

Configs = dict[str, dict[str, list[str]]]  # name -> split -> files


def open_hub(name: str) -> DataSource:
    """All splits of ``OWNER/NAME[:CONFIG][@REVISION]``; files are downloaded once, to huggingface_hub's cache.

    Left out, the revision is the main branch, or the Hub's conversion to parquet if that branch has no parquet files.
    """
    match = SPEC.fullmatch(name)
    if not match:
        raise ConfigError(f"data 'hf:{name}': write hf:OWNER/NAME, hf:OWNER/NAME:CONFIG or hf:OWNER/NAME@REVISION")
    require_pyarrow()
    repo, config, revision = match.groups()
    subject, hint = f"hf:{name} cannot be read", ", and the data set was not downloaded before"
    with hub_errors(subject, DataError, kind="data set", revision=revision, hint=hint):
        from huggingface_hub import snapshot_download

        configs = _configs(repo, revision)
        if not configs and not revision:
            revision = CONVERTED
            configs = _configs(repo, revision)
        files = _chosen(repo, config, configs)
        patterns = [file for found in files.values() for file in found]
        root = Path(snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=patterns))
    return read_parquet(f"hf:{name}", {split: [root / file for file in found] for split, found in files.items()})


def _configs(repo: str, revision: str | None) -> Configs:
    """The parquet files of a revision; without a connection, those downloaded before."""
    from huggingface_hub import HfApi, errors, snapshot_download

    unreachable: Any = errors.HfHubHTTPError.__bases__[0]  # of the HTTP client, which differs by version
    try:
        names = HfApi().list_repo_files(repo, repo_type="dataset", revision=revision)
    except errors.RevisionNotFoundError:
        if revision != CONVERTED:
            raise
        return {}
    except (unreachable, errors.OfflineModeIsEnabled) as error:
        if isinstance(error, errors.HfHubHTTPError):
            raise
        try:
            kept = snapshot_download(repo, repo_type="dataset", revision=revision, allow_patterns=[], local_files_only=True)
        except errors.LocalEntryNotFoundError:
            if revision is None:
                return {}
            raise
        names = [path.relative_to(kept).as_posix() for path in Path(kept).rglob("*.parquet")]
    folders: dict[str, list[str]] = {}
    for parts in (name.split("/") for name in names):
        for depth in (1, 2):  # train-0.parquet, or train/0.parquet
            if files_by_split(["/".join(parts[-depth:])]):
                folders.setdefault("/".join(parts[:-depth]), []).append("/".join(parts[-depth:]))
                break
    configs: Configs = {}
    for folder, found in folders.items():
        splits = {s: [f"{folder}/{file}".lstrip("/") for file in files] for s, files in files_by_split(found).items()}
        configs["default" if folder in ("", "data") else folder] = splits
    return configs


def _chosen(repo: str, config: str | None, configs: Configs) -> dict[str, list[str]]:
    """Split -> files of a configuration; left out, the only or the default one."""
    if not configs:
        raise DataError(f"{repo} has no parquet files named after a split, as train-*.parquet or train/*.parquet")
    if config is None:
        config = next(iter(configs)) if len(configs) == 1 else "default"
    if config not in configs:
        raise ConfigError(f"{unknown_name(f'configuration of {repo}', config, configs)}. Write hf:{repo}:CONFIG")
    return configs[config]
