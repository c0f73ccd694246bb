"""Two processes that hold one network in parts (FSDP2): what each of them runs."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard

from training import in_children

State = dict[str, Tensor]


def gathered(models: dict[str, nn.Module], x: Tensor, folder: Path) -> dict[str, tuple[State, Tensor, State]]:
    """For each network: its whole state dict gathered from two processes, what it computes there, and the state dict
    after that one, doubled, was loaded back."""
    assert in_children(lambda rank: _work(rank, models, x, folder), 2) == [0, 0]
    return torch.load(folder / "gathered.pt")


def _work(rank: int, models: dict[str, nn.Module], x: Tensor, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    whole = StateDictOptions(full_state_dict=True)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    found = {}
    for config, model in models.items():
        sharded = fully_shard(copy.deepcopy(model), mesh=mesh)
        with torch.no_grad():
            out = sharded(x)
        first = {name: tensor.clone() for name, tensor in get_model_state_dict(sharded, options=whole).items()}
        doubled = {name: tensor * 2 for name, tensor in first.items()}
        set_model_state_dict(sharded, doubled, options=whole)
        found[config] = (first, out, dict(get_model_state_dict(sharded, options=whole)))
    if rank == 0:
        torch.save(found, folder / "gathered.pt")
    torch.distributed.destroy_process_group()
