"""Options of the original projects and what they are called here: hints in errors, and the tables of docs/coming-from."""

from __future__ import annotations

import functools
from importlib.resources import files


@functools.cache
def options_of_projects() -> dict[str, dict[str, str]]:
    """Project -> its option -> ours, from ``coming_from.yaml``."""
    import yaml

    text = (files("thriftnet.cli") / "coming_from.yaml").read_text(encoding="utf-8")
    projects: dict[str, dict[str, str]] = yaml.safe_load(text)
    return projects


def hint(option: str, *, same: bool = False) -> str:
    """What an option of the original projects is here; "" for other options, and, unless ``same``, for those of the same name.

    Example:
        >>> hint("--bank-size")
        'soft-sharing has --bank_size; here it is `--templates`'
    """
    wanted = _normalized(option)
    meanings: dict[str, tuple[list[str], str]] = {}
    for project, options in options_of_projects().items():
        for theirs, ours in options.items():
            other_name = _normalized(ours.split("`")[1:2][0].split()[0] if "`" in ours else "") != wanted
            if _normalized(theirs) == wanted and (same or other_name):
                meanings.setdefault(ours, ([], theirs))[0].append(project)
    return "; ".join(
        f"{' and '.join(projects)} {'has' if len(projects) == 1 else 'have'} {theirs}; here it is {ours}"
        for ours, (projects, theirs) in meanings.items()
    )


def _normalized(option: str) -> str:
    return option.lstrip("-").rstrip(":").replace("_", "-").lower()
