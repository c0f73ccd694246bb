"""Training: the loop against a bare one, what low precision and layout bring, and memory."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import Case, Fact, Ratio, Settings, Target
from thriftnet.models import create_model
from thriftnet.train.distributed import Distributed
from thriftnet.train.loop import TrainLoop
from thriftnet.train.optim import make_optimizer
from thriftnet.train.recipe import recipe_from
from thriftnet.train.stages import Stage

TOPIC = "train"
P6T = Target("P6t", "ResNet20 training step: fp32 NCHW against bf16 channels_last", 2.2, "at least")
OVERHEAD = Target("loop", "the loop's steps against a bare loop's", 1.03)
MEMORY = Target("memory", "peak memory of training, the loop against a bare loop", 1.05)
STEPS = 2
STATUS = Path("/proc/self/status")  # Linux only
RECIPE = recipe_from({"max_steps": 10**6, "schedule": "constant", "trackers": (), "select_on": "last"})


def cases(settings: Settings) -> Iterator[Case | Fact]:
    """The topic's cases."""
    if settings.sweep:
        return
    count = 16 if settings.quick else 128
    with tempfile.TemporaryDirectory() as folder:
        yield overhead_case(count, Path(folder), settings)
    yield precision_case(count, settings)
    if settings.device == "cpu" and STATUS.exists():
        bare, ours = (peak_memory(variant, count) for variant in ("bare", "loop"))
        yield Fact(TOPIC, f"memory that training ResNet20 adds, batch {count}", ours / bare, MEMORY)


def overhead_case(count: int, folder: Path, settings: Settings) -> Case:
    """The same network on the same batch; both take their optimizer steps, and must have the same loss."""
    torch.manual_seed(0)
    model = create_model("resnet20")
    images, labels = torch.randn(count, 3, 32, 32), torch.arange(count) % 10
    variants = {
        "bare loop": bare_loop(copy.deepcopy(model), images, labels, settings.device),
        "thriftnet": our_loop(model, images, labels, folder, settings.device),
    }
    ratio = Ratio("thriftnet", "bare loop", OVERHEAD)
    return Case(TOPIC, f"{STEPS} training steps of ResNet20, batch {count}", variants, [ratio], 15, tolerance=1e-5)


def bare_loop(model: nn.Module, images: Tensor, labels: Tensor, device: str) -> Callable[[], Tensor]:
    """What one writes without a library."""
    model, images, labels = model.to(device).train(), images.to(device), labels.to(device)
    optimizer = make_optimizer(model, RECIPE.optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    def run() -> Tensor:
        loss = torch.zeros(())
        for _ in range(STEPS):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return loss.detach()

    return run


class OneBatch:
    """A loader that gives one batch for ever."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.batch = images, labels

    def __len__(self) -> int:
        return 10**6

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return repeat(self.batch)

    def weight(self, batch: int) -> float:
        return 1.0


def our_loop(model: nn.Module, images: Tensor, labels: Tensor, folder: Path, device: str) -> Callable[[], Tensor]:
    """The library's steps."""
    loader = OneBatch(images.to(device), labels.to(device))
    distributed = Distributed(device, "fp32")
    loop = TrainLoop(model.to(device).train(), Stage(), RECIPE, loader, distributed, folder, classes=10)
    batches = iter(loader)

    def run() -> Tensor:
        for _ in range(STEPS):
            loop.step(batches)
        return loop.last_loss

    return run


def precision_case(count: int, settings: Settings) -> Case:
    """Forward, backward and optimizer step; the losses agree to bf16's precision."""
    torch.manual_seed(0)
    model = create_model("resnet20").to(settings.device)
    images, labels = torch.randn(count, 3, 32, 32, device=settings.device), torch.arange(count, device=settings.device) % 10
    variants = {
        "fp32 NCHW": step(copy.deepcopy(model), images, labels, torch.contiguous_format, None),
        "fp32 channels_last": step(copy.deepcopy(model), images, labels, torch.channels_last, None),
        "bf16 channels_last": step(copy.deepcopy(model), images, labels, torch.channels_last, torch.bfloat16),
    }
    ratios = [Ratio("fp32 NCHW", "bf16 channels_last", P6T), Ratio("fp32 NCHW", "fp32 channels_last")]
    return Case(TOPIC, f"training step of ResNet20, batch {count}", variants, ratios, 11, tolerance=0.05)


def step(
    model: nn.Module, images: Tensor, labels: Tensor, layout: torch.memory_format, precision: torch.dtype | None
) -> Callable[[], Tensor]:
    """One training step in a layout and a precision."""
    model = model.train().to(memory_format=layout)
    images = images.contiguous(memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), 1e-4, momentum=0.9, nesterov=True)

    def run() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, precision or torch.bfloat16, enabled=precision is not None):
            loss = F.cross_entropy(model(images).float(), labels)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return run


def peak_memory(variant: str, count: int) -> float:
    """MiB that training adds to a fresh process that has imported everything."""
    script = f"from benchmarks.train import added_memory; added_memory({variant!r}, {count})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def added_memory(variant: str, count: int) -> None:
    """Print the memory of some steps in this process, in MiB."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = torch.randn(count, 3, 32, 32), torch.arange(count) % 10
    model: Any = create_model("resnet20")
    Distributed("cpu", "fp32")
    before = peak_mebibytes()
    with tempfile.TemporaryDirectory() as folder:
        make: Any = bare_loop if variant == "bare" else our_loop
        places = () if variant == "bare" else (Path(folder),)
        run = make(model, images, labels, *places, "cpu")
        for _ in range(3):
            run()
    sys.stdout.write(json.dumps(peak_mebibytes() - before) + "\n")


def peak_mebibytes() -> float:
    """Largest memory of this process so far. (What `resource` says includes the process that started this one.)"""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return float(line.split()[1]) / 1024
