"""Splits large CPU batches so that glibc keeps the memory.

glibc returns blocks of more than 32 MiB to the system as soon as they are freed, and fetches them again page by page: a network may
take twice as long on a large batch as on its parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from thriftnet.core.probe import calls

LARGEST = 16 << 20  # bytes: half of the most that glibc's dynamic mmap threshold grows to on 64-bit systems


class MicroBatched(nn.Module):
    """Runs a part of a network in micro-batches that keep its largest tensor under 16 MiB; on a GPU it runs the full batch.

    Shape: as ``part``; the first dimension of every tensor, in and out, is the batch.

    Args:
        part: The part.
        run: Runs a copy of it on the meta device once, on two images.
        compiled: The compiled ``part``, which then runs instead.
    """

    def __init__(
        self, part: nn.Module, run: Callable[[nn.Module], object], compiled: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.part, self.compiled = part, compiled
        self.micro_batch_size = max(1, (LARGEST - 1) // max(1, bytes_per_image(part, run)))

    def forward(self, *args: Any) -> Any:
        run = self.part if self.compiled is None else self.compiled
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        number = -(-len(first) // self.micro_batch_size)
        if number < 2 or first.device.type != "cpu":
            return run(*args)
        leaves, structure = tree_flatten(args)
        split = [leaf.tensor_split(number) if isinstance(leaf, Tensor) else [leaf] * number for leaf in leaves]
        outputs = [run(*tree_unflatten(list(inputs), structure)) for inputs in zip(*split, strict=True)]
        return tree_map(lambda *parts: torch.cat(parts), *outputs)


def bytes_per_image(part: nn.Module, run: Callable[[nn.Module], object]) -> int:
    """Size of the largest output of a layer of ``part`` for one image; ``run`` as in `MicroBatched`."""
    outputs = tree_leaves([call.output for call in calls(part, run)])
    return max((leaf.numel() * leaf.element_size() for leaf in outputs if isinstance(leaf, Tensor)), default=0) // 2
