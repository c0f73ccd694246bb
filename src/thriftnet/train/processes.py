"""This process among those that train together, started by ``torchrun``."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import nn

from thriftnet.errors import ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


class Distributed:
    """Accelerate's view of the processes, checked.

    Args:
        device: ``cpu``, ``cuda``, or None for a GPU where there is one.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Raises:
        ConfigError: No such device, or not as many processes as were started.
    """

    def __init__(self, device: str | None, precision: str) -> None:
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedDataParallelKwargs

        if device not in (None, "cpu", "cuda"):
            raise ConfigError(f"device={device!r}: possible are cpu and cuda")
        if device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("device='cuda': torch finds no GPU here. Leave it out, or give --device cpu")
        self.cpu = device == "cpu" or not torch.cuda.is_available()
        if precision == "fp16" and self.cpu:
            raise ConfigError("precision='fp16' needs a GPU; on the CPU take bf16 or fp32")
        if AcceleratorState._shared_state:  # of an earlier training in this process
            AcceleratorState._reset_state(reset_partial_state=True)
        self.distributed = DistributedDataParallelKwargs()
        self.accelerator: Accelerator = Accelerator(
            cpu=self.cpu,
            mixed_precision="no" if precision == "fp32" else precision,
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[self.distributed],
        )
        self._check_world()

    def _check_world(self) -> None:
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if self.world_size != started:
            raise ConfigError(
                f"{started} processes were started and {self.world_size} train together: "
                "start them as torchrun --nproc-per-node N -m thriftnet train ..."
            )

    @property
    def world_size(self) -> int:
        """How many processes train together."""
        return int(self.accelerator.num_processes)

    @property
    def rank(self) -> int:
        """Which one this is, from 0."""
        return int(self.accelerator.process_index)

    @property
    def is_main(self) -> bool:
        """Whether this is the one that writes and prints."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        device: torch.device = self.accelerator.device
        return device

    def prepare(self, model: nn.Module, *others: Any, find_unused_parameters: bool) -> Any:
        """Accelerate's wrapping of a network, an optimizer and a schedule.

        Args:
            find_unused_parameters: Whether a step may leave parameters without a gradient.
        """
        self.distributed.find_unused_parameters = find_unused_parameters
        return self.accelerator.prepare(model, *others)

    def any(self, value: bool) -> bool:
        """Whether it is true for one of the processes."""
        if self.world_size == 1:
            return value
        flag = torch.tensor(float(value), device=self.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag)

    def from_main(self, value: Any) -> Any:
        """What the main process has."""
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([value])[0]

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers (running statistics) of the main one."""
        if self.world_size > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, src=0)

    def wait(self) -> None:
        """Until all have come here."""
        self.accelerator.wait_for_everyone()

    def close(self) -> None:
        """Leave the group of processes."""
        self.accelerator.end_training()
        if dist.is_initialized():
            dist.destroy_process_group()
