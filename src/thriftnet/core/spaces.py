"""Channels that are narrowed together: the unknowns and equations of slimming.

A `Space` is a number of channels that is narrowed as one. An axis of a tensor is a row of pieces ``(space, each)``: every channel of the
space is ``each`` neighbouring entries of the axis. Concatenation puts pieces in a row, flattening C x H x W makes ``each`` = H * W,
and an addition makes two axes equal: `unify` then splits spaces until pieces match.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import TypeAlias

MOST_PIECES = 4096  # of an axis; longer ones stay whole


class Space:
    """Channels that are narrowed together.

    Args:
        size: How many.
        whole: Why they are kept at every width; "" for those that are narrowed.

    Attributes:
        made: Whether they leave a convolution or linear layer; only such channels are narrowed.
    """

    def __init__(self, size: int, whole: str = "") -> None:
        self.size, self.whole, self.made = size, whole, False
        self.parts: Sequence[Piece] | None = None  # what it turned out to consist of


Piece: TypeAlias = tuple[Space, int]
Axis: TypeAlias = Sequence[Piece] | None  # None: not channels of any layer, of fixed size
Runs: TypeAlias = tuple[tuple[int, int], ...]  # start and end of the entries that are kept


def leaves(axis: Sequence[Piece]) -> list[Piece]:
    """The pieces of an axis that consist of no others."""
    found: list[Piece] = []
    rest = list(reversed(axis))
    while rest:
        space, each = rest.pop()
        if space.parts is None:
            found.append((space, each))
        else:
            rest.extend((part, each * inner) for part, inner in reversed(space.parts))
    return found


def keep_whole(axis: Axis, why: str) -> None:
    """Keep all channels of an axis at every width."""
    for space, _ in leaves(axis or ()):
        space.whole = space.whole or why


def is_whole(axis: Axis) -> bool:
    """Whether an axis is the same at every width."""
    return all(space.whole for space, _ in leaves(axis or ()))


def reasons(axis: Axis) -> list[str]:
    """Why parts of an axis stay whole."""
    return list(dict.fromkeys(space.whole for space, _ in leaves(axis or ()) if space.whole))


def mark_made(axis: Axis) -> None:
    """These channels leave a layer."""
    for space, _ in leaves(axis or ()):
        space.made = True


def _consists_of(space: Space, *parts: Piece) -> None:
    if space.whole:
        keep_whole(parts, space.whole)
    if space.made:
        mark_made(parts)
    space.parts = parts


def unify(one: Axis, other: Axis, why: str) -> None:
    """Two axes of equal length have the same channels; ``why`` they stay whole where one is fixed or their pieces do not match."""
    if one is None or other is None:
        return keep_whole(one or other, why)
    left, right = deque(leaves(one)), deque(leaves(other))
    while left and right:
        (a, m), (b, n) = left.popleft(), right.popleft()
        if a.parts is not None or b.parts is not None:
            left.extendleft(reversed(leaves([(a, m)])))
            right.extendleft(reversed(leaves([(b, n)])))
        elif a is b and m == n:
            continue
        elif a.size * m == b.size * n and m % n == 0:
            _consists_of(b, (a, m // n))
        elif a.size * m == b.size * n and n % m == 0:
            _consists_of(a, (b, n // m))
        else:
            larger, each, end = (a, m, b.size * n) if a.size * m > b.size * n else (b, n, a.size * m)
            if end % each or a.size * m == b.size * n:
                keep_whole(one, why)
                return keep_whole(other, why)
            _split(larger, end // each)
            left.appendleft((a, m))
            right.appendleft((b, n))
    return None


def _split(space: Space, first: int) -> None:
    _consists_of(space, (Space(first), 1), (Space(space.size - first), 1))


def part(axis: Axis, start: int, end: int) -> Axis:
    """The entries from ``start`` to ``end`` of an axis."""
    found: list[Piece] = []
    offset = 0
    rest = deque(leaves(axis or ()))
    while rest:
        space, each = rest.popleft()
        stop = offset + space.size * each
        cut = next((cut for cut in (start, end) if offset < cut < stop), None)
        if cut is not None:
            if (cut - offset) % each:
                keep_whole(axis, "a slice cuts through channels that belong together")
                return None
            _split(space, (cut - offset) // each)
            rest.extendleft(reversed(leaves([(space, each)])))
            continue
        if start <= offset and stop <= end:
            found.append((space, each))
        offset = stop
    return found or None


def length(axis: Sequence[Piece]) -> int:
    """Number of entries of an axis."""
    return sum(space.size * each for space, each in axis)


def repeated(axis: Axis, times: int, each: int = 1) -> Axis:
    """An axis ``times`` in a row, each entry of it ``each`` times."""
    if axis is None:
        return None
    if times * len(axis) > MOST_PIECES:
        keep_whole(axis, "they are repeated too often")
        return None
    return [(space, own * each) for space, own in axis] * times


def kept(space: Space, width: float) -> int:
    """Channels of a space at a width: at least that share of them."""
    return space.size if space.whole else math.ceil(space.size * width - 1e-6)


def count(axis: Sequence[Piece], width: float) -> int:
    """Length of an axis at a width."""
    return sum(kept(space, width) * each for space, each in leaves(axis))


def runs(axis: Sequence[Piece], width: float) -> Runs:
    """Which entries of an axis are kept at a width: the first ones, or the first of each piece where pieces shrink differently."""
    pieces = leaves(axis)
    length = sum(space.size * each for space, each in pieces)
    if all(abs(kept(space, width) - space.size * width) < 1e-6 for space, _ in pieces):
        return ((0, round(length * width)),)
    return _joined((kept(space, width) * each, space.size * each) for space, each in pieces)


def _joined(pieces: Iterable[tuple[int, int]]) -> Runs:
    """Neighbouring runs as one."""
    found: list[tuple[int, int]] = []
    offset = 0
    for keep, size in pieces:
        if found and found[-1][1] == offset:
            found[-1] = (found[-1][0], offset + keep)
        else:
            found.append((offset, offset + keep))
        offset += size
    return tuple(found)
