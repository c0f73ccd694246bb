"""`thriftnet models`: the zoo."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from thriftnet.cli.common import Parser, parse
from thriftnet.cli.output import emit
from thriftnet.errors import ConfigError, unknown_name
from thriftnet.models import MODELS, ModelEntry, list_models
from thriftnet.models.table import NAMES, normalize_name
from thriftnet.text import table

PLAIN = "plain"  # in place of the technique of a network that has none
FIGURES = ("params", "MACs", "published params", "published FLOPs", "published top-1 (top-5) %")


def run(arguments: Sequence[str]) -> None:
    parser = Parser(
        "models", "List the networks of the zoo: parameters and MACs at their paper's input size, and what was published."
    )
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", default="*", help="shell pattern, as 'resnet*'")
    parser.add_argument("--technique", metavar="T", help=f"only networks of this technique, as soft-sharing; or {PLAIN}")
    parser.add_argument(
        "--paper", metavar="TEXT", help="only networks of this paper: any part of its authors, title or venue"
    )
    options = parse(parser, arguments)
    chosen = _chosen(options.pattern, options.technique, options.paper)
    result = {"models": [_as_dict(name, entry) for name, entry in chosen.items()]}
    emit(_page(chosen), result, as_json=options.json)


def _chosen(pattern: str, technique: str | None, paper: str | None) -> dict[str, ModelEntry]:
    """The networks asked for, by name, with numbers in names sorted as numbers."""
    names = list_models(pattern.lower()) or list(NAMES.get(normalize_name(pattern), ()))
    if not names:
        raise ConfigError(f"no model matches {pattern!r}. Expected one of {', '.join(list_models())}")
    wanted = None if technique is None else _technique(technique)
    papers = None if paper is None else _papers(paper)
    chosen = {
        name: MODELS[name]
        for name in sorted(names, key=in_order)
        if (wanted is None or MODELS[name].technique == wanted) and (papers is None or MODELS[name].paper in papers)
    }
    if not chosen:
        raise ConfigError(f"no model matches {pattern!r} with --technique {technique or 'any'} and --paper {paper or 'any'}")
    return chosen


def _technique(asked: str) -> str:
    """The technique's name in the table; "" for plain networks."""
    possible = {normalize_name(entry.technique or PLAIN): entry.technique for entry in MODELS.values()}
    if normalize_name(asked) not in possible:
        raise unknown_name("technique", asked, (name or PLAIN for name in possible.values()))
    return possible[normalize_name(asked)]


def _papers(asked: str) -> set[str]:
    """The papers with this text in their authors, title or venue."""
    papers = {entry.paper for entry in MODELS.values()}
    found = {paper for paper in papers if asked.lower() in paper.lower() or asked.lower() in _short(paper).lower()}
    if not found:
        raise unknown_name("paper", asked, map(_short, papers))
    return found


def _short(paper: str) -> str:
    """A paper by its authors and year.

    Example:
        >>> _short("He et al., Deep Residual Learning, CVPR 2016")
        'He et al. 2016'
    """
    years = re.findall(r"\b(?:19|20)\d\d\b", paper)
    return " ".join([paper.split(",")[0], *years[-1:]])


def in_order(name: str) -> list[tuple[bool, int, str]]:
    """Sorts resnet20 before resnet110."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.findall(r"\d+|\D+", name)]


def _as_dict(name: str, entry: ModelEntry) -> dict[str, Any]:
    """One network, JSON-ready."""
    keys = ("paper", "technique", "params", "macs", "input_size", "aliases", "baseline", "note")
    published = {**vars(entry.published), "top1": dict(entry.published.top1), "top5": dict(entry.published.top5)}
    return {"name": name, **{key: getattr(entry, key) for key in keys}, "published": published}


def _page(chosen: Mapping[str, ModelEntry]) -> str:
    """A table without empty columns, and below it the papers and notes that its rows refer to."""
    numbers = numbered_notes(chosen)
    columns = ("name", "technique", *FIGURES, "paper", "notes")
    rows = [zoo_row(name, entry, numbers) for name, entry in chosen.items()]
    used = [i for i in range(len(columns)) if any(row[i] != "" for row in rows)]
    parts = [table([columns[i] for i in used], [[row[i] for i in used] for row in rows]), ""]
    papers = {entry.paper: f"{_short(entry.paper)}: {entry.paper}" for entry in chosen.values()}
    parts += ["papers", *(f"  {line}" for line in sorted(papers.values()))]
    if numbers:
        parts += ["", "notes", *(f"  {number:>{len(str(len(numbers)))}}  {note}" for note, number in numbers.items())]
    return "\n".join(parts)


def zoo_row(name: str, entry: ModelEntry, numbers: Mapping[str, str]) -> tuple[object, ...]:
    published = entry.published
    top5 = {data: f" ({figure:g})" for data, figure in published.top5.items()}
    accuracies, before = [], ""
    for data, figure in published.top1.items():
        common, _, last = data.rpartition(" ")  # "ImageNet, sub-network" is written once
        accuracies.append(f"{last if common and common == before else data} {figure:g}{top5.get(data, '')}")
        before = common
    notes = ", ".join(numbers[note] for note in _notes(entry))
    counts = (entry.params, entry.macs, published.params, published.flops)
    return (name, entry.technique, *counts, ", ".join(accuracies), _short(entry.paper), notes)


def _notes(entry: ModelEntry) -> Iterable[str]:
    """Why published figures differ, and what differs in the network itself."""
    return (note for note in (entry.published.note, entry.note) if note)


def numbered_notes(chosen: Mapping[str, ModelEntry]) -> dict[str, str]:
    """The number of each note, in the order of their networks."""
    notes = dict.fromkeys(note for entry in chosen.values() for note in _notes(entry))
    return {note: str(number) for number, note in enumerate(notes, 1)}
