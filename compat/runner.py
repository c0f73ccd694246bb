"""Cells in processes of their own: a crash or a hang is a cell, too, and what is done is kept in a file."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import resource
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from compat.cell import Cell, Plain, measure
from compat.sample import Sample
from thriftnet.core.spec import format_spec

FORKED = multiprocessing.get_context("fork")  # the libraries are imported once
ROOT = Path(__file__).parent.parent
PATIENCE = 10  # times the limit of processor time, for what waits
MEMORY = 8 << 30  # bytes that a process may take

Configs = Mapping[str, Any]  # by the technique's name


class Cells:
    """The cells that are done, as lines of JSON in a file; begun again when the source has changed.

    Args:
        path: The file; None keeps them in memory.
        keep: Take cells of another source, too.
    """

    def __init__(self, path: Path | None, *, keep: bool = False) -> None:
        self.path, self.done = path, dict[tuple[str, str], Cell]()
        source = {"source": source_hash()}
        if path is None:
            return
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        if lines and (keep or json.loads(lines[0]) == source):
            for line in lines[1:]:
                if line.endswith("}"):  # the last may be cut
                    cell = Cell(**json.loads(line))
                    self.done[cell.network, cell.technique] = cell
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(source) + "\n", encoding="utf-8")

    def add(self, cell: Cell) -> None:
        """Keep a cell."""
        self.done[cell.network, cell.technique] = cell
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(cell.to_dict()) + "\n")


def source_hash() -> str:
    """Of everything that cells depend on."""
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "compat").rglob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def run_all(
    samples: Sequence[Sample],
    configs: Configs,
    cells: Cells,
    *,
    processes: int = 2,
    limit: float = 120.0,
    told: Callable[[Cell], None] = lambda cell: None,
) -> None:
    """Try every config on every network; what is done already is left out.

    Args:
        samples: The networks.
        configs: Configs by the names of their techniques.
        cells: Where the results go.
        processes: How many networks at a time.
        limit: Seconds of processor time for one cell; a busy machine makes no crashes.
        told: Called with every new cell.
    """
    waiting = [(sample, left) for sample in samples if (left := _left(sample, configs, cells))]
    running: dict[Connection, _Child] = {}
    try:
        while waiting or running:
            while waiting and len(running) < processes:
                child = _Child(*waiting.pop(0))
                running[child.receiving] = child
            for ready in wait(list(running), timeout=1.0):
                running[ready].receive()  # type: ignore[index]
            for connection, child in list(running.items()):
                if not child.ended and child.is_late(limit):
                    child.stop(f"no end within {limit:g} s of processor time, or {PATIENCE * limit:g} s")
                for cell in child.taken():
                    cells.add(cell)
                    told(cell)
                if child.ended:
                    del running[connection]
                    if left := _left(child.sample, child.configs, cells):
                        waiting.insert(0, (child.sample, left))
    finally:
        for child in running.values():
            child.stop("interrupted")


def _left(sample: Sample, configs: Configs, cells: Cells) -> Configs:
    return {name: config for name, config in configs.items() if (sample.name, format_spec(config)) not in cells.done}


class _Child:
    """A process that tries configs on one network."""

    def __init__(self, sample: Sample, configs: Configs) -> None:
        self.sample, self.configs = sample, configs
        self.receiving, sending = FORKED.Pipe(duplex=False)
        self.process = FORKED.Process(target=_work, args=(sample, configs, sending), daemon=True)
        self.process.start()
        sending.close()
        self.cells: list[Cell] = []
        self.missing = list(configs.values())
        self.since, self.ended = (time.monotonic(), 0.0), False

    def receive(self) -> None:
        """Take a message; at the end of all, the first cell that did not come is a crash."""
        try:
            cell = Cell(**self.receiving.recv())
        except (EOFError, OSError):
            self.process.join()
            self._finish(f"the process ended with code {self.process.exitcode}")
            return
        self.missing = [config for config in self.missing if format_spec(config) != cell.technique]
        self.cells.append(cell)
        self.since = time.monotonic(), self._cpu_seconds()

    def is_late(self, limit: float) -> bool:
        """Whether the cell being tried takes too long."""
        since, used = self.since
        return self._cpu_seconds() - used > limit or time.monotonic() - since > PATIENCE * limit

    def _cpu_seconds(self) -> float:
        try:
            fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self, why: str) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self._finish(why)

    def _finish(self, why: str) -> None:
        self.ended = True
        self.receiving.close()
        for config in self.missing[:1]:
            self.cells.append(Cell(self.sample.name, format_spec(config), verdict="crash", reason=why))

    def taken(self) -> list[Cell]:
        """The cells since the last call."""
        cells, self.cells = self.cells, []
        return cells


def _work(sample: Sample, configs: Configs, sending: Connection) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    os.environ.setdefault("TQDM_DISABLE", "1")
    resource.setrlimit(resource.RLIMIT_AS, (max(MEMORY, 4 * _used()), resource.RLIM_INFINITY))
    try:
        plain = Plain(sample)
    except Exception as error:
        for config in configs.values():
            reason = f"the plain network does not run: {type(error).__name__}: {error}"
            sending.send(Cell(sample.name, format_spec(config), "crash", "build", reason).to_dict())
        return
    for name, config in configs.items():
        sending.send(measure(sample, plain, config, name).to_dict())
        if not plain.copies:  # it was converted in place
            plain = Plain(sample)


def _used() -> int:
    """Bytes of address space of this process."""
    pages = Path("/proc/self/statm").read_text().split()[0] if Path("/proc/self/statm").exists() else 0
    return int(pages) * resource.getpagesize()
