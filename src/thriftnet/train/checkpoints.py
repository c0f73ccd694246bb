"""Checkpoints of a training: each is one file, complete or absent, verified before it is used; the newest are kept.

A checkpoint is a file `step-000000120.safetensors` as `thriftnet.store.sealed` writes it: JSON in which tensors are named.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from thriftnet.errors import CheckpointError, ThriftnetError, first_line
from thriftnet.files import open_regular, write_atomically
from thriftnet.store import sealed

if TYPE_CHECKING:
    from accelerate import Accelerator

FORMAT, VERSION, CONTENT = "thriftnet_checkpoint", 1, "content"
PATTERN = "step-*.safetensors"
TENSOR = "tensor"  # {"tensor": name} in the JSON


class Checkpoints:
    """The checkpoints of one run; all processes must call each method."""

    def __init__(self, folder: Path, accelerator: Accelerator, keep: int) -> None:
        self.folder, self.accelerator, self.keep = folder, accelerator, keep
        self.last: Path | None = None  # that was written or restored here

    def save(self, step: int, content: Mapping[str, Any]) -> None:
        """Write the checkpoint of a step, or replace it, and remove old ones.

        Raises:
            CheckpointError: It cannot be written; earlier ones are unchanged.
        """
        from accelerate.utils import gather_object

        place, error = self.folder / f"step-{step:09d}.safetensors", ""
        try:
            if self.accelerator.is_main_process:
                write_atomically(place, encode(content))
                self._remove_old(place)
        except OSError as problem:
            error = problem.strerror or str(problem)
        if errors := [text for text in gather_object([error]) if text]:
            raise CheckpointError(
                f"cannot write {place}: {errors[0]}. Last good checkpoint: {self.last or 'none'}. "
                "Make room or repair the folder, then start the same command again"
            )
        self.last = place

    def load(self, place: Path | None, restore: Callable[[Any], None]) -> list[str]:
        """Restore the content of a checkpoint; returns descriptions of corrupt ones.

        Args:
            place: The checkpoint; None: the newest intact one, if there are any.
            restore: Takes what was given to `save`, and raises if that does not fit.

        Raises:
            CheckpointError: It is corrupt (all are), or does not fit the training.
        """
        problems: list[str] = []
        for candidate in sorted(self.folder.glob(PATTERN), reverse=True) if place is None else [place]:
            try:
                content = read(candidate)
            except CheckpointError as error:
                if place is not None:
                    raise
                problems.append(f"{candidate.name} is not used: {error}")
                continue
            try:
                restore(content)
            except ThriftnetError:
                raise
            except Exception as error:  # whatever foreign content makes optimizers and networks raise
                problem = " ".join(f"{type(error).__name__} {first_line(error)}".split())[:300]
                raise CheckpointError(f"{candidate} does not fit this training: {problem}") from error
            self.last = candidate
            return problems
        if problems:
            raise CheckpointError(f"none of the checkpoints in {self.folder} is intact: {'; '.join(problems)}")
        return problems

    def _remove_old(self, written: Path) -> None:
        """Remove all but the one that was just written and, beside it, the newest intact ones."""
        kept = 1
        for place in sorted({*self.folder.glob(PATTERN)} - {written}, reverse=True):
            if kept == self.keep:
                place.unlink()
            else:
                kept += is_intact(place)


def encode(content: Mapping[str, Any]) -> bytes:
    """The file of a checkpoint: anything that JSON can hold, with tensors in it."""
    tensors: dict[str, Tensor] = {}

    def name(value: object) -> dict[str, str]:
        if not isinstance(value, Tensor):
            raise CheckpointError(f"a checkpoint cannot hold a {type(value).__name__}: choose another optimizer")
        tensors[str(len(tensors))] = value.detach().cpu().contiguous()
        return {TENSOR: str(len(tensors) - 1)}

    plain = json.loads(json.dumps(content, default=name))
    return sealed.encode({sealed.SEAL: "", FORMAT: VERSION, CONTENT: plain}, tensors, "a checkpoint")


def read(path: Path) -> Any:
    """The content of a checkpoint.

    Raises:
        CheckpointError: It is missing, damaged, or of a newer format.
    """
    data = _content(path)
    text, tensors = sealed.verified(data, path), sealed.tensors_in(data, path)
    try:
        facts = json.loads(text, object_hook=lambda fields: tensors[fields[TENSOR]] if [*fields] == [TENSOR] else fields)
        if facts[FORMAT] == VERSION:
            return facts[CONTENT]
    except (ValueError, RecursionError, KeyError, TypeError):
        pass
    raise CheckpointError(f"{path} is not a checkpoint that this version of thriftnet reads: start with another --output")


def is_intact(path: Path) -> bool:
    """Whether a file is whole."""
    try:
        sealed.verified(_content(path), path)
    except CheckpointError:
        return False
    return True


def _content(path: Path) -> bytes:
    try:
        with open_regular(path) as file:
            return file.read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
