"""Processes that write folders, for tests that kill them or run several."""

from __future__ import annotations

import itertools
import os
import random
import select
import signal
import time
from pathlib import Path

import torch
from torch import nn

import thriftnet as tn
from thriftnet.store.model_file import read_config


def network(value: float) -> nn.Module:
    """A small network of which every parameter is ``value``."""
    model: nn.Module = tn.create_model("convmixer", dim=64, depth=4, patch_size=2, kernel_size=3, num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model.eval()


def value_in(folder: Path) -> float:
    """Which network is in the folder; `load` and this check that it is whole."""
    model = tn.load(folder)
    (value,) = {value for parameter in model.parameters() for value in parameter.detach().unique().tolist()}
    return float(value)


def value_of(folder: Path) -> float:
    """The same, where nobody else writes: config and weights are of one network."""
    value = value_in(folder)
    assert read_config(folder)["metadata"] == {"value": value}, "config and weights are of two networks"
    return value


def save_alternately(place: Path, values: tuple[float, float], saves: int, report: int | None = None) -> None:
    """Save two networks by turns, for ever if ``saves`` is 0; a byte is written to the pipe ``report`` before each save."""
    models = [network(value) for value in values]
    for count in range(saves) if saves else itertools.count():
        if report is not None:
            os.write(report, b".")
        tn.save(models[count % 2], place, metadata={"value": values[count % 2]})


def killed(place: Path, chance: random.Random, duration: float) -> float:
    """Start a process that saves for ever, kill it in its first, second or third save, and tell which network is there then."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            save_alternately(place, (2.0, 3.0), 0, writing)
        finally:
            os._exit(1)
    os.close(writing)
    for _ in range(chance.randint(1, 3)):
        os.read(reading, 1)  # a save begins
    select.select([], [], [], chance.uniform(0, duration))
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    os.close(reading)
    assert os.WIFSIGNALED(status), "the process ended by itself"
    return value_of(place)


def killed_savers(place: Path, kills: int, seed: int) -> list[float]:
    """Let processes save for ever, kill each at a random moment of one of its first saves; gives what was found then."""
    began = time.perf_counter()
    tn.save(network(1.0), place, metadata={"value": 1.0})
    duration, chance = time.perf_counter() - began, random.Random(seed)
    return [killed(place, chance, duration) for _ in range(kills)]
