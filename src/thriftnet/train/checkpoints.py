"""Checkpoints of a training: complete or absent, verified before they are used, newest first.

A checkpoint is a folder ``step-000000120`` of what Accelerate saves (weights, optimizer, schedule, random states of each process)
with the loop's own state, and a manifest of hashes that is written last.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn

from thriftnet.errors import CheckpointError
from thriftnet.files import sha256_of, sync

if TYPE_CHECKING:
    from accelerate import Accelerator

MANIFEST, STATE, AVERAGE = "manifest.json", "state.json", "average.pt"


@dataclass
class TrainState:
    """The state of a training beside its tensors.

    Args:
        step: Optimizer steps taken.
        epoch: Epochs completed.
        epoch_ends: Whether the epoch (or the training) ends with this step, and the network is not yet evaluated and kept.
        lr: Learning rate of the last step.
        loss_sum: Over the steps of this epoch.
        loss_count: Steps of this epoch.
        skipped: Steps skipped because of their loss.
        best: Best accuracy so far on the images that the network is selected on, in percent; -1 for none.
        loader: State of the training loader.
    """

    step: int = 0
    epoch: int = 0
    epoch_ends: bool = False
    lr: float = 0.0
    loss_sum: float = 0.0
    loss_count: int = 0
    skipped: int = 0
    best: float = -1.0
    loader: dict[str, Any] | None = None

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)) + "\n")

    def read(self, path: Path) -> None:
        for name, value in json.loads(path.read_text()).items():
            setattr(self, name, value)


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: Their folder.
        accelerator: Holds network and optimizer; all processes must call each method.
        state: The loop's.
        average: The averaged network, or None.
        keep: How many of the newest are kept.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, state: TrainState, average: nn.Module | None, keep: int
    ) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep
        self.state, self.average = state, average

    def save(self) -> Path:
        """Write a checkpoint of the current state.

        Raises:
            CheckpointError: It cannot be written; earlier ones are unchanged.
        """
        name = f"step-{self.state.step:09d}"
        place = self.folder / (f"{name}-before-evaluation" if self.state.epoch_ends else name)
        if place.exists():
            return place
        draft = self.folder / f".{place.name}.draft"
        self._on_main(lambda: _new_folder(draft), place)
        error = ""
        try:
            self.accelerator.save_state(str(draft))
            if self.accelerator.is_main_process:
                self.state.write(draft / STATE)
                if self.average is not None:
                    torch.save(self.average.state_dict(), draft / AVERAGE)
        except (OSError, RuntimeError, SafetensorError) as problem:  # torch raises RuntimeError where it cannot write
            error = str(problem) or type(problem).__name__
        self._agree(error, place, draft)
        self._on_main(lambda: _complete(draft, place), place, draft)
        self._on_main(lambda: self._remove_old(place), place)
        return place

    def load_newest(self) -> tuple[Path | None, list[str]]:
        """Load the newest intact checkpoint, and describe each corrupt one.

        Raises:
            CheckpointError: There are checkpoints, and all are corrupt.
        """
        self._on_main(lambda: _remove(self.folder.glob(".step-*")), self.folder)
        places = sorted(self.folder.glob("step-*"), reverse=True)
        problems: list[str] = []
        for place in places:
            problem = damage(place)
            if not problem:
                self.load(place)
                return place, problems
            problems.append(f"{place.name} is not used: {problem}")
        if problems:
            raise CheckpointError(f"none of the checkpoints in {self.folder} is intact: {'; '.join(problems)}")
        return None, problems

    def load(self, place: Path) -> None:
        """Restore everything that was saved.

        Raises:
            CheckpointError: It is corrupt, or does not fit the network or the number of processes.
        """
        problem = damage(place)
        if problem:
            raise CheckpointError(f"{place} cannot be used: {problem}")
        if not (place / f"random_states_{self.accelerator.process_index}.pkl").exists():
            raise CheckpointError(f"{place} was written by fewer processes: start as many as before")
        try:
            self.accelerator.load_state(str(place))
            self.state.read(place / STATE)
            if self.average is not None:
                self.average.load_state_dict(torch.load(place / AVERAGE, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
            raise CheckpointError(f"{place} does not fit this training: {' '.join(str(error).split())[:300]}") from error

    def _remove_old(self, newest: Path) -> None:
        replaced = list(self.folder.glob(f"{newest.name}-*"))  # of the same step, before its evaluation
        _remove([*replaced, *sorted({*self.folder.glob("step-*")} - {*replaced}, reverse=True)[self.keep :]])

    def _on_main(self, action: Callable[[], None], place: Path, draft: Path | None = None) -> None:
        """Call a function on the main process; raise on all processes if it fails."""
        error = ""
        if self.accelerator.is_main_process:
            try:
                action()
            except OSError as problem:
                error = problem.strerror or str(problem)
        self._agree(error, place, draft)

    def _agree(self, error: str, place: Path, draft: Path | None) -> None:
        """Wait for all processes; raise on each of them if one has an error."""
        from accelerate.utils import gather_object

        errors = [text for text in gather_object([error]) if text]
        if not errors:
            return
        if draft is not None and self.accelerator.is_main_process:
            _remove([draft])
        kept = [p.name for p in sorted(self.folder.glob("step-*"))]
        raise CheckpointError(
            f"cannot write {place}: {' '.join(errors[0].split())[:200]}. Last good checkpoint: {kept[-1] if kept else 'none'}. "
            "Make room or repair the folder, then start the same command again"
        )


def damage(place: Path) -> str:
    """Why a checkpoint is corrupt; "" if it is intact."""
    try:
        manifest = json.loads((place / MANIFEST).read_text())
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError):
        return f"its {MANIFEST} cannot be read"
    if not isinstance(manifest, dict) or not manifest:
        return f"its {MANIFEST} lists nothing"
    for name, expected in manifest.items():
        try:
            found = sha256_of(place / Path(name).name)
        except OSError:
            return f"{name} is missing"
        if found != expected:
            return f"{name} is damaged"
    return ""


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder(draft: Path) -> None:
    _remove([draft])
    draft.mkdir(parents=True)


def _complete(draft: Path, place: Path) -> None:
    """Write the manifest, sync all files, and give the folder its name."""
    files = sorted(path for path in draft.iterdir() if path.is_file())
    (draft / MANIFEST).write_text(json.dumps({path.name: sha256_of(path) for path in files}, indent=1) + "\n")
    for path in [*files, draft / MANIFEST, draft]:
        sync(path)
    draft.rename(place)
    sync(place.parent)
