"""The training loop: one for every network, stage and number of processes, on Accelerate."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from thriftnet.core.penalty import penalty
from thriftnet.core.processes import failing_together
from thriftnet.errors import ConfigError, ThriftnetError
from thriftnet.train.checkpoints import Checkpoints, TrainState
from thriftnet.train.distributed import Distributed
from thriftnet.train.loss import Criterion, make_mixup
from thriftnet.train.optim import average_of, make_optimizer, make_schedule
from thriftnet.train.recipe import Recipe
from thriftnet.train.stages import Stage, Step

CHECK_EVERY = 10  # steps between checks that synchronise with the device or the other processes
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SIGNALS = (signal.SIGINT, signal.SIGTERM)


class DivergedError(ThriftnetError):
    """The loss is not finite."""


class Interrupted(KeyboardInterrupt):
    """The training was stopped, and its state is saved."""


class Interrupts:
    """The first Ctrl-C or SIGTERM stops the training after the current step, a second one at once."""

    def __init__(self) -> None:
        self.seen = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.seen:
            raise KeyboardInterrupt
        self.seen = True


@dataclass(frozen=True)
class Progress:
    """Progress of a training after a step."""

    step: int  # optimizer steps taken
    steps: int  # of the whole training
    epochs: float  # completed, as a fraction
    images: int  # in this step, over all processes
    row: Mapping[str, Any] | None = None  # metrics of the epoch, if it ends with this step


class TrainLoop:
    """The steps of a training, which can be interrupted and resumed.

    The network is trained in place, and is on its device; the loader gives the training batches of this process; checkpoints
    are written to the folder. Mixup needs the number of classes, distillation a teacher.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        recipe: Recipe,
        loader: Any,
        distributed: Distributed,
        folder: Path,
        *,
        classes: int,
        teacher: nn.Module | None = None,
        on_progress: Callable[[Progress], None] = lambda progress: None,
    ) -> None:
        self.recipe, self.stage, self.loader, self.distributed = recipe, stage, loader, distributed
        self.on_progress = on_progress
        self.steps_per_epoch = len(loader) // recipe.optimizer.accumulate
        if not self.steps_per_epoch:
            raise ConfigError(f"an epoch has {len(loader)} batches for each process, too few for a step: lower batch_size")
        self.steps = recipe.max_steps or recipe.epochs * self.steps_per_epoch
        self.memory_format = FORMATS[recipe.run.memory_format]
        self.dtype = torch.float64 if next(model.parameters()).dtype is torch.float64 else torch.float32
        self.plain = stage.trained(model.to(memory_format=self.memory_format))
        self.average = average_of(self.plain, recipe.optimizer.ema_decay, warmup=recipe.optimizer.ema_warmup)
        self.criterion, self.mixup = Criterion(recipe.loss, teacher), make_mixup(recipe.loss, classes)
        if recipe.run.compile:
            self.plain.compile()
        self.accelerator = distributed.accelerator
        optimizer = make_optimizer(self.plain, recipe.optimizer)
        schedule = make_schedule(optimizer, recipe, self.steps_per_epoch, self.steps / self.steps_per_epoch)
        self.model, self.optimizer, self.schedule = distributed.prepare(
            self.plain, optimizer, schedule, find_unused_parameters=recipe.run.find_unused_parameters or stage.passes > 1
        )
        self.state, self.images = TrainState(), 0
        self.checkpoints = Checkpoints(folder, self.accelerator, self.state, self.average, recipe.run.keep_checkpoints)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=distributed.device)
        self.last_loss = self.loss_sum
        self.first_bad = torch.full((), math.inf, dtype=torch.float64, device=distributed.device)
        alone_on_cpu = distributed.device.type == "cpu" and distributed.world_size == 1
        self.eager_checks = alone_on_cpu or recipe.run.on_nan == "skip"

    def resume(self, place: Path | None = None) -> tuple[Path | None, list[str]]:
        """Resume from a checkpoint, as `Checkpoints.load`."""
        found = self.checkpoints.load(place)
        self.loss_sum.fill_(self.state.loss_sum)
        if self.state.loader is not None:
            self.loader.load_state_dict(self.state.loader)
        return found

    @property
    def finished(self) -> bool:
        """Whether all steps are taken and the last epoch is evaluated."""
        return self.state.step >= self.steps and not self.state.epoch_ends

    @property
    def result(self) -> nn.Module:
        """The network to measure and save: the average of the weights if the recipe has one."""
        return self.plain if self.average is None else self.average.module

    def train_epoch(self, interrupts: Interrupts) -> dict[str, Any]:
        """Take the steps until the end of the epoch or of the training, and return the metrics; call `end_epoch` afterwards.

        Raises:
            Interrupted: Stopped by a signal; a checkpoint was written.
            DivergedError: A loss that is not finite.
            CheckpointError: A checkpoint cannot be written.
        """
        state, every = self.state, self.recipe.run.checkpoint_every
        self.stage.train_mode(self.plain)
        if not self._in_mid_epoch():
            self.loader.set_epoch(state.epoch)
            if self.recipe.optimizer.reset_momentum_every_epoch:
                self.optimizer.state.clear()
        batches = iter(self.loader)
        start, pause, seen = time.perf_counter(), 0.0, 0
        last = min((state.epoch + 1) * self.steps_per_epoch, self.steps)
        while state.step < last:
            self.images = self.step(batches)
            seen += self.images
            state.epoch_ends = state.step == last
            if self._stop_asked(interrupts):
                raise Interrupted(f"stopped after step {state.step}; checkpoint: {self._checkpoint()}")
            if not state.epoch_ends:
                if state.step % CHECK_EVERY == 0 and not self.eager_checks:
                    self._check()
                self.on_progress(Progress(state.step, self.steps, state.step / self.steps_per_epoch, self.images))
                if every and state.step % every == 0:
                    before = time.perf_counter()
                    self._checkpoint()
                    pause += time.perf_counter() - before
        self._check()
        seconds = time.perf_counter() - start - pause
        return {
            "epoch": round(state.step / self.steps_per_epoch, 4),
            "step": state.step,
            "train_loss": float(self.loss_sum) / max(state.loss_count, 1),
            "lr": state.lr,
            "images_per_second": round(seen / max(seconds, 1e-9), 1),
            "seconds": round(seconds, 3),
        } | ({"skipped": state.skipped} if state.skipped else {})

    def end_epoch(self, row: Mapping[str, Any]) -> None:
        """After the network was evaluated and kept: write a checkpoint."""
        state = self.state
        state.epoch = state.step // self.steps_per_epoch
        state.epoch_ends, state.loss_count = False, 0
        self.loss_sum.zero_()
        self._checkpoint()
        self.on_progress(Progress(state.step, self.steps, row["epoch"], self.images, row))

    def release(self) -> None:
        """Unwrap the network from Accelerate."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()

    def _in_mid_epoch(self) -> bool:
        return self.state.step != self.state.epoch * self.steps_per_epoch

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> int:
        """One optimizer step; returns the number of images over all processes."""
        fields, state = self.recipe.optimizer, self.state
        average = None if self.average is None else self.average.module
        batch = (state.step - state.epoch * self.steps_per_epoch) * fields.accumulate
        step = Step(self.model, self.plain, average, self.criterion, state.step, self.recipe.seed)
        self.optimizer.zero_grad()
        total, count = torch.zeros((), device=self.distributed.device), 0
        for number in range(fields.accumulate):
            with failing_together():
                images, targets = next(batches)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            images = images.to(self.dtype).contiguous(memory_format=self.memory_format)
            total = total + self._gradients(step, images, targets, number, self.loader.weight(batch + number))
            count += len(images)
        if self._good(total):
            if fields.clip_grad is not None:
                self.accelerator.clip_grad_norm_(self.plain.parameters(), fields.clip_grad)
            self.optimizer.step()
            if self.average is not None and not self.accelerator.optimizer_step_was_skipped:
                self.average.update_parameters(self.plain)
            self.loss_sum += total
            state.loss_count += 1
        else:
            state.skipped += 1
        self.last_loss, state.lr = total, self.schedule.get_last_lr()[0]
        self.schedule.step()
        state.step += 1
        return count * self.distributed.world_size

    def _gradients(self, step: Step, images: Tensor, targets: Tensor, number: int, weight: float) -> Tensor:
        """Add up the gradients of one batch; processes exchange them in the last backward of the step."""
        accumulate, passes, factor = self.recipe.optimizer.accumulate, self.stage.passes, self.recipe.loss.penalty
        losses = self.stage.losses(step, images, targets)
        total = torch.zeros((), device=self.distributed.device)
        for index in range(passes):
            first, last = number + index == 0, number == accumulate - 1 and index == passes - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = next(losses) * (weight / accumulate)
                if first and factor:
                    loss = loss + factor * penalty(self.plain)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _good(self, loss: Tensor) -> bool:
        """Whether to take the step; if reading the loss would synchronise, it is checked later, in `_check`."""
        if not self.eager_checks:
            bad = torch.full_like(self.first_bad, self.state.step)
            self.first_bad = torch.where(loss.isfinite(), self.first_bad, torch.minimum(self.first_bad, bad))
            return True
        finite = not self.distributed.any(not math.isfinite(float(loss)))
        if not finite and self.recipe.run.on_nan == "stop":
            self._diverged(self.state.step)
        return finite

    def _check(self) -> None:
        """Raise if a loss since the last check is not finite."""
        bad = float(self.first_bad)
        if self.distributed.any(math.isfinite(bad)):
            self._diverged(int(bad) if math.isfinite(bad) else self.state.step)

    def _diverged(self, step: int) -> None:
        raise DivergedError(
            f"the loss is not finite at step {step} (learning rate {self.schedule.get_last_lr()[0]:.3g}). Last good checkpoint: "
            f"{self.checkpoints.newest}. Lower lr, set clip_grad, or skip such steps with on_nan='skip'"
        )

    def _stop_asked(self, interrupts: Interrupts) -> bool:
        if self.distributed.world_size == 1:
            return interrupts.seen
        return self.state.step % CHECK_EVERY == 0 and self.distributed.any(interrupts.seen)

    def _checkpoint(self) -> Path:
        self._check()
        self.state.loss_sum = float(self.loss_sum)
        self.state.loader = self.loader.state_dict() if self._in_mid_epoch() else None
        return self.checkpoints.save()
