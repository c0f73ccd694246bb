"""Kill -9 of a training at random times; taken up again, it ends with the same weights, bit by bit."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import torch

from faults.figure import Figure, Length, ended, forked, killed_after
from thriftnet.train import Recipe, TrainResult, train
from training import Net, source

RECIPE = {
    "batch_size": 16,
    "trackers": (),
    "validation": 0.25,
    "lr": 0.05,
    "epochs": 4,
    "ema_decay": 0.8,
    "mixup": 0.3,
    "cutmix": 0.3,
    "clip_grad": 1.0,
    "label_smoothing": 0.1,
    "augmentation": {"crop_padding": 1, "flip": True, "cutout": 2},
    "accumulate": 2,
    "checkpoint_every": 1,
}


def measure(folder: Path, seed: int, length: Length) -> Figure:
    figure = Figure(
        "Kill -9 of a training at a random time, with a checkpoint after each step",
        [
            "kills",
            "before the first checkpoint",
            "while writing a checkpoint",
            "after the end",
            "same weights and accuracy in the end",
        ],
    )
    wanted, seconds = _timed(folder)
    chance = random.Random(f"{seed}/trainings")
    early = writing = late = same = 0
    kills = length.pick(1, 20, 40)
    for kill in range(kills):
        place = folder / f"killed{kill}"
        code = killed_after(lambda report, place=place: _train_and_wait(place, report), chance.uniform(0, 1.05 * seconds))  # type: ignore[misc]
        figure.expect(code == -signal.SIGKILL, f"a training ended by itself with {code}")
        left = [path.name for path in (place / "checkpoints").glob("*")] if place.exists() else []
        early += not any(name.startswith("step-") for name in left)
        writing += any(name.startswith(".") for name in left)
        late += (place / "done").exists()
        outcome = _train(place)
        equal = outcome.weights_sha256 == wanted.weights_sha256 and outcome.top1 == wanted.top1
        same += equal
        figure.expect(equal, f"kill {kill}, with {left} left, ends with other weights")
    figure.rows.append([kills, early, writing, late, same])
    figure.notes.append(
        f"{wanted.steps} steps of a small network, {seconds:.1f} s in all, with dropout, mixup, cutmix, cropping, an averaged "
        "network and gradient accumulation in use; times are drawn evenly."
    )
    return figure


def _train(folder: Path) -> TrainResult:
    torch.manual_seed(0)
    return train(Recipe().replace(**RECIPE), source(), folder, model=Net(dropout=0.3), device="cpu")


def _train_and_wait(folder: Path, report: int) -> None:
    os.write(report, b".")
    _train(folder)
    (folder / "done").touch()
    signal.pause()


def _timed(folder: Path) -> tuple[TrainResult, float]:
    """The training undisturbed, and how long it takes in a process as those that are killed."""
    wanted = _train(folder / "whole")
    start = time.perf_counter()
    ended(forked(lambda: _train(folder / "timed") and None))
    return wanted, time.perf_counter() - start
