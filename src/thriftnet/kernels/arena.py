"""Large memory that is used again in every training step.

An allocator gives large tensors back to the system as soon as they are freed; fetching them again, page by page, then costs
more than what is computed in them. An arena keeps the memory, and hands it out again once nobody holds the tensor it was
handed out for: not the tensor, no view of it, no graph, no gradient.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

ALIGNMENT = 64  # bytes, as torch aligns its own
SMALLEST = 2**20  # bytes; smaller tensors are kept by any allocator
MOST_BLOCKS = 4


class Arena:
    """Memory for CPU tensors that come and go in every step."""

    def __init__(self) -> None:
        self._blocks = [bytearray(1)]  # the first is never handed out: it shows how many references a free block has

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """A tensor of this shape and the type of ``like``, not initialised."""
        size = prod(shape) * like.element_size()
        if like.device.type != "cpu" or size < SMALLEST:
            return like.new_empty(tuple(shape))
        block = self._free(size + ALIGNMENT)
        if block is None:
            return like.new_empty(tuple(shape))
        start = -torch.frombuffer(block, dtype=torch.uint8, count=1).data_ptr() % ALIGNMENT
        return torch.frombuffer(block, dtype=like.dtype, count=prod(shape), offset=start).view(tuple(shape))

    def _free(self, size: int) -> bytearray | None:
        """A block of this size that nobody uses; None when there are too many already."""
        references = [sys.getrefcount(block) for block in self._blocks]
        for block, count in zip(self._blocks[1:], references[1:]):
            if len(block) == size and count == references[0]:
                return block
        if len(self._blocks) > MOST_BLOCKS:
            return None
        self._blocks.append(bytearray(size))
        return self._blocks[-1]
