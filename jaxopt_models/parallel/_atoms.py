"""Axes as products of atoms: which axes of a program are one and the same.

Every axis of every value is a row of :class:`Atom`, the first the outermost. An operation makes
atoms one (an elementwise sum those of its operands), cuts them (a reshape of `[heads * d]` to
`[heads, d]`), or says why they cannot be divided over devices without a transfer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

#: What a value hangs on.
CONSTANT, PARAMETER, DATA = range(3)


@dataclasses.dataclass(eq=False)
class Atom:
    """A part of an axis.

    Args:
      size: number of entries.
      why: why it cannot be divided; empty if it can.
      argument: whether it is an axis of an argument of the function.
      stream: whether products are added up along it, as in a residual stream.
      parent: the atom that it was joined with.
      cut: the atoms that it was cut into, outermost first.
    """

    size: int
    why: str = ""
    argument: bool = False
    stream: bool = False
    parent: Atom | None = None
    cut: tuple[Atom, ...] = ()

    @property
    def root(self) -> Atom:
        """The atom that this one is by now."""
        atom = self
        while atom.parent is not None:
            atom = atom.parent
        return atom

    def fix(self, why: str) -> None:
        """Says that it cannot be divided."""
        for atom in flat((self,)):
            atom.why = atom.why or why

    def split(self, outer: int) -> None:
        """Cuts it into `outer` and what is left."""
        new = [Atom(n, self.why, self.argument, self.stream) for n in (outer, self.size // outer)]
        self.cut = tuple(new)


Axis = tuple[Atom, ...]


@dataclasses.dataclass(eq=False)
class Value:
    """An array of a program.

    Args:
      axes: the atoms of each axis; none where it has one entry.
      kind: what it hangs on.
      paths: parameters in it, if it hangs on nothing else.
      product: whether a product was added up for it, and nothing but sums since.
      itemsize: bytes of an entry.
    """

    axes: list[Axis]
    kind: int = DATA
    paths: frozenset[str] = frozenset()
    product: bool = False
    itemsize: int = 4

    @property
    def bytes(self) -> int:
        """Its size."""
        return math.prod(a.size for axis in self.axes for a in flat(axis)) * self.itemsize


def fresh(shape: Sequence[int], why: str = "") -> list[Axis]:
    """Returns new axes."""
    return [(Atom(n, why),) if n != 1 else () for n in shape]


def flat(axis: Sequence[Atom]) -> list[Atom]:
    """Returns the atoms that an axis consists of by now."""
    found: list[Atom] = []
    for atom in axis:
        root = atom.root
        found += flat(root.cut) if root.cut else [root]
    return found


def fix(axes: Sequence[Axis], why: str) -> None:
    """Says why axes cannot be divided."""
    for axis in axes:
        for atom in axis:
            atom.fix(why)


def join(a: Axis, b: Axis, why: str) -> None:
    """Makes two axes one, cut where either is; ``why`` if they are not cut alike."""
    while True:
        x, y = flat(a), flat(b)
        pairs = zip(x, y, strict=False)
        k = next((i for i, (p, q) in enumerate(pairs) if p.size != q.size), None)
        if k is None:
            break
        small, large = sorted((x[k], y[k]), key=lambda p: p.size)
        if large.size % small.size:
            for atom in x[k:] + y[k:]:
                atom.fix(why)
            return
        large.split(small.size)
    for p, q in zip(x, y, strict=False):
        p, q = p.root, q.root
        if p is not q:
            q.parent = p
            p.why, p.argument = p.why or q.why, p.argument or q.argument
            p.stream = p.stream or q.stream


def reshaped(axes: Sequence[Axis], shape: Sequence[int], why: str) -> list[Axis]:
    """Returns the axes of the same entries in another shape; ``why`` if they do not nest."""
    left = [atom for axis in axes for atom in axis]
    new: list[Axis] = []
    for n in shape:
        taken: list[Atom] = []
        while n > 1:
            left = left if left and not left[0].root.cut else flat(left)
            atom = left[0]
            if n % atom.size and atom.size % n:
                fix([tuple(left)], why)
                return [*new, *fresh(shape[len(new) :], why)]
            if atom.size > n:
                atom.root.split(n)
                left = flat(left)
                atom = left[0]
            taken.append(atom)
            left, n = left[1:], n // atom.size
        new.append(tuple(taken))
    return new


def joined(values: Sequence[Value], why: str) -> list[Axis]:
    """Joins the axes of operands of an elementwise operation, and returns those of its result."""
    ndim = max(len(v.axes) for v in values)
    found: list[Axis] = [()] * ndim
    for v in values:
        if len(v.axes) < ndim:
            continue  # a number
        for i, axis in enumerate(v.axes):
            if axis and found[i]:
                join(found[i], axis, why)
            found[i] = found[i] or axis
    return found


@dataclasses.dataclass(eq=False)
class Use:
    """A product of an input with a parameter, or a lookup in it.

    Args:
      label: the operation, for people.
      kernel: the parameter, on whatever way.
      reduced: axes of the kernel that are summed over, or looked up.
      given: the input.
      out: the result.
      times: how often it runs.
      lookup: whether it is a lookup.
    """

    label: str
    kernel: Value
    reduced: list[Axis]
    given: Value
    out: Value
    times: int
    lookup: bool = False


def value_of(var: Any, axes: list[Axis], operands: Sequence[Value]) -> Value:
    """Returns the result of an operation that is like a variable of a program."""
    kind = max((v.kind for v in operands), default=CONSTANT)
    paths = frozenset().union(*(v.paths for v in operands)) if kind == PARAMETER else frozenset()
    itemsize = getattr(getattr(var.aval, "dtype", None), "itemsize", 4)
    return Value(axes, kind, paths, itemsize=itemsize)
