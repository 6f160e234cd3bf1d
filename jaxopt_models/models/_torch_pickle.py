"""A machine for the few operations of a pickle that describe containers and tensors."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any

_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
_TEXTS = {b"\x8c": "<B", b"X": "<I", b"\x8d": "<Q"}
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
_EMPTY: dict[bytes, Callable[[], Any]] = {b")": tuple, b"]": list, b"}": dict}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_PUTS = {b"q": "<B", b"r": "<I"}
_GETS = {b"h": "<B", b"j": "<I"}
_IGNORED = {b"\x80": 1, b"\x95": 8}  # the protocol, and the length of a frame


# No NamedTuple: a pickle must not be able to use it as a tuple, nor leave it as one.
@dataclasses.dataclass(frozen=True, eq=False)
class Global:
    """A name that a pickle may mention, and what calling it gives, if it may be called."""

    name: str
    make: Callable[[tuple[Any, ...]], Any] | None


class Pickle:
    """Runs one pickle in `data` from position `at`.

    Args:
      data: the bytes; nothing is allocated that is larger than they are.
      at: where the pickle begins; after `run`, where it ends.
      known: the names that may be mentioned, `module.name`.
      reference: gives the value of a persistent id.
    """

    def __init__(
        self,
        data: bytes,
        at: int,
        known: Callable[[str], Global | None],
        reference: Callable[[Any], Any],
    ):
        self.data, self.at, self.known, self.reference = data, at, known, reference
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # the stacks under each mark
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Gives the value of the pickle, or raises ValueError."""
        while (op := self.take(1)) != b".":
            self.step(op)
        if self.below or len(self.stack) != 1:
            raise ValueError("a pickle that ends with other than one value")
        return self.stack[0]

    def step(self, op: bytes) -> None:
        """Does one operation."""
        if op in _NUMBERS:
            self.stack.append(self.number(_NUMBERS[op]))
        elif op in _TEXTS:
            self.stack.append(self.take(self.number(_TEXTS[op])).decode("utf-8"))
        elif op in _CONSTANTS:
            self.stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            self.stack.append(_EMPTY[op]())
        elif op in _TUPLES:
            last = [self.pop() for _ in range(_TUPLES[op])]
            self.stack.append(tuple(reversed(last)))
        elif op in _PUTS:
            self.memo[self.number(_PUTS[op])] = self.top(object)
        elif op in _GETS:
            self.get(self.number(_GETS[op]))
        elif op in _IGNORED:
            self.take(_IGNORED[op])
        elif op in _ACTIONS:
            _ACTIONS[op](self)
        else:
            raise ValueError(f"the operation {op!r} at {self.at - 1} describes no tensor")

    def push(self, value: Any) -> None:
        """Adds a value to the stack, as it is when the value is known."""
        self.stack.append(value)

    def take(self, count: int) -> bytes:
        """Gives the next bytes."""
        if count > len(self.data) - self.at:
            raise ValueError(f"a pickle cut off: {count} bytes from {self.at} are not there")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, code: str) -> Any:
        """Gives the next number."""
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def line(self) -> str:
        """Gives the text up to the next end of line."""
        end = self.data.find(b"\n", self.at)
        if end < 0:
            raise ValueError(f"a pickle cut off: no end of the line from {self.at}")
        return self.take(end + 1 - self.at)[:-1].decode("utf-8")

    def long(self) -> None:
        """Pushes a whole number of up to 255 bytes."""
        self.stack.append(int.from_bytes(self.take(self.number("<B")), "little", signed=True))

    def pop(self) -> Any:
        """Takes the last value above the last mark."""
        if not self.stack:
            raise ValueError(f"a pickle that takes a value where none is, at {self.at}")
        return self.stack.pop()

    def top(self, kind: type) -> Any:
        """Gives the last value, which must be of a kind."""
        if not self.stack or not isinstance(self.stack[-1], kind):
            what = type(self.stack[-1]).__name__ if self.stack else "nothing"
            raise ValueError(f"a pickle that changes {what} as a {kind.__name__}, at {self.at}")
        return self.stack[-1]

    def get(self, index: int) -> None:
        """Pushes a value that was noted before."""
        if index not in self.memo:
            raise ValueError(f"a pickle that mentions value {index} before it is there")
        self.stack.append(self.memo[index])

    def mark(self) -> None:
        """Begins a new stack."""
        self.below.append(self.stack)
        self.stack = []

    def marked(self) -> list[Any]:
        """Gives the values above the last mark, and goes back below it."""
        if not self.below:
            raise ValueError(f"a pickle without a mark, at {self.at}")
        values, self.stack = self.stack, self.below.pop()
        return values

    def append(self, values: list[Any]) -> None:
        """Adds values to the list under them."""
        self.top(list).extend(values)

    def assign(self, values: list[Any]) -> None:
        """Adds keys and values to the dict under them."""
        if len(values) % 2:
            raise ValueError(f"a pickle with a key that has no value, at {self.at}")
        for key in values[::2]:
            # Keys of other types may be unhashable, or compare slowly.
            if type(key) not in (str, int):
                raise ValueError(f"a key of a dict is a {type(key).__name__}, no text or number")
        self.top(dict).update(zip(values[::2], values[1::2], strict=True))

    def mention(self, module: Any, name: Any) -> None:
        """Pushes a known name; an unknown one is refused here, before it is used."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError(f"a pickle with a name that is no text, at {self.at}")
        full = f"{module}.{name}"
        found = self.known(full)
        if found is None:
            raise ValueError(f"it asks for {full!r:.80}; only tensors and containers are read")
        self.stack.append(found)

    def call(self) -> None:
        """Replaces a name and its arguments by what it makes."""
        args, name = self.pop(), self.pop()
        if not isinstance(name, Global) or name.make is None or not isinstance(args, tuple):
            what = name.name if isinstance(name, Global) else type(name).__name__
            raise ValueError(f"a pickle that calls {what!r:.80}, at {self.at}")
        self.stack.append(name.make(args))


def _attributes(pickle: Pickle) -> None:
    """Drops the attributes of an `OrderedDict`: torch keeps versions of modules there."""
    pickle.pop()
    pickle.top(dict)


def _stack_global(pickle: Pickle) -> None:
    name, module = pickle.pop(), pickle.pop()
    pickle.mention(module, name)


def _set_item(pickle: Pickle) -> None:
    value, key = pickle.pop(), pickle.pop()
    pickle.assign([key, value])


def _memoize(pickle: Pickle) -> None:
    pickle.memo[len(pickle.memo)] = pickle.top(object)


_ACTIONS: dict[bytes, Callable[[Pickle], None]] = {
    b"\x8a": Pickle.long,
    b"(": Pickle.mark,
    b"t": lambda p: p.push(tuple(p.marked())),
    b"a": lambda p: p.append([p.pop()]),
    b"e": lambda p: p.append(p.marked()),
    b"s": _set_item,
    b"u": lambda p: p.assign(p.marked()),
    b"c": lambda p: p.mention(p.line(), p.line()),
    b"\x93": _stack_global,
    b"R": Pickle.call,
    b"b": _attributes,
    b"Q": lambda p: p.push(p.reference(p.pop())),
    b"\x94": _memoize,
}
