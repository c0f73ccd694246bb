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
    """The state of a training beside its tensors."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0  # epochs completed
    epoch_ends: bool = False  # whether an epoch ends with this step, and the network is not yet evaluated and kept
    lr: float = 0.0  # learning rate of the last step
    loss_sum: float = 0.0  # over the steps of this epoch
    loss_count: int = 0  # steps of this epoch
    skipped: int = 0  # steps skipped because of their loss
    best: float = -1.0  # best accuracy so far on the images that the network is selected on, in percent; -1 for none
    loader: dict[str, Any] | None = None  # state of the training loader


class Checkpoints:
    """The checkpoints of one run, of which the newest are kept; all processes must call each method.

    The accelerator holds network and optimizer, ``average`` is the averaged network.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, state: TrainState, average: nn.Module | None, keep: int
    ) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep
        self.state, self.average = state, average

    @property
    def newest(self) -> str:
        """Name of the newest checkpoint, or "none"."""
        return max((place.name for place in self.folder.glob("step-*")), default="none")

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
        self._together(lambda: self.accelerator.save_state(str(draft)), place, draft)
        self._on_main(lambda: self._complete(draft, place), place, draft)
        self._on_main(lambda: self._remove_old(place), place)
        return place

    def load(self, place: Path | None) -> tuple[Path | None, list[str]]:
        """Restore everything from a checkpoint; returns its path, and descriptions of corrupt ones.

        Args:
            place: The checkpoint; None: the newest intact one, if there are any.

        Raises:
            CheckpointError: It is corrupt (all are), or does not fit the network or the number of processes.
        """
        self._on_main(lambda: _remove(self.folder.glob(".step-*")), self.folder)
        problems: list[str] = []
        for candidate in sorted(self.folder.glob("step-*"), reverse=True) if place is None else [place]:
            problem = damage(candidate)
            if not problem:
                self._restore(candidate)
                return candidate, problems
            if place is not None:
                raise CheckpointError(f"{place} cannot be used: {problem}")
            problems.append(f"{candidate.name} is not used: {problem}")
        if problems:
            raise CheckpointError(f"none of the checkpoints in {self.folder} is intact: {'; '.join(problems)}")
        return None, problems

    def _restore(self, place: Path) -> None:
        if not (place / f"random_states_{self.accelerator.process_index}.pkl").exists():
            raise CheckpointError(f"{place} was written by fewer processes: start as many as before")
        try:
            self.accelerator.load_state(str(place))
            vars(self.state).update(json.loads((place / STATE).read_text()))
            if self.average is not None:
                self.average.load_state_dict(torch.load(place / AVERAGE, map_location="cpu", weights_only=True))
        except (OSError, RuntimeError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
            raise CheckpointError(f"{place} does not fit this training: {' '.join(str(error).split())[:300]}") from error

    def _complete(self, draft: Path, place: Path) -> None:
        """Write what Accelerate does not hold and the manifest, sync all files, and give the folder its name."""
        (draft / STATE).write_text(json.dumps(asdict(self.state)) + "\n")
        if self.average is not None:
            torch.save(self.average.state_dict(), draft / AVERAGE)
        files = sorted(path for path in draft.iterdir() if path.is_file())
        (draft / MANIFEST).write_text(json.dumps({path.name: sha256_of(path) for path in files}, indent=1) + "\n")
        for path in [*files, draft / MANIFEST, draft]:
            sync(path)
        draft.rename(place)
        sync(place.parent)

    def _remove_old(self, newest: Path) -> None:
        replaced = list(self.folder.glob(f"{newest.name}-*"))  # of the same step, before its evaluation
        _remove([*replaced, *sorted({*self.folder.glob("step-*")} - {*replaced}, reverse=True)[self.keep :]])

    def _on_main(self, action: Callable[[], object], place: Path, draft: Path | None = None) -> None:
        """Call a function on the main process; raise on all processes if it fails."""
        self._together(action if self.accelerator.is_main_process else lambda: None, place, draft)

    def _together(self, action: Callable[[], object], place: Path, draft: Path | None) -> None:
        """Call a function on each process, and wait for all; raise on each of them if it fails on one."""
        from accelerate.utils import gather_object

        error = ""
        try:
            action()
        except (OSError, RuntimeError, SafetensorError) as problem:  # torch raises RuntimeError where it cannot write
            error = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        errors = [text for text in gather_object([error]) if text]
        if not errors:
            return
        if draft is not None and self.accelerator.is_main_process:
            _remove([draft])
        raise CheckpointError(
            f"cannot write {place}: {' '.join(errors[0].split())[:200]}. Last good checkpoint: {self.newest}. "
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
