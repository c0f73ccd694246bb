"""Large batches on a CPU in pieces, so that the allocator keeps the memory of every tensor within.

glibc gives blocks of more than 32 MiB back to the system whenever they are freed, and fetches them again page by page: a network
on a large batch may take twice the time of the same network on parts of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from thriftnet.core.probe import IgnoreOuterModes, on_meta

LARGEST = 16 << 20  # bytes: half of what the dynamic mmap threshold of glibc grows to on 64-bit systems


class MicroBatched(nn.Module):
    """Runs a part of a network on as many images at a time as keep its largest tensor under 16 MiB; on a GPU on all.

    Shape: as ``part``, whose tensors, in and out, all have images along their first dimension.

    Args:
        part: The part.
        run: Runs a copy of it on the meta device once, on two images.
        compiled: What runs in place of ``part``, if it was compiled.
    """

    def __init__(
        self, part: nn.Module, run: Callable[[nn.Module], object], compiled: Callable[..., Any] | None = None
    ) -> None:
        super().__init__()
        self.part, self.compiled = part, compiled
        self.most = max(1, (LARGEST - 1) // max(1, bytes_per_image(part, run)))

    def forward(self, *args: Any) -> Any:
        run = self.part if self.compiled is None else self.compiled
        first = args[0] if isinstance(args[0], Tensor) else args[0][0]
        number = -(-len(first) // self.most)
        if number < 2 or first.device.type != "cpu":
            return run(*args)
        leaves, structure = tree_flatten(args)
        cut = [leaf.tensor_split(number) if isinstance(leaf, Tensor) else [leaf] * number for leaf in leaves]
        outputs = [run(*tree_unflatten(list(piece), structure)) for piece in zip(*cut, strict=True)]
        return tree_map(lambda *pieces: torch.cat(pieces), *outputs)


def bytes_per_image(part: nn.Module, run: Callable[[nn.Module], object]) -> int:
    """Size of the largest tensor that a layer of ``part`` gives for one image.

    Args:
        part: Any network.
        run: Runs a copy of it on the meta device once, on two images.
    """
    ghost, largest = on_meta(part), 0

    def note(output: object) -> None:
        nonlocal largest
        sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        largest = max(largest, *sizes) if sizes else largest

    for module in ghost.modules():
        module.register_forward_hook(lambda _, args, output: note(output))
    with torch.no_grad(), IgnoreOuterModes():
        run(ghost)
    return largest // 2
