"""Two processes that evaluate one network: what each of them runs."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from images import arrays
from thriftnet.data.augmentation import Augmentation
from thriftnet.data.loaders import make_loader
from thriftnet.train.evaluate import evaluate
from training import in_children

NORMALISATION = Augmentation(mean=(0.5,) * 3, std=(0.25,) * 3)


def network(classes: int = 5) -> nn.Module:
    """Tells classes apart by chance, and has running statistics."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))


def measured(images: int, rank: int = 0, world_size: int = 1, *, wrap: bool = False) -> dict[str, object]:
    """What `evaluate` says of the network, on this process's part of the images."""
    loader = make_loader(
        arrays(images), 4, augmentation=NORMALISATION, train=False, rank=rank, world_size=world_size, resident=bool(rank)
    )
    model = network().double()
    result = evaluate(DistributedDataParallel(model) if wrap else model, loader, topk=(1, 2), confusion=True)
    return {key: value for key, value in result.to_dict().items() if key != "images_per_second"}


def measured_by_two(counts: tuple[int, ...], folder: Path) -> list[list[dict[str, object]]]:
    """The same on two processes, for each number of images; what each process says."""

    def work(rank: int) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        torch.save([measured(images, rank, 2, wrap=True) for images in counts], folder / f"results-{rank}.pt")
        torch.distributed.destroy_process_group()

    assert in_children(work, 2) == [0, 0]
    return [torch.load(folder / f"results-{rank}.pt") for rank in range(2)]
