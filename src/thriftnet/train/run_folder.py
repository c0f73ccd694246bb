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

from thriftnet.errors import CheckpointError, ConfigError
from thriftnet.files import locked, open_regular, write_atomically
from thriftnet.report.plots import run_curves
from thriftnet.store.config import MODEL
from thriftnet.store.model_file import FINISHED, RUN, RUN_MODEL, check_fit, read_model, save
from thriftnet.store.sealed import read_json, sealed_json
from thriftnet.train.recipe import GROUPS, RESUMABLE_FIELDS

LOCK, LINES, TABLE, CURVES = ".lock", "metrics.jsonl", "metrics.csv", "curves.svg"
NUMBERS = ("epoch", "train_loss", "loss", "top1", "agreement", "lr")  # of a row, where it has them


class RunFolder:
    """One training's folder; only the main process writes, the others keep the metrics in memory."""

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self.path, self.is_main = path, is_main
        self.model, self.checkpoints = path / RUN_MODEL, path / "checkpoints"
        self.rows: list[dict[str, Any]] = []

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Lock the folder for one training; one that is refused leaves nothing behind."""
        if (self.path / MODEL).exists():
            raise ConfigError(
                f"{self.path} is a model folder, no place for a run: give another --output, as {self.path}-run"
            )
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
                f"{self.path} holds another training: {'; '.join(fatal)[:1000]}. Give another --output, or the settings it began with"
            )
        return [
            f"{name} was {old}, is {new}: the schedule is that of the new length from here on"
            for name, (old, new) in differing.items()
            if name in ("epochs", "max_steps")
        ]

    def _read(self) -> dict[str, Any] | None:
        path = self.path / RUN
        try:
            stored = read_json(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{path} cannot be read ({error.strerror}): give another --output") from None
        except CheckpointError as error:
            raise ConfigError(f"{error}: put back the file as it was, or give another --output") from None
        if not isinstance(stored.get("recipe"), dict):
            raise ConfigError(f"{path} is not of a training: give another --output")
        return stored

    def _write(self, name: str, text: str) -> None:
        """Replace a file of the run in one step; only the main process does."""
        if not self.is_main:
            return
        try:
            write_atomically(self.path / name, text)
        except OSError as error:
            raise CheckpointError(
                f"cannot write {self.path / name}: {error.strerror or error}. Make room or repair the folder, then start the "
                "same command again"
            ) from None

    def write(self, run: Mapping[str, Any]) -> None:
        """Write run.json."""
        self._write(RUN, sealed_json(run))

    def resume_metrics(self, step: int) -> None:
        """Drop the rows after a step, which will be written again."""
        self.rows = [row for row in read_metrics(self.path) if row["step"] <= step]
        self._write_rows()

    def add_metrics(self, row: Mapping[str, Any]) -> None:
        """Add one row."""
        self.rows.append(dict(row))
        self._write_rows()

    def _write_rows(self) -> None:
        self._write(LINES, "".join(json.dumps(row) + "\n" for row in self.rows))

    def write_curves(self) -> None:
        """Write the rows as a table and as a picture."""
        if not self.rows:
            return
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(dict.fromkeys(name for row in self.rows for name in row)))
        writer.writeheader()
        writer.writerows(self.rows)
        self._write(TABLE, text.getvalue())
        with suppress(ImportError):  # matplotlib comes with another extra
            self._write(CURVES, run_curves(self.rows) if self.is_main else "")

    def keep(self, model: nn.Module, metadata: Mapping[str, Any]) -> None:
        """Save the network, replacing the one kept before."""
        if self.is_main:
            save(model, self.model, metadata=metadata)

    def load_kept(self, model: nn.Module) -> None:
        """Load the weights of the network that was kept into one of the same architecture."""
        path = self.model / MODEL
        _, stored = read_model(path)
        check_fit(model, stored, path)
        model.load_state_dict(stored, strict=False)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run's epochs, oldest first; a line that is damaged is left out."""
    try:
        with open_regular(folder / LINES) as file:
            lines = file.read().decode(errors="replace").splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder / LINES} cannot be read: {error.strerror or error}") from None
    rows = []
    for line in lines:
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if (
                isinstance(row, dict)
                and type(row.get("step")) is int
                and all(_is_number(row.get(name, 0.0)) for name in NUMBERS)
            ):
                rows.append(row)
    return rows


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _flat(run: Mapping[str, Any]) -> dict[str, Any]:
    """run.json with the recipe's fields by their full names."""
    flat = {name: value for name, value in run.items() if name != "recipe"}
    for name, value in run["recipe"].items():
        leaves = (
            {f"{name}.{leaf}": item for leaf, item in value.items()}
            if name in GROUPS and isinstance(value, dict)
            else {name: value}
        )
        flat |= {f"recipe.{path}": item for path, item in leaves.items()}
    return flat
