"""The folder of a run.

run/run.json             what is trained, how and with what
run/metrics.jsonl, .csv  one row for each epoch; curves.svg draws them
run/model/               the network that was kept, as `thriftnet.save` writes it
run/checkpoints/         what a resumed training needs
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from thriftnet.core.tied import unique_tensors
from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.files import locked, write_atomically
from thriftnet.report.plots import run_curves
from thriftnet.store.config import MODEL
from thriftnet.store.model_file import FINISHED, RUN, RUN_MODEL, model_path, read_model, save
from thriftnet.train.recipe import GROUPS, RESUMABLE_FIELDS

LOCK, LINES, TABLE, CURVES = ".lock", "metrics.jsonl", "metrics.csv", "curves.svg"


class RunFolder:
    """One training's folder; only the main process writes, the others keep the metrics in memory."""

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self.path, self.is_main = path, is_main
        self.model, self.checkpoints = path / RUN_MODEL, path / "checkpoints"
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for one training; one that is refused leaves nothing behind."""
        if (self.path / MODEL).exists() and not (self.path / RUN).exists():
            raise ConfigError(f"{self.path} is the folder of a saved network: give another --output")
        with ExitStack() as held:
            if self.is_main:
                try:
                    held.enter_context(locked(self.path / LOCK))
                except BlockingIOError as error:
                    raise ConfigError(
                        f"another training runs in {self.path} ({error.strerror}): give another --output, or stop it"
                    ) from None
                except OSError as error:
                    raise ConfigError(f"cannot write to {self.path}: {error.strerror}") from None
            yield

    def compare(self, run: Mapping[str, Any]) -> list[str]:
        """Notes on harmless differences between the folder's training and this one.

        Raises:
            ConfigError: A difference that changes the result, or run.json cannot be read.
        """
        stored = self._read()
        if stored is None:
            return []
        before, now = _flat(stored), _flat(json.loads(json.dumps(run, default=str)))
        differing = {
            name.removeprefix("recipe."): (before.get(name), now.get(name))
            for name in {**before, **now}
            if before.get(name) != now.get(name) and name not in ("device", "versions", FINISHED)
        }
        fatal = [f"{name} was {old!r}, is {new!r}" for name, (old, new) in differing.items() if name not in RESUMABLE_FIELDS]
        if fatal:
            raise ConfigError(
                f"{self.path} holds another training: {'; '.join(fatal)}. Give another --output, or the settings it began with"
            )
        return [
            f"{name} was {old}, is {new}: the schedule is that of the new length from here on"
            for name, (old, new) in differing.items()
            if name in ("epochs", "max_steps")
        ]

    def _read(self) -> dict[str, Any] | None:
        path = self.path / RUN
        try:
            stored = json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read ({error}): give another --output") from None
        if not isinstance(stored, dict) or not isinstance(stored.get("recipe"), dict):
            raise ConfigError(f"{path} is not of a training: give another --output")
        return stored

    def write(self, run: Mapping[str, Any]) -> None:
        """Write run.json."""
        if not self.is_main:
            return
        try:
            write_atomically(self.path / RUN, json.dumps(run, indent=1, default=str) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot write to {self.path}: {error.strerror}") from None

    def resume_metrics(self, step: int) -> None:
        """Drop the rows after a step, which will be written again."""
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        if self.is_main:
            write_atomically(self.path / LINES, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one row."""
        self.rows.append(dict(row))
        if self.is_main:
            with (self.path / LINES).open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")

    def write_curves(self) -> None:
        """Write the rows as a table and as a picture."""
        if not self.is_main or not self.rows:
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in self.rows for name in row)))
        writer.writeheader()
        writer.writerows(self.rows)
        write_atomically(self.path / TABLE, text.getvalue())
        with suppress(ImportError):  # matplotlib comes with another extra
            write_atomically(self.path / CURVES, run_curves(self.rows))

    def keep(self, model: nn.Module, metadata: Mapping[str, Any]) -> None:
        """Save the network, replacing the one kept before."""
        if self.is_main:
            save(model, self.model, metadata=metadata)

    def load_kept(self, model: nn.Module) -> None:
        """Load the weights of the network that was kept into one of the same architecture."""
        _, stored = read_model(model_path(self.model))
        if stored.keys() != unique_tensors(model).keys():
            raise CheckpointError(f"{self.model} does not fit the network that was trained")
        model.load_state_dict(stored, strict=False)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run's epochs, oldest first; a line that a kill cut short is left out."""
    try:
        lines = (folder / LINES).read_text().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """run.json with the recipe's fields by their full names."""
    flat = {name: value for name, value in run.items() if name != "recipe"}
    for name, value in run["recipe"].items():
        leaves = {f"{name}.{leaf}": item for leaf, item in value.items()} if name in GROUPS else {name: value}
        flat |= {f"recipe.{path}": item for path, item in leaves.items()}
    return flat
