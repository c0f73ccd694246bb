"""Two processes that train one network: what each of them runs."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import thriftnet as tn
from training import in_children

Gradients = dict[str, Tensor]


def gradients(model: nn.Module, x: Tensor, target: Tensor) -> Gradients:
    """Gradients of the mean loss over a batch, with the penalty; norms use their statistics."""
    model.eval().zero_grad(set_to_none=True)
    plain = model.module if isinstance(model, DistributedDataParallel) else model
    (F.cross_entropy(model(x), target) + tn.penalty(plain, scaled=False)).backward()
    return {name: parameter.grad.clone() for name, parameter in plain.named_parameters() if parameter.grad is not None}


def gradients_of_two_processes(
    models: dict[str, nn.Module], x: Tensor, target: Tensor, folder: Path
) -> dict[str, Gradients]:
    """The same, with half the batch in each of two processes."""
    for model in models.values():
        model.zero_grad(set_to_none=True)

    def work(rank: int) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
        half = slice(rank * 2, rank * 2 + 2)
        found = {name: gradients(DistributedDataParallel(model), x[half], target[half]) for name, model in models.items()}
        torch.save(found, folder / f"gradients-{rank}.pt")
        torch.distributed.destroy_process_group()

    assert in_children(work, 2) == [0, 0]
    results = [torch.load(folder / f"gradients-{rank}.pt") for rank in range(2)]
    for config in models:
        for name, grad in results[0][config].items():
            assert torch.equal(grad, results[1][config][name]), f"{config}: the processes disagree on {name!r}"
    return results[0]
