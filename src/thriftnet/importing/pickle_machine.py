"""A pickle machine that calls nothing but the rebuilders of `rebuild`; every other name becomes an inert `StandIn`.

It is written for the pickles that torch has ever made (protocols 1 to 5). Python's own unpickler would import what the file
names, and allocates by numbers that the file states.

Source: the opcodes are described in the standard library's ``pickletools``.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from thriftnet.importing.inert import (
    CONTAINER_COST,
    ENTRY_COST,
    MARK_COST,
    MEMO_COST,
    STAND_IN_COST,
    TENSOR_COST,
    TEXT_COST,
    VALUE_COST,
    Budget,
    Name,
    StandIn,
    check_nesting,
    checked_key,
    damaged,
    unsupported,
)
from thriftnet.importing.rebuild import CONSTANTS, call, restore

MAX_LINE, MAX_NAME, MAX_INTEGER_BYTES, MAX_PROTOCOL = 4096, 500, 64, 5
STOP = b"."[0]
FALSE_LINE, TRUE_LINE = b"00", b"01"


class Machine:
    """Reads one pickle.

    Args:
        data: Bytes that hold the pickle.
        position: Where it begins; after `read`, where it ended.
        budget: What its objects may take.
        persistent: Gives what stands behind a persistent id.
    """

    def __init__(self, data: bytes, position: int, budget: Budget, persistent: Callable[[Any], Any]) -> None:
        self.data = data
        self.position = position
        self.budget = budget
        self.persistent = persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def read(self) -> Any:
        """The pickled value.

        Raises:
            CheckpointError: No pickle, or one that is not read here.
        """
        data, charge = self.data, self.budget.charge
        while self.position < len(data):
            code = data[self.position]
            self.position += 1
            if code == STOP:
                value = self.pop()
                if self.stack or self.marks:
                    raise damaged("a pickle in it leaves values behind")
                check_nesting(value)
                return value
            if code in REFUSED:
                raise unsupported(f"it uses {REFUSED[code]}")
            if code not in OPCODES:
                raise damaged(f"byte {self.position - 1} of its pickle, {code:#04x}, is no pickle opcode")
            step, cost = OPCODES[code]
            charge(cost)
            step(self)
        raise damaged("it ends in the middle of a pickle")

    # -- bytes

    def take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > len(self.data):
            raise damaged("it ends in the middle of a pickle")
        piece = self.data[self.position : end]
        self.position = end
        return piece

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position, self.position + MAX_LINE)
        if end < 0:
            raise damaged(f"a line of text in its pickle does not end within {MAX_LINE} bytes")
        piece = self.data[self.position : end]
        self.position = end + 1
        return piece

    def text(self, data: bytes, encoding: str) -> str:
        self.budget.charge(4 * len(data))
        try:
            return data.decode(encoding)
        except UnicodeDecodeError:
            raise damaged(f"a string in it is no valid {encoding}") from None

    # -- stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise damaged("its pickle takes more values than it made")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise damaged("its pickle takes more values than it made")
        return self.stack[-1]

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise damaged("its pickle closes a group that it did not open")
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def drop(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def drop_mark(self) -> None:
        self.pop_mark()

    def memoize(self, index: int) -> None:
        if not 0 <= index <= len(self.data):
            raise damaged(f"its pickle numbers an object {index}, more than it has bytes")
        self.memo[index] = self.top()

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise damaged(f"its pickle refers to object {index}, which it did not make")
        self.push(self.memo[index])

    # -- values

    def int_line(self) -> None:
        line = self.line()
        self.push({FALSE_LINE: False, TRUE_LINE: True}[line] if line in (FALSE_LINE, TRUE_LINE) else _integer(line))

    def float_line(self) -> None:
        try:
            self.push(float(self.line()))
        except ValueError:
            raise damaged("a float in it is no number") from None

    def string_line(self) -> None:
        line = self.line()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise damaged("a string in it lacks its quotes")
        self.push(self.text(line[1:-1], "unicode_escape"))

    def long(self, size: int) -> None:
        count = self.number(size)
        if count > MAX_INTEGER_BYTES:
            raise unsupported(f"it holds an integer of {count} bytes")
        self.push(int.from_bytes(self.take(count), "little", signed=True))

    def payload(self, size: int) -> bytes:
        piece = self.take(self.number(size))
        self.budget.charge(len(piece))
        return piece

    def frame(self) -> None:
        if self.number(8) > len(self.data) - self.position:
            raise damaged("it ends in the middle of a pickle")

    def protocol(self) -> None:
        protocol = self.number(1)
        if protocol > MAX_PROTOCOL:
            raise unsupported(f"it is written in pickle protocol {protocol}, known are those up to {MAX_PROTOCOL}")

    # -- containers

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise damaged("its pickle takes more values than it made")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(items)

    def new_dict(self) -> None:
        target: dict[Any, Any] = {}
        self.set_items(target, self.pop_mark())
        self.push(target)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.set_items(self.top(), [key, value])

    def set_items(self, target: Any, items: list[Any]) -> None:
        place = target.items if isinstance(target, StandIn) else target
        if not isinstance(place, dict) or len(items) % 2:
            raise damaged(f"it sets {len(items)} keys and values on a {type(target).__name__}")
        self.budget.charge(ENTRY_COST * len(items))
        for key, value in zip(items[::2], items[1::2]):
            place[checked_key(key, self.budget)] = value

    def set_marked_items(self) -> None:
        items = self.pop_mark()
        self.set_items(self.top(), items)

    def append_items(self, items: list[Any]) -> None:
        target = self.top()
        place = target.elements if isinstance(target, StandIn) else target
        if not isinstance(place, list):
            raise damaged(f"it appends to a {type(target).__name__}")
        place.extend(items)

    def add_items(self) -> None:
        items, target = self.pop_mark(), self.top()
        if not isinstance(target, set):
            raise damaged(f"it adds the elements of a set to a {type(target).__name__}")
        self.budget.charge(ENTRY_COST * len(items))
        target.update([checked_key(item, self.budget) for item in items])

    def frozen_set(self) -> None:
        items = self.pop_mark()
        self.budget.charge(ENTRY_COST * len(items))
        self.push(frozenset([checked_key(item, self.budget) for item in items]))

    # -- names and calls

    def name(self, module: Any, name: Any) -> None:
        if not (isinstance(module, str) and isinstance(name, str)) or len(module) + len(name) > MAX_NAME:
            raise damaged("it names a class or function by something that is no name")
        origin = f"{module}.{name}"
        if not origin.isprintable():
            raise damaged("it names a class or function by something that is no name")
        self.push(CONSTANTS[origin] if origin in CONSTANTS else Name(origin))

    def name_lines(self) -> tuple[str, str]:
        return self.text(self.line(), "utf-8"), self.text(self.line(), "utf-8")

    def global_name(self) -> None:
        self.name(*self.name_lines())

    def stack_name(self) -> None:
        name, module = self.pop(), self.pop()
        self.name(module, name)

    def reduce(self) -> None:
        args, callee = self.pop(), self.pop()
        self.push(call(callee, args, self.budget))

    def reduce_named(self) -> None:
        """Also takes keyword arguments, which only stand-ins do; there they come last."""
        named, args, callee = self.pop(), self.pop(), self.pop()
        if not isinstance(named, dict) or not isinstance(args, tuple):
            raise damaged("it makes an object with arguments that are none")
        self.budget.charge(8 * len(args))
        self.push(call(callee, (*args, named) if named else args, self.budget))

    def instance(self) -> None:
        items = self.pop_mark()
        self.name(*self.name_lines())
        self.push(call(self.pop(), tuple(items), self.budget))

    def instance_of_top(self) -> None:
        items = self.pop_mark()
        if not items:
            raise damaged("its pickle takes more values than it made")
        self.push(call(items[0], tuple(items[1:]), self.budget))

    def build(self) -> None:
        state = self.pop()
        restore(self.top(), state, self.budget)


def _integer(line: bytes) -> int:
    digits = line.removesuffix(b"L")
    try:
        if len(digits) <= 2 * MAX_INTEGER_BYTES:
            return int(digits)
    except ValueError:
        pass
    raise damaged("an integer in it is no number that is read")


OPCODES: dict[int, tuple[Callable[[Machine], None], int]] = {
    code[0]: (step, cost)
    for code, step, cost in (
        (b"\x80", Machine.protocol, MARK_COST),
        (b"\x95", Machine.frame, MARK_COST),
        (b"(", Machine.mark, CONTAINER_COST),
        (b"0", Machine.drop, MARK_COST),
        (b"1", Machine.drop_mark, MARK_COST),
        (b"2", lambda m: m.push(m.top()), MARK_COST),
        (b"p", lambda m: m.memoize(_integer(m.line())), MEMO_COST),
        (b"q", lambda m: m.memoize(m.number(1)), MEMO_COST),
        (b"r", lambda m: m.memoize(m.number(4)), MEMO_COST),
        (b"\x94", lambda m: m.memoize(len(m.memo)), MEMO_COST),
        (b"g", lambda m: m.recall(_integer(m.line())), MARK_COST),
        (b"h", lambda m: m.recall(m.number(1)), MARK_COST),
        (b"j", lambda m: m.recall(m.number(4)), MARK_COST),
        (b"N", lambda m: m.push(None), MARK_COST),
        (b"\x88", lambda m: m.push(True), MARK_COST),
        (b"\x89", lambda m: m.push(False), MARK_COST),
        (b"I", Machine.int_line, VALUE_COST),
        (b"J", lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)), VALUE_COST),
        (b"K", lambda m: m.push(m.number(1)), MARK_COST),
        (b"M", lambda m: m.push(m.number(2)), VALUE_COST),
        (b"L", lambda m: m.push(_integer(m.line())), TEXT_COST),
        (b"\x8a", lambda m: m.long(1), TEXT_COST),
        (b"\x8b", lambda m: m.long(4), TEXT_COST),
        (b"F", Machine.float_line, VALUE_COST),
        (b"G", lambda m: m.push(struct.unpack(">d", m.take(8))[0]), VALUE_COST),
        (b"S", Machine.string_line, TEXT_COST),
        (b"T", lambda m: m.push(m.text(m.payload(4), "latin-1")), TEXT_COST),
        (b"U", lambda m: m.push(m.text(m.payload(1), "latin-1")), TEXT_COST),
        (b"V", lambda m: m.push(m.text(m.line(), "raw_unicode_escape")), TEXT_COST),
        (b"X", lambda m: m.push(m.text(m.payload(4), "utf-8")), TEXT_COST),
        (b"\x8c", lambda m: m.push(m.text(m.payload(1), "utf-8")), TEXT_COST),
        (b"\x8d", lambda m: m.push(m.text(m.payload(8), "utf-8")), TEXT_COST),
        (b"B", lambda m: m.push(m.payload(4)), TEXT_COST),
        (b"C", lambda m: m.push(m.payload(1)), TEXT_COST),
        (b"\x8e", lambda m: m.push(m.payload(8)), TEXT_COST),
        (b"\x96", lambda m: m.push(bytearray(m.payload(8))), TEXT_COST),
        (b")", lambda m: m.push(()), MARK_COST),
        (b"t", lambda m: m.push(tuple(m.pop_mark())), CONTAINER_COST),
        (b"\x85", lambda m: m.tuple_of(1), CONTAINER_COST),
        (b"\x86", lambda m: m.tuple_of(2), CONTAINER_COST),
        (b"\x87", lambda m: m.tuple_of(3), CONTAINER_COST),
        (b"]", lambda m: m.push([]), CONTAINER_COST),
        (b"l", lambda m: m.push(m.pop_mark()), CONTAINER_COST),
        (b"a", lambda m: m.append_items([m.pop()]), MARK_COST),
        (b"e", lambda m: m.append_items(m.pop_mark()), MARK_COST),
        (b"}", lambda m: m.push({}), CONTAINER_COST),
        (b"d", Machine.new_dict, CONTAINER_COST),
        (b"s", Machine.set_item, MARK_COST),
        (b"u", Machine.set_marked_items, MARK_COST),
        (b"\x8f", lambda m: m.push(set()), CONTAINER_COST),
        (b"\x90", Machine.add_items, MARK_COST),
        (b"\x91", Machine.frozen_set, CONTAINER_COST),
        (b"c", Machine.global_name, STAND_IN_COST),
        (b"\x93", Machine.stack_name, STAND_IN_COST),
        (b"R", Machine.reduce, STAND_IN_COST),
        (b"\x81", Machine.reduce, STAND_IN_COST),
        (b"\x92", Machine.reduce_named, STAND_IN_COST),
        (b"i", Machine.instance, STAND_IN_COST),
        (b"o", Machine.instance_of_top, STAND_IN_COST),
        (b"b", Machine.build, MARK_COST),
        (b"Q", lambda m: m.push(m.persistent(m.pop())), TENSOR_COST),
    )
}

REFUSED = {
    b"P"[0]: "a persistent id in text form",
    b"\x82"[0]: "a class from Python's extension registry",
    b"\x83"[0]: "a class from Python's extension registry",
    b"\x84"[0]: "a class from Python's extension registry",
    b"\x97"[0]: "a buffer that is not in the file",
    b"\x98"[0]: "a buffer that is not in the file",
}
