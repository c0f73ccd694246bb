"""What a checkpoint file may leave in memory: inert stand-ins, within a budget, no deeper than can be walked."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from thriftnet.errors import CheckpointError

MAX_DEPTH = 200
FREE_BYTES = 128 << 20  # what any file may use, however small; the size of its pickled part comes on top
SHARED_COPIES = 16  # how often, on average, one object may be met by a walk that does not remember where it was

MARK_COST, VALUE_COST, TEXT_COST, MEMO_COST = 32, 48, 96, 128
CONTAINER_COST, STAND_IN_COST, TENSOR_COST, ENTRY_COST = 400, 640, 1024, 64  # bytes of memory, rounded up
TUPLE_KEY_COST = 16384  # tuples can be made whose hashes collide, so a file must not use many as keys


class StandIn:
    """Takes the place of a class or function that a file names, and of what is made by calling it. It runs nothing.

    Args:
        origin: What the file names, as in ``models.resnet.ResNet``.
        args: What it was called with.

    Attributes:
        state: What the file restores it with, merged if that is a dict; None if nothing.
        items: What the file sets on it by key.
        elements: What the file appends to it.
    """

    __slots__ = ("args", "elements", "items", "origin", "state")

    def __init__(self, origin: str, args: tuple[Any, ...] = ()) -> None:
        self.origin = origin
        self.args = args
        self.state: Any = None
        self.items: dict[Any, Any] = {}
        self.elements: list[Any] = []

    def __repr__(self) -> str:
        return f"<StandIn for {self.origin}>"


class Name(StandIn):
    """A class or function as the file names it, not called yet."""

    __slots__ = ()


class Budget:
    """Bytes of memory that what the file describes may still take, weights aside."""

    def __init__(self, size: int) -> None:
        self.left = FREE_BYTES + size

    def charge(self, cost: int) -> None:
        """Take from the budget before something is made.

        Raises:
            CheckpointError: The budget is used up.
        """
        self.left -= cost
        if self.left < 0:
            raise unsupported("what it describes beside its weights needs far more memory than the file has bytes")


def damaged(what: str) -> CheckpointError:
    """The error for a file that no torch could have written."""
    return CheckpointError(f"{what}. The file is damaged, cut off or made to harm: get it again from where it comes from")


def unsupported(what: str) -> CheckpointError:
    """The error for a file that may be sound, but holds what is not read here."""
    return CheckpointError(
        f"{what}. Where the network can be loaded, write torch.save(model.state_dict(), file) and use that"
    )


def checked_key(key: Any, budget: Budget) -> Any:
    """A key for a dict or set, if hashing and comparing it is harmless.

    Raises:
        CheckpointError: Anything but scalars, text, flat tuples of these, and stand-ins, which are told apart by identity.
    """
    if isinstance(key, tuple):
        budget.charge(TUPLE_KEY_COST)
    parts = key if isinstance(key, tuple) else (key,)
    for part in parts:
        if isinstance(part, int) and abs(part) >= 1 << 64:
            raise unsupported("it uses an integer of more than 64 bits as a key")
        if part is not None and not isinstance(part, (int, float, str, bytes, StandIn)):
            raise unsupported(f"it uses a {type(part).__name__} as a key")
    return key


def check_nesting(root: Any) -> None:
    """See to it that whatever walks, prints or frees this comes to an end soon.

    Containers may be reached by several ways, as tied modules are, but unfolded they must not be many times what the file
    holds. Only a `StandIn` may hold itself, as modules that know their parent do.

    Raises:
        CheckpointError: Nested more than 200 deep, unfolding to too much, or a list, tuple or dict that holds itself.
    """
    done: dict[int, tuple[int, int]] = {}  # height and unfolded size, by id
    held = 0
    path = [_Visit(root)]
    active = {id(root)}
    while path:
        visit = path[-1]
        child = next(visit.children, path)
        if child is path:
            path.pop()
            active.discard(id(visit.value))
            held += visit.own
            done[id(visit.value)] = (visit.height, visit.size)
            if visit.size > SHARED_COPIES * held + 100_000:
                raise unsupported("it names the same objects over and over, which unfolds to far more than the file holds")
            if path:
                path[-1].add(visit.height, visit.size)
        elif id(child) in active:
            if not isinstance(child, StandIn):
                raise unsupported(f"a {type(child).__name__} in it holds itself")
        elif id(child) in done:
            visit.add(*done[id(child)])
        else:
            path.append(_Visit(child))
            active.add(id(child))
        if path and len(path) + path[-1].height > MAX_DEPTH:
            raise unsupported(f"its contents are nested more than {MAX_DEPTH} deep")


class _Visit:
    """One container on the way of `check_nesting`."""

    __slots__ = ("children", "height", "own", "size", "value")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.children, self.own = _children(value)
        self.height, self.size = 1, 1 + self.own

    def add(self, height: int, size: int) -> None:
        self.height = max(self.height, 1 + height)
        self.size += size


def _children(value: Any) -> tuple[Iterator[Any], int]:
    """The containers in a value, and how many things it holds itself."""
    if isinstance(value, StandIn):
        return iter([part for part in (value.args, value.state, value.items, value.elements) if _holds(part)]), 4
    if isinstance(value, dict):
        return (part for part in chain(value.values(), value) if _holds(part)), 2 * len(value)
    if isinstance(value, (list, tuple, set, frozenset)):
        return (part for part in value if _holds(part)), len(value)
    return iter(()), 1


def _holds(value: Any) -> bool:
    if isinstance(value, (dict, list, tuple, set, frozenset)):
        return len(value) > 0
    return isinstance(value, StandIn)
