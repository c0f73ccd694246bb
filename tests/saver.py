"""A process that writes folders, for tests that kill it or run several.

``python saver.py save PLACE A B SAVES`` saves a network full of A's, then one full of B's, and so on.
``python saver.py kill PLACE KILLS SEED`` lets such processes start, kills each at a random moment of its first save or a
later one, and prints which network was in the folder after each kill, as JSON. Whatever is not whole raises.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import select
import signal
import sys
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


def save_alternately(place: str, values: tuple[float, float], saves: int, report: int) -> None:
    """Save two networks by turns, for ever if ``saves`` is 0; a byte is written to ``report`` before each save."""
    models = [network(value) for value in values]
    for count in range(saves) if saves else itertools.count():
        os.write(report, b".")
        tn.save(models[count % 2], place, metadata={"value": values[count % 2]})


def killed(place: str, chance: random.Random, duration: float) -> float:
    """Start a process that saves for ever, kill it, and tell which network is in the folder then."""
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            save_alternately(place, (2.0, 3.0), 0, writing)
        finally:
            os._exit(1)
    os.close(writing)
    os.read(reading, 1)  # the first save begins
    select.select([], [], [reading], chance.uniform(0, 3 * duration))  # of the child, nothing is said there: a timeout
    os.kill(process, signal.SIGKILL)
    _, status = os.waitpid(process, 0)
    os.close(reading)
    assert os.WIFSIGNALED(status), "the process ended by itself"
    return value_of(Path(place))


def main(verb: str, place: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    if verb == "save":
        first, second, saves = arguments
        save_alternately(place, (float(first), float(second)), int(saves), sys.stderr.fileno())
        return
    kills, seed = map(int, arguments)
    began = time.perf_counter()
    tn.save(network(1.0), place, metadata={"value": 1.0})
    duration, chance = time.perf_counter() - began, random.Random(seed)
    print(json.dumps([killed(place, chance, duration) for _ in range(kills)]))


if __name__ == "__main__":
    main(*sys.argv[1:])
