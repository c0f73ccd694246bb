"""Public functions called with values that make no sense, each in a process of its own."""

from __future__ import annotations

import inspect
import os
import random
import resource
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import thriftnet as tn
from faults.figure import Figure, Length, address_space, ended, forked, names_in
from thriftnet.arguments import shown
from thriftnet.data.augmentation import Augmentation
from thriftnet.data.sources import open_data
from thriftnet.dynamic.search import Evolution
from thriftnet.train import list_recipes, load_recipe, train
from thriftnet.train.recipe import Recipe

LONGEST, BACKSTOP = 10, 120  # seconds for one call: of processor time, and in all
MEMORY = 4 << 30  # bytes of address space that a call may add
RIGHT = 0.5  # probability of a value that fits, so that the first bad argument is not always the first one
VERBS = [getattr(tn, name) for name in tn.__all__ if name != "TECHNIQUES" and not name.endswith("Error")]
CALLED: list[Callable[..., Any]] = [
    *(each for each in VERBS if each not in (tn.push_to_hub, tn.from_pretrained)),  # they ask the network
    *(Augmentation, Evolution, Recipe, load_recipe, list_recipes, open_data, train),
]


def measure(folder: Path, seed: int, length: Length) -> Figure:
    figure = Figure(
        "Calls of public functions with values that make no sense",
        ["function", "calls", "refused", "carried out", "failures"],
    )
    open_data("digits")  # what it imports takes seconds, which would count as those of a call
    counts: dict[str, Counter[str]] = {}
    for number in range(length.pick(60, 1000, 5000)):
        draw = random.Random(f"{seed} {number}")
        function = draw.choice(CALLED)
        place = folder / str(number)
        place.mkdir()
        outcome = _called(function, draw, place)
        row = counts.setdefault(function.__name__, Counter())
        row[outcome if outcome in ("refused", "carried out") else "failures"] += 1
        figure.expect(outcome in ("refused", "carried out"), f"call {number} of seed {seed}: {outcome}")
    kinds = ("refused", "carried out", "failures")
    figure.rows = [[name, row.total(), *(row[kind] for kind in kinds)] for name, row in sorted(counts.items())]
    figure.notes.append(
        "A failure is an exception other than ThriftnetError, no answer within 10 s of processor time, 4 GB of memory "
        "more, or a file that is left behind by a call that was refused."
    )
    return figure


def _called(function: Callable[..., Any], draw: random.Random, place: Path) -> str:
    """What became of one call: "refused", "carried out", or what should not have happened."""
    reading, writing = os.pipe()
    child = forked(lambda: os.write(writing, _outcome(function, draw, place).encode("utf-8", "replace")) and None)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        text = answer.read().decode("utf-8", "replace")
    code = ended(child)
    if code in (-signal.SIGPROF, -signal.SIGALRM):
        return f"{function.__name__}: no answer after {LONGEST} s of processor time"
    return text or f"{function.__name__}: the process ended with {code}"


def _outcome(function: Callable[..., Any], draw: random.Random, place: Path) -> str:
    os.chdir(place)
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1), os.dup2(devnull, 2)
    arguments = _arguments(function, draw)
    before = names_in(place)
    most = address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    signal.setitimer(signal.ITIMER_PROF, LONGEST)
    signal.alarm(BACKSTOP)
    parameters = inspect.signature(function).parameters
    positional = [
        name for name in arguments if name in parameters and parameters[name].kind is inspect.Parameter.POSITIONAL_ONLY
    ]
    try:
        function(*(arguments.pop(name) for name in positional), **arguments)
    except tn.ThriftnetError as error:
        if "\n" in str(error):
            return f"{_written(function, arguments)}: an error of several lines: {str(error)[:200]}"
        left = sorted({*names_in(place)} - {*before})
        return f"{_written(function, arguments)} was refused and left {left}" if left else "refused"
    except BaseException as error:
        return f"{_written(function, arguments)}: {type(error).__name__}: {str(error)[:200]}"
    return "carried out"


def _arguments(function: Callable[..., Any], draw: random.Random) -> dict[str, Any]:
    """Values for the parameters: all that have no default, and some of the others."""
    arguments = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            if draw.random() < 0.5 and function in (tn.create_model, load_recipe):
                key = draw.choice(
                    ["depth", "width", "num_classes", "in_chans"]
                    if function is tn.create_model
                    else ["lr", "epochs", "mean"]
                )
                arguments[key] = draw.choice(nasty())
        elif parameter.default is parameter.empty or draw.random() < 0.4:
            fitting = right(function).get(name)
            arguments[name] = fitting if fitting is not None and draw.random() < RIGHT else draw.choice(nasty())
    return arguments


def _written(function: Callable[..., Any], arguments: dict[str, Any]) -> str:
    return f"{function.__name__}({', '.join(f'{name}={shown(value)}' for name, value in arguments.items())})"


def nasty() -> Sequence[Any]:
    """Values that hardly any argument may have."""
    recursive: list[Any] = []
    recursive.append(recursive)
    odd = [torch.zeros(2, dtype=torch.bfloat16), torch.tensor(True), torch.zeros(0), torch.tensor(float("nan"))]
    texts = [
        "",
        " ",
        "x" * 5000,
        "\ud800",
        "a\0b",
        "../..",
        "~nouser/x",
        "shift(",
        "nothing:",
        "1e400",
        "None",
        "-",
        "*[",
        "(?P<",
        "é\n",
    ]
    numbers = [True, -1, 0, 1, 3, 2**31, 2**70, -(2**70), 10**5000, 0.0, -0.5, 0.3, 1e308, float("nan"), float("inf"), 1j]
    return [
        *(
            None,
            b"\xff",
            [],
            (),
            {},
            {"technique": "shift"},
            {"mean": [1]},
            {1},
            object(),
            object,
            lambda *_: 1 / 0,
            int,
            range(10**9),
        ),
        *(
            nn.Identity(),
            nn.Identity,
            nn.Sequential(),
            nn.Linear(2, 2),
            tn.SoftSharing,
            recursive,
            Path("nothing/here"),
            Path("/"),
        ),
        *([None], [1, 2, 3], (3, 32, 32), [float("nan")] * 3, ["a", "a"], [[]], {"a": {}}, iter(()), NotImplemented, ...),
        *odd,
        *texts,
        *numbers,
    ]


def right(function: Callable[..., Any]) -> dict[str, Any]:
    """Values that fit, by the names of parameters."""
    small = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
    model = nn.Sequential(small, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)).eval()
    return {
        "model": "resnet20" if function is Recipe else model,
        "technique": ("shift",) if function is Recipe else "soft-sharing(templates=2)",
        "name": "digits" if function is load_recipe else "resnet20",
        "source": "resnet20",
        "folder": "saved",
        "path": "checkpoint.pth",
        "spec": "digits",
        "data": "digits",
        "output": "run",
        "pattern": "*",
        "num_classes": 3,
        "weight_decay": 0.1,
        "threshold": 0.9,
        "macs": 1e6,
        "score": lambda _: 0.5,
        "loader": [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]))],
        "recipe": Recipe(epochs=1),
        "input_size": (3, 8, 8),
        "num_templates": 2,
        "in_planes": 4,
        "out_planes": 4,
        "bank": tn.TemplateBank(2, 4, 4, 3),
        "channels": 9,
        "in_channels": 4,
        "out_channels": 4,
        "kernel_size": 3,
        "stride": 1,
        "width": 1.0,
        "inplace": True,
        "seed": 0,
        "like": nn.Conv2d(4, 4, 3),
        "layer": 0,
        "base": 0,
        "coefficients": torch.zeros(4, 2),
        "select": "1",
        "depth": 20,
    }
