"""Two processes that train one network: what each of them runs. Spawned processes import this module."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import thriftnet as tn

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
    torch.save({"models": models, "x": x, "target": target}, folder / "work.pt")
    torch.multiprocessing.spawn(_work, args=(str(folder),), nprocs=2)
    results = [torch.load(folder / f"gradients-{rank}.pt") for rank in range(2)]
    for config in models:
        for name, grad in results[0][config].items():
            assert torch.equal(grad, results[1][config][name]), f"{config}: the processes disagree on {name!r}"
    return results[0]


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    place = Path(folder)
    torch.distributed.init_process_group("gloo", init_method=f"file://{place / 'meeting'}", rank=rank, world_size=2)
    work = torch.load(place / "work.pt", weights_only=False)
    half = slice(rank * 2, rank * 2 + 2)
    found = {}
    for config, model in work["models"].items():
        parallel = DistributedDataParallel(model)
        found[config] = gradients(parallel, work["x"][half], work["target"][half])
    torch.save(found, place / f"gradients-{rank}.pt")
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may abort an interpreter that ends by itself: thriftnet/__main__.py
