"""What a training leaves to be read: metrics as JSON lines and CSV, and curves as a picture."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from thriftnet.files import write_atomically
from thriftnet.report.plots import run_curves

LINES, TABLE, CURVES = "metrics.jsonl", "metrics.csv", "curves.svg"


class MetricsLog:
    """The metrics of a run: one row for each epoch.

    Args:
        folder: Of the run.
        writes: Whether this process writes; the others only remember.
    """

    def __init__(self, folder: Path, *, writes: bool) -> None:
        self.folder, self.writes = folder, writes
        self.rows: list[dict[str, Any]] = []

    def resume(self, step: int) -> None:
        """Take up the rows until a step; later ones will be made again."""
        self.rows = [row for row in read_rows(self.folder) if row["step"] <= step]
        if self.writes:
            write_atomically(self.folder / LINES, "".join(json.dumps(row) + "\n" for row in self.rows))

    def add(self, row: Mapping[str, Any]) -> None:
        """Write one row."""
        self.rows.append(dict(row))
        if self.writes:
            with (self.folder / LINES).open("a") as file:
                file.write(json.dumps(dict(row)) + "\n")

    def finish(self) -> None:
        """Write the table and the picture."""
        if not self.writes or not self.rows:
            return
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        with (self.folder / TABLE).open("w", newline="") as file:
            writer = csv.DictWriter(file, names)
            writer.writeheader()
            writer.writerows(self.rows)
        try:
            (self.folder / CURVES).write_text(run_curves(self.rows))
        except ImportError:  # matplotlib comes with another extra
            return


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The metrics of a run's epochs, oldest first."""
    try:
        lines = (folder / LINES).read_text().splitlines()
    except FileNotFoundError:
        lines = []
    return [row for row in map(_row, lines) if row is not None]


def _row(line: str) -> dict[str, Any] | None:
    """One row; None for a line that a kill cut short."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None
