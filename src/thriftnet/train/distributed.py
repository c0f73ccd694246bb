"""Processes that ``torchrun`` started: ranks, the process group, and Accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from thriftnet.core.processes import largest, total
from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator

    from thriftnet.dynamic.network import DynamicNetwork


def launched() -> tuple[int, int]:
    """Rank and world size as ``torchrun`` set them; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def total_counts(dynamic: DynamicNetwork) -> None:
    """Add up what all processes have counted since the last reset, on each of them."""
    dynamic.counts, dynamic.spent = total(dynamic.counts), total(dynamic.spent)


@contextmanager
def process_group(device: str | None) -> Iterator[torch.device]:
    """Join the processes that ``torchrun`` started, to evaluate together; yields the device of this one.

    Raises:
        ConfigError: There is no such device.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        own = torch.device(kind)
        torch.empty(0, device=own)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"--device {kind} is not possible here: {str(error).splitlines()[0]}. Give cpu") from None
    if launched()[1] == 1:
        yield own
        return
    if own.type == "cuda":
        own = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield own
    finally:
        dist.destroy_process_group()


class Distributed:
    """The processes that train together, by Accelerate.

    ``device`` is ``cpu``, ``cuda``, or None for a GPU if there is one; ``precision`` ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        ConfigError: No such device, or not as many processes as were started.
    """

    def __init__(self, device: str | None, precision: str) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs

        if device not in (None, "cpu", "cuda"):
            raise ConfigError(f"device={device!r}: expected cpu or cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device='cuda': torch finds no GPU here. Leave it out, or give --device cpu")
        cpu = device == "cpu" or not torch.cuda.is_available()
        if precision == "fp16" and cpu:
            raise ConfigError("precision='fp16' needs a GPU; on the CPU take bf16 or fp32")
        if AcceleratorState._shared_state:  # of an earlier training in this process
            AcceleratorState._reset_state(reset_partial_state=True)
        self._ddp = DistributedDataParallelKwargs()
        self.accelerator: Accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no" if precision == "fp32" else precision,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[self._ddp],
        )
        self.rank, self.world_size = int(self.accelerator.process_index), int(self.accelerator.num_processes)
        self.is_main = self.rank == 0  # the one that writes and prints
        self.device: torch.device = self.accelerator.device
        if self.world_size != launched()[1]:
            raise ConfigError(
                f"{launched()[1]} processes were started and {self.world_size} train together: "
                "start them as torchrun --nproc-per-node N -m thriftnet train ..."
            )

    def prepare(self, model: nn.Module, *others: Any, find_unused_parameters: bool) -> Any:
        """Accelerate's wrapping of a network, an optimizer and a schedule; DDP may search for parameters without a gradient."""
        self._ddp.find_unused_parameters = find_unused_parameters
        return self.accelerator.prepare(model, *others)

    def any(self, value: bool) -> bool:
        """Whether it is true on any process."""
        return value if self.world_size == 1 else bool(largest(torch.tensor(float(value), device=self.device)))

    def largest(self, value: float) -> float:
        """The largest of all processes."""
        return value if self.world_size == 1 else float(largest(torch.tensor(value, device=self.device)))

    def share_buffers(self, model: nn.Module) -> None:
        """Copy the buffers (running statistics) of the main process to all others."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)
