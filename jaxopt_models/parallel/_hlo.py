"""The text of a compiled program: its instructions, and how often each of them runs."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

#: Names of XLA's types in JAX, and the bits of one entry.
TYPES = {
    "pred": ("bool", 8),
    "bf16": ("bfloat16", 16),
    "c64": ("complex64", 64),
    "c128": ("complex128", 128),
    "f8e8m0fnu": ("float8_e8m0fnu", 8),
    **{f"s{n}": (f"int{n}", n) for n in (1, 2, 4, 8, 16, 32, 64)},
    **{f"u{n}": (f"uint{n}", n) for n in (1, 2, 4, 8, 16, 32, 64)},
    **{f"f{n}": (f"float{n}", n) for n in (16, 32, 64)},
    **{f"f8{k}": (f"float8_{k}", 8) for k in ("e4m3fn", "e4m3", "e5m2", "e4m3b11fnuz", "e3m4")},
    **{f"f8{k}": (f"float8_{k}", 8) for k in ("e4m3fnuz", "e5m2fnuz")},
    "f4e2m1fn": ("float4_e2m1fn", 4),
}

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAME = re.compile(r"^ +(ROOT )?%?([\w.\-]+) = ")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z]*\w*)\[([\d,]*)\](\{[^{}]*\})?")
_CALLED = re.compile(
    r"\b(calls|body|condition|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array that a program holds on one device.

    Args:
      dtype: JAX's name of its type.
      shape: its shape.
      bits: of one entry.
      space: number of the memory it lies in; 0 is the large one.
    """

    dtype: str
    shape: tuple[int, ...]
    bits: int
    space: int = 0

    @property
    def bytes(self) -> int:
        """Bytes of all entries."""
        return -(-math.prod(self.shape) * self.bits // 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """A line of a program.

    Args:
      name: unique in its computation.
      kind: what it does, XLA's name.
      arrays: its results, in order.
      nested: for each entry of a tuple its arrays; `arrays` alone for no tuple.
      operands: names of its inputs.
      attributes: what follows the operands.
      text: what stands between the parentheses.
      root: whether it is the result of its computation.
    """

    name: str
    kind: str
    arrays: tuple[Array, ...]
    nested: tuple[tuple[Array, ...], ...]
    operands: tuple[str, ...]
    attributes: str
    text: str
    root: bool

    def integers(self, attribute: str) -> tuple[int, ...]:
        """Returns a list of integers, as in ``dimensions={0,1}``; empty if it is not there."""
        found = re.search(rf"\b{attribute}=\{{([\d,]*)\}}", self.attributes)
        return tuple(int(n) for n in found[1].split(",") if n) if found else ()

    def word(self, attribute: str) -> str:
        """Returns one word, as in ``direction=LT``; empty if it is not there."""
        found = re.search(rf"\b{attribute}=\"?([^\s,\"]+)", self.attributes)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Run:
    """An instruction where it runs.

    Args:
      instruction: the line.
      computation: the lines it stands among.
      times: how often it runs, by the loops around it.
      open: whether a loop around it does not say how often it runs, which counts as once.
      inside: the fusion that computes it, or ``None``.
    """

    instruction: Instruction
    computation: Computation
    times: int
    open: bool
    inside: Instruction | None


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program.

    Args:
      computations: by name.
      entry: name of the one that is called.
      partitions: number of devices it runs on.
    """

    computations: dict[str, Computation]
    entry: str
    partitions: int

    def runs(self) -> Iterator[Run]:
        """Gives each instruction once for each place that its computation is called from."""
        yield from self._of(self.entry, 1, False, None)

    def _of(self, name: str, times: int, open_: bool, inside: Instruction | None) -> Iterator[Run]:
        computation = self.computations[name]
        for one in computation.values():
            yield Run(one, computation, times, open_, inside)
            if one.kind.endswith(("-done", "-update")):
                continue  # their start has been followed
            for role, callee in self.called(one):
                if callee not in self.computations:
                    continue
                n: int | None = 1
                if role in ("body", "condition"):
                    n = self.passes(one, computation)
                within = one if one.kind == "fusion" and inside is None else inside
                yield from self._of(
                    callee, times * (1 if n is None else n), open_ or n is None, within
                )

    def called(self, one: Instruction) -> list[tuple[str, str]]:
        """Returns what an instruction calls: role and name; no functions of single entries."""
        found = [(role, name) for role, name in _CALLED.findall(one.attributes)]
        if one.kind != "call":
            found = [(role, name) for role, name in found if role != "to_apply"]
        if branches := _BRANCHES.search(one.attributes):
            found += [("branch", b.strip().lstrip("%")) for b in branches[1].split(",")]
        return found

    def passes(self, loop: Instruction, around: Computation) -> int | None:
        """Returns how often a loop runs, by what the compiler says or by its counter."""
        known = re.search(r'"known_trip_count":\s*\{"n":"(\d+)"', loop.attributes)
        if known:
            return int(known[1])
        roles = dict(_CALLED.findall(loop.attributes))
        condition, body = (self.computations.get(roles.get(r, "")) for r in ("condition", "body"))
        if not condition or not body:
            return None
        test = _root(condition)
        direction = test.word("direction")
        if test.kind != "compare" or direction not in ("LT", "LE"):
            return None
        counter, bound = condition.get(test.operands[0]), _number(condition, test.operands[1])
        if counter is None or counter.kind != "get-tuple-element" or bound is None:
            return None
        place = int(counter.word("index"))
        start = _entry(around, loop.operands[0], place)
        first = None if start is None else _number(around, start)
        step = _step(body, place)
        if first is None or not step:
            return None
        return max(0, -(-(bound + (direction == "LE") - first) // step))


def parse(text: str) -> Module:
    """Reads the text of a compiled program.

    Args:
      text: `compiled.as_text()`.

    Returns:
      Its computations.

    Raises:
      ValueError: if it is no compiled program.
    """
    computations: dict[str, Computation] = {}
    entry, now = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            now = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif now is not None and (one := _instruction(line)):
            now[one.name] = one
    if not entry:
        raise ValueError(
            "this is not the text of a compiled program; give jax.jit(fn).lower(...).compile(), "
            "or what its as_text() returns"
        )
    first = text[: text.find("\n")]
    counts = [re.search(rf"\b{n}=(\d+)", first) for n in ("num_partitions", "replica_count")]
    return Module(computations, entry, math.prod(int(c[1]) for c in counts if c))


def _instruction(line: str) -> Instruction | None:
    head = _NAME.match(line)
    if not head:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.find(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    start = rest.find("(")
    if start < 0:
        return None
    stop = _closing(rest, start)
    text = rest[start + 1 : stop]
    nested = tuple(_arrays(s) for s in _split(shape[1:-1])) if shape[0] == "(" else ()
    arrays = _arrays(shape)
    return Instruction(
        name=head[2],
        kind=rest[:start],
        arrays=arrays,
        nested=nested or (arrays,),
        operands=tuple(re.findall(r"%([\w.\-]+)", text)),
        attributes=rest[stop + 1 :],
        text=text,
        root=bool(head[1]),
    )


def _closing(text: str, start: int) -> int:
    """Returns where the parenthesis that opens at ``start`` closes."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    return len(text)


def _split(text: str) -> list[str]:
    """Splits a tuple's text at its own commas."""
    found, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c == "," and not depth:
            found.append(text[start:i])
            start = i + 1
    return [*found, text[start:]] if text.strip() else []


def _arrays(text: str) -> tuple[Array, ...]:
    found = []
    for kind, sides, layout in _ARRAY.findall(text):
        if kind in TYPES:
            name, bits = TYPES[kind]
            space = re.search(r"S\((\d+)\)", layout)
            shape = tuple(int(n) for n in sides.split(",") if n)
            found.append(Array(name, shape, bits, int(space[1]) if space else 0))
    return tuple(found)


def _root(computation: Computation) -> Instruction:
    return next(one for one in computation.values() if one.root)


def _source(computation: Computation, name: str) -> Any:
    """Returns the instruction that makes a value, past mere copies of it."""
    one = computation.get(name)
    while one is not None and one.kind in ("copy", "bitcast", "convert", "reshape", "copy-done"):
        one = computation.get(one.operands[0])
        if one is not None and one.kind == "copy-start":
            one = computation.get(one.operands[0])
    return one


def _number(computation: Computation, name: str) -> int | None:
    one = _source(computation, name)
    if one is None or one.kind != "constant" or not re.fullmatch(r"-?\d+", one.text):
        return None
    return int(one.text)


def _entry(computation: Computation, name: str, place: int) -> str | None:
    one = _source(computation, name)
    return one.operands[place] if one is not None and one.kind == "tuple" else None


def _step(body: Computation, place: int) -> int | None:
    """Returns what a loop adds to its counter in a pass."""
    new = _entry(body, _root(body).name, place)
    one = None if new is None else _source(body, new)
    if one is None or one.kind != "add":
        return None
    for a, b in (one.operands, one.operands[::-1]):
        old, step = _source(body, a), _number(body, b)
        if old is not None and old.kind == "get-tuple-element" and int(old.word("index")) == place:
            return step
    return None
