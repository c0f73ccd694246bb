"""The training loop: one for every network, stage and number of processes, on Accelerate."""

from __future__ import annotations

import contextlib
import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from thriftnet.core.penalty import penalty
from thriftnet.core.processes import failing_together
from thriftnet.core.tied import unique_tensors
from thriftnet.data.transforms import seed_random_state
from thriftnet.errors import CheckpointError, ConfigError, ThriftnetError
from thriftnet.train.checkpoints import Checkpoints, encode
from thriftnet.train.distributed import Distributed
from thriftnet.train.interrupts import Interrupts
from thriftnet.train.loss import Criterion, make_mixup
from thriftnet.train.optim import average_of, lr_factor, make_optimizer, make_schedule
from thriftnet.train.recipe import Recipe
from thriftnet.train.stages import Stage, Step

CHECK_EVERY = 10  # steps between checks that synchronise with the device or the other processes
TIMED_STEPS = 20  # at most, to plan a training that has a time budget
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class DivergedError(ThriftnetError):
    """The loss is not finite."""


@dataclass(frozen=True)
class Progress:
    """Progress of a training after a step."""

    step: int  # optimizer steps taken
    steps: int  # of the whole training
    epochs: float  # completed, as a fraction
    images: int  # in this step, over all processes
    row: Mapping[str, Any] | None = None  # metrics of the epoch, if it ends with this step


@dataclass
class TrainState:
    """The state of a training beside its tensors. What is random in a step follows from seed, step and process."""

    step: int = 0  # optimizer steps taken
    epoch: int = 0  # epochs completed
    epoch_ends: bool = False  # whether an epoch ends with this step, and the network is not yet evaluated and kept
    lr: float = 0.0  # learning rate of the last step
    loss_sum: float = 0.0  # over the steps of this epoch
    loss_count: int = 0  # steps of this epoch
    skipped: int = 0  # steps skipped because of their loss
    stale: int = 0  # evaluations since the best one
    planned: int = 0  # steps of the training where a time budget set them
    best: float = -1.0  # best accuracy so far on the images that the network is selected on, in percent; -1 for none

    def restore(self, stored: Mapping[str, Any], steps_per_epoch: int) -> None:
        """Take the values of another; a `CheckpointError` if they make no sense."""
        kinds = {each.name: {"int": (int,), "bool": (bool,), "float": (int, float)}[str(each.type)] for each in fields(self)}
        sound = stored.keys() == kinds.keys() and all(type(value) in kinds[name] for name, value in stored.items())
        if sound:
            at_end = stored["step"] - stored["epoch_ends"]
            bounds = {int: 2**53, bool: 2, float: math.inf}
            sound = at_end >= 0 and all(-1 <= value < bounds[type(value)] for value in stored.values())
            sound = sound and stored["epoch"] == at_end // steps_per_epoch
        if not sound:
            raise CheckpointError(f"the position in the training makes no sense: {str(stored)[:200]}")
        vars(self).update(stored)


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
        self.checkpoints = Checkpoints(folder, self.accelerator, recipe.run.keep_checkpoints)
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=distributed.device)
        self.last_loss = self.loss_sum
        self.first_bad = torch.full((), math.inf, dtype=torch.float64, device=distributed.device)
        alone_on_cpu = distributed.device.type == "cpu" and distributed.world_size == 1
        self.eager_checks = alone_on_cpu or recipe.run.on_nan == "skip"

    def resume(self, place: Path | None = None) -> list[str]:
        """Resume from a checkpoint, as `Checkpoints.load`."""
        return self.checkpoints.load(place, self._restore)

    @contextlib.contextmanager
    def rehearsal(self) -> Iterator[None]:
        """Whatever steps and evaluations do within the block, the training then goes on as if it had not been."""
        before = copy.deepcopy(self._content())
        try:
            yield
        finally:
            self._restore(before)

    def time_step(self, seconds: float) -> float:
        """Seconds that a step takes, the mean of some, for at most about so long; call it within `rehearsal`.

        The first one is not counted: it compiles, allocates and fills caches.
        """
        self.stage.train_mode(self.plain)
        batches, times = iter(self.loader), [time.perf_counter()]
        for _ in range(min(TIMED_STEPS + 1, self.steps_per_epoch - self.state.step % self.steps_per_epoch)):
            self.step(batches)
            float(self.last_loss)  # waits for the device
            times.append(time.perf_counter())
            if len(times) > 2 and self.distributed.any(times[-1] - times[0] > seconds):
                break
        first = min(1, len(times) - 2)
        return (times[-1] - times[first]) / (len(times) - 1 - first)

    def time_checkpoint(self) -> float:
        """Seconds that a checkpoint takes, without the disk."""
        start = time.perf_counter()
        encode(self._content())
        return time.perf_counter() - start

    def plan(self, steps: int) -> None:
        """Train for so many steps; the schedule of the recipe's epochs is stretched or compressed to them."""
        self.steps = self.state.planned = steps
        scheduler = self.schedule.scheduler
        factor = lr_factor(self.recipe, steps / self.recipe.epochs, self.recipe.epochs)
        scheduler.lr_lambdas = [factor] * len(scheduler.lr_lambdas)
        self._set_learning_rates()

    def checkpoint(self) -> None:
        """Write a checkpoint of the present state."""
        self._check()
        self.state.loss_sum = float(self.loss_sum)
        self.checkpoints.save(self.state.step, self._content())

    def _content(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        scaler = self.accelerator.scaler
        return {
            "state": asdict(self.state),
            "data": self.loader.state_dict(),
            "weights": unique_tensors(self.plain),
            "average": None if self.average is None else unique_tensors(self.average),
            "optimizer": self.optimizer.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
        }

    def _restore(self, content: Any) -> None:
        """Take the content of a checkpoint; raises anything if it does not fit."""
        state, scaler = self.state, self.accelerator.scaler
        state.restore(content["state"], self.steps_per_epoch)
        if state.planned:
            self.plan(state.planned)
        self.loss_sum.fill_(state.loss_sum)
        batches = (state.step - state.epoch * self.steps_per_epoch) * self.recipe.optimizer.accumulate
        self.loader.load_state_dict({**content["data"], "epoch": state.epoch, "step": batches})
        self._restore_optimizer(content["optimizer"])
        _fill(self.plain, content["weights"])
        if self.average is not None:
            _fill(self.average, content["average"])
        if scaler is not None:
            numbers = content["scaler"]
            if numbers.keys() != scaler.state_dict().keys() or not all(
                0 <= number < math.inf for number in numbers.values()
            ):
                raise CheckpointError(f"the scaler of gradients has {str(numbers)[:200]}")
            scaler.load_state_dict(numbers)

    def _restore_optimizer(self, stored: Any) -> None:
        """Load the optimizer's state once it has borne a step, which changes weights; the schedule follows from the step."""
        states = {int(number): entry for number, entry in stored["state"].items()}
        stored = {"state": states, "param_groups": stored["param_groups"]}
        self.optimizer.load_state_dict(copy.deepcopy(stored))
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.optimizer.step()
        self.optimizer.zero_grad()
        self.optimizer.load_state_dict(stored)
        for parameter, entry in self.optimizer.state.items():
            for name, value in entry.items():
                if isinstance(value, Tensor) and value.shape == parameter.shape:  # in the same memory format, too
                    entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
        self._set_learning_rates()

    def _set_learning_rates(self) -> None:
        """Those of the state's step."""
        schedule, step = self.schedule.scheduler, self.state.step
        rates = [base * factor(step) for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        schedule.last_epoch, schedule._last_lr = step, rates

    @property
    def finished(self) -> bool:
        """Whether all steps are taken, or patience is at its end, and the last epoch is evaluated."""
        return (self.state.step >= self.steps or self.stopped_early) and not self.state.epoch_ends

    @property
    def stopped_early(self) -> bool:
        """Whether as many evaluations as the recipe's patience brought no better accuracy, with steps left."""
        return 0 < self.recipe.run.patience <= self.state.stale and self.state.step < self.steps

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
                self.checkpoint()
                interrupts.stop()
            if not state.epoch_ends:
                if state.step % CHECK_EVERY == 0 and not self.eager_checks:
                    self._check()
                self.on_progress(Progress(state.step, self.steps, state.step / self.steps_per_epoch, self.images))
                if every and state.step % every == 0:
                    before = time.perf_counter()
                    self.checkpoint()
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
        self.checkpoint()
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
        self._seed()
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

    def _seed(self) -> None:
        """Let what is random in a step follow from seed, step and process; images have keys of their own, of three numbers."""
        seed_random_state(self.recipe.seed, self.state.step, self.distributed.rank, 1)
        if self.distributed.device.type == "cuda":
            torch.cuda.manual_seed(torch.initial_seed())

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
            f"{self.checkpoints.last or 'none'}. Lower lr, set clip_grad, or skip such steps with on_nan='skip'"
        )

    def _stop_asked(self, interrupts: Interrupts) -> bool:
        may_ask = self.distributed.world_size == 1 or self.state.step % CHECK_EVERY == 0
        return may_ask and self.distributed.any(interrupts.seen)


def _fill(module: nn.Module, stored: Any) -> None:
    """Load tensors by name, of which each tied one is there once."""
    wanted = unique_tensors(module)
    for name in sorted(wanted.keys() | stored.keys()):
        known, given = wanted.get(name), stored.get(name)
        if known is None or not isinstance(given, Tensor) or (known.shape, known.dtype) != (given.shape, given.dtype):
            raise CheckpointError(f"the network's tensor {name[:100]} is missing there, or another")
    module.load_state_dict(stored, strict=False)
