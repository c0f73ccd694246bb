"""The training loop: one for every network, stage and number of processes, on Accelerate."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from thriftnet.core.penalty import penalty
from thriftnet.errors import ConfigError, ThriftnetError
from thriftnet.train.loss import Criterion, make_mixup
from thriftnet.train.memory_format import FORMATS
from thriftnet.train.optim import make_optimizer
from thriftnet.train.processes import Distributed
from thriftnet.train.recipe import Recipe
from thriftnet.train.record import MetricsLog
from thriftnet.train.schedules import make_schedule
from thriftnet.train.stages import Stage, Step
from thriftnet.train.state import Checkpoints, TrainState
from thriftnet.train.stop import Interrupted, Interrupts
from thriftnet.train.sync_norm import synchronised

CHECK_EVERY = 10  # steps between looks at what makes the device or the other processes wait


class DivergedError(ThriftnetError):
    """The loss is no number."""


@dataclass(frozen=True)
class Progress:
    """What is shown while training, after each step.

    Args:
        step: Optimizer steps taken.
        steps: Of the whole training.
        epochs: Epochs completed, as a fraction.
        images: Seen in this step by all processes.
        loss: Of a recent step; None where it was not looked at.
        row: Metrics of an epoch that ends with this step.
    """

    step: int
    steps: int
    epochs: float
    images: int
    loss: float | None = None
    row: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Hooks:
    """What the loop asks others to do.

    Args:
        score: Measures a network on held-out images; gives at least ``top1`` in percent.
        keep: Saves a network that is the best so far (or the last), with its metrics.
        watch: Is told of each step.
    """

    score: Callable[[nn.Module], dict[str, Any]]
    keep: Callable[[nn.Module, Mapping[str, Any]], None]
    watch: Callable[[Progress], None]


class TrainLoop:
    """A training, to be started, interrupted and taken up again.

    Args:
        model: Trained in place; on its device. Ends as the network that was kept.
        stage: What one step does.
        recipe: Everything else about how.
        loader: Training batches of this process.
        processes: This one among the others.
        folder: Of the run.
        hooks: What is done beside the steps.
        memory_format: Of weights and images.
        classes: How many, for mixup.
        teacher: For distillation.
    """

    def __init__(
        self,
        model: nn.Module,
        stage: Stage,
        recipe: Recipe,
        loader: Any,
        processes: Distributed,
        folder: Path,
        hooks: Hooks,
        *,
        memory_format: str = "contiguous",
        classes: int,
        teacher: nn.Module | None = None,
    ) -> None:
        self.recipe, self.stage, self.loader, self.processes, self.hooks = recipe, stage, loader, processes, hooks
        self.steps_per_epoch = len(loader) // recipe.accumulate
        if not self.steps_per_epoch:
            raise ConfigError(f"an epoch has {len(loader)} batches for each process, too few for a step: lower batch_size")
        self.steps = recipe.max_steps or recipe.epochs * self.steps_per_epoch
        self.memory_format = FORMATS[memory_format]
        self.dtype = torch.float64 if next(model.parameters()).dtype is torch.float64 else torch.float32
        self.plain = stage.trained(model.to(memory_format=self.memory_format))
        self.average = average_of(self.plain, recipe.ema_decay, warmup=recipe.ema_warmup)
        self.criterion, self.mixup = Criterion(recipe, teacher), make_mixup(recipe, classes)
        if recipe.compile:
            self.plain.compile()
        self.accelerator = processes.accelerator
        optimizer = make_optimizer(self.plain, recipe)
        schedule = make_schedule(optimizer, recipe, self.steps_per_epoch, self.steps / self.steps_per_epoch)
        self.model, self.optimizer, self.schedule = processes.prepare(
            self.plain, optimizer, schedule, find_unused_parameters=recipe.find_unused_parameters or stage.partial
        )
        self.position = TrainState()
        self.checkpoints = Checkpoints(
            folder / "checkpoints", self.accelerator, self.position, self.average, recipe.keep_checkpoints
        )
        self.record = MetricsLog(folder, writes=processes.is_main)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=processes.device)
        self.last_loss, self.last_lr = self.loss_sum, recipe.lr
        self.first_bad = torch.full((), math.inf, dtype=torch.float64, device=processes.device)
        self.eager_checks = (processes.device.type == "cpu" and processes.world_size == 1) or recipe.on_nan == "skip"

    def resume(self, place: Path | None = None) -> tuple[Path | None, list[str]]:
        """Take up the newest whole checkpoint, or a given one; says which, and which were not whole.

        Raises:
            CheckpointError: None is whole, or it does not fit.
        """
        problems: list[str] = []
        if place is None:
            place, problems = self.checkpoints.load_newest()
        else:
            self.checkpoints.load(place)
        self.loss_sum.fill_(self.position.loss_sum)
        if self.position.loader is not None:
            self.loader.load_state_dict(self.position.loader)
        self.record.resume(self.position.step)
        return place, problems

    def run(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: Stopped by a signal; a checkpoint was written.
            DivergedError: A loss that is no number.
            CheckpointError: A checkpoint cannot be written.
        """
        with synchronised(self.plain, self.recipe.sync_batchnorm), Interrupts() as interrupts:
            while self.position.step < self.steps:
                self._epoch(interrupts)
        self.record.finish()

    def result(self) -> nn.Module:
        """What was trained, as it is measured and saved: averaged where the recipe averages."""
        return self.plain if self.average is None else self.average.module

    def release(self) -> None:
        """Take Accelerate's wrapping off the network."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)
        self.accelerator.free_memory()

    def _epoch(self, interrupts: Interrupts) -> None:
        """Steps until the end of an epoch or of the training."""
        position, recipe = self.position, self.recipe
        self.stage.train_mode(self.plain)
        if not self._in_mid_epoch():
            self.loader.set_epoch(position.epoch)
            if recipe.reset_momentum_every_epoch:
                self.optimizer.state.clear()
        batches = iter(self.loader)
        start, pause, images, seen = time.perf_counter(), 0.0, 0, 0
        while position.step - position.epoch * self.steps_per_epoch < self.steps_per_epoch and position.step < self.steps:
            images = self.step(batches)
            seen += images
            over = position.step == self.steps or position.step % self.steps_per_epoch == 0
            if self._stop_asked(interrupts):
                raise Interrupted(f"stopped after step {position.step}; checkpoint: {self._checkpoint()}")
            if not over:
                self._tell(images)
                if recipe.checkpoint_every and position.step % recipe.checkpoint_every == 0:
                    before = time.perf_counter()
                    self._checkpoint()
                    pause += time.perf_counter() - before
        self._end_epoch(seen, time.perf_counter() - start - pause, images)

    def _in_mid_epoch(self) -> bool:
        return self.position.step != self.position.epoch * self.steps_per_epoch

    def step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> int:
        """One optimizer step; gives the number of images over all processes."""
        recipe, position = self.recipe, self.position
        average = None if self.average is None else self.average.module
        batch = (position.step - position.epoch * self.steps_per_epoch) * recipe.accumulate
        step = Step(self.model, self.plain, average, self.criterion, position.step, recipe.seed)
        self.optimizer.zero_grad()
        total, count = torch.zeros((), device=self.processes.device), 0
        for number in range(recipe.accumulate):
            images, targets = next(batches)
            if self.mixup is not None:
                images, targets = self.mixup(images, targets)
            images = images.to(self.dtype).contiguous(memory_format=self.memory_format)
            total = total + self._gradients(step, images, targets, number, self.loader.weight(batch + number))
            count += len(images)
        if self._good(total):
            if recipe.clip_grad is not None:
                self.accelerator.clip_grad_norm_(self.plain.parameters(), recipe.clip_grad)
            self.optimizer.step()
            if self.average is not None and not self.accelerator.optimizer_step_was_skipped:
                self.average.update_parameters(self.plain)
            self.loss_sum += total
            position.loss_count += 1
        else:
            position.skipped += 1
        self.last_loss, self.last_lr = total, self.schedule.get_last_lr()[0]
        self.schedule.step()
        position.step += 1
        return count * self.processes.world_size

    def _gradients(self, step: Step, images: Tensor, targets: Tensor, number: int, weight: float) -> Tensor:
        """Add up the gradients of one batch; processes exchange them in the last backward of the step."""
        recipe, passes = self.recipe, self.stage.passes
        losses = self.stage.losses(step, images, targets)
        total = torch.zeros((), device=self.processes.device)
        for index in range(passes):
            first, last = number + index == 0, number == recipe.accumulate - 1 and index == passes - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(self.model):
                with self.accelerator.autocast():
                    loss = next(losses) * (weight / recipe.accumulate)
                if first and recipe.penalty:
                    loss = loss + recipe.penalty * penalty(self.plain)
                self.accelerator.backward(loss)
            total += loss.detach()
        return total

    def _good(self, loss: Tensor) -> bool:
        """Whether to take the step; where looking at the loss makes others wait, it is looked at later, in `_check`."""
        if not self.eager_checks:
            bad = torch.full_like(self.first_bad, self.position.step)
            self.first_bad = torch.where(loss.isfinite(), self.first_bad, torch.minimum(self.first_bad, bad))
            return True
        finite = not self.processes.any(not math.isfinite(float(loss)))
        if not finite and self.recipe.on_nan == "stop":
            self._diverged(self.position.step)
        return finite

    def _check(self) -> None:
        """Look at the losses since the last time."""
        bad = float(self.first_bad)
        if self.processes.any(math.isfinite(bad)):
            self._diverged(int(bad) if math.isfinite(bad) else self.position.step)

    def _diverged(self, step: int) -> None:
        saved = sorted(place.name for place in self.checkpoints.folder.glob("step-*"))
        raise DivergedError(
            f"the loss is not finite at step {step} (learning rate {self.schedule.get_last_lr()[0]:.3g}). Last good checkpoint: "
            f"{saved[-1] if saved else 'none'}. Lower lr, set clip_grad, or skip such steps with on_nan='skip'"
        )

    def _stop_asked(self, interrupts: Interrupts) -> bool:
        if self.processes.world_size == 1:
            return interrupts.seen
        return self.position.step % CHECK_EVERY == 0 and self.processes.any(interrupts.seen)

    def _tell(self, images: int) -> None:
        looked = self.position.step % CHECK_EVERY == 0 or self.eager_checks
        if looked and not self.eager_checks:
            self._check()
        loss = float(self.last_loss) if looked else None
        epochs = self.position.step / self.steps_per_epoch
        self.hooks.watch(Progress(self.position.step, self.steps, epochs, images, loss))

    def _checkpoint(self) -> Path:
        self._check()
        self.position.loss_sum = float(self.loss_sum)
        self.position.loader = self.loader.state_dict() if self._in_mid_epoch() else None
        return self.checkpoints.save()

    def _end_epoch(self, seen: int, seconds: float, images: int) -> None:
        """Write the epoch's metrics, keep the network if it is the best, and write a checkpoint."""
        self._check()
        position, recipe = self.position, self.recipe
        finished = position.step == self.steps
        row: dict[str, Any] = {
            "epoch": round(position.step / self.steps_per_epoch, 4),
            "step": position.step,
            "train_loss": float(self.loss_sum) / max(position.loss_count, 1),
            "lr": self.last_lr,
        }
        position.epoch = position.step // self.steps_per_epoch
        if finished or position.epoch % recipe.evaluate_every == 0:
            self.processes.share_buffers(self.result())
            scores = self.hooks.score(self.result())
            row |= scores
            if recipe.select_on == "last" or scores["top1"] > position.best:
                position.best = scores["top1"]
                self.hooks.keep(self.result(), row)
        row |= {"images_per_second": round(seen / max(seconds, 1e-9), 1), "seconds": round(seconds, 3)}
        if position.skipped:
            row["skipped"] = position.skipped
        self.record.add(row)
        self.accelerator.log({k: v for k, v in row.items() if isinstance(v, int | float)}, step=position.step)
        position.loss_count = 0
        self.loss_sum.zero_()
        self._checkpoint()
        self.hooks.watch(Progress(position.step, self.steps, row["epoch"], images, row["train_loss"], row))


def average_of(model: nn.Module, decay: float, *, warmup: bool = False) -> AveragedModel | None:
    """An exponential average of a network over steps, with its running statistics; each tied tensor moves once."""
    if not decay:
        return None
    average = AveragedModel(model, multi_avg_fn=_warmed_up(decay) if warmup else _constant(decay), use_buffers=True)
    average.eval()
    return average


Tensors = tuple[Tensor, ...] | list[Tensor]


def _constant(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    return get_ema_multi_avg_fn(decay)  # type: ignore[no-any-return, no-untyped-call]


def _warmed_up(decay: float) -> Callable[[Tensors, Tensors, Tensor | int], None]:
    def update(average: Tensors, present: Tensors, count: Tensor | int) -> None:
        number = int(count)
        _constant(min(decay, (1 + number) / (10 + number)))(average, present, count)

    return update
