"""Which channels of a program may be rotated: turned by one orthogonal matrix where they are made
and turned back where they are read.

Every value gets at most one :class:`Turn`: along some of its axes it is turned by the matrix of a
:class:`Space`. Linear operations hand it on, sums want one space for all that is added, the sum
of squares along the axes does not see it, and neither does the mean, if the matrix keeps the
vector of ones. Whatever is not listed makes the matrix the identity, and says why.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from .._deferred import ARITHMETIC, ENTRYWISE
from .._tracked import is_tracked
from ._fixed import evaluate, paths_of
from ._flow import Flow, shape_of
from ._nodes import Graph, Node, Value


@dataclasses.dataclass(eq=False)
class Space:
    """Channels that are turned by one matrix.

    Args:
      size: number of channels.
      block: the matrix is one of this size for each run of channels.
      ones: whether it keeps the vector of ones.
      why: why it is the identity, or empty.
      needs: paths of scales that have to be one.
      parent: the space it was joined with.
    """

    size: int
    block: int
    ones: bool = False
    why: str = ""
    needs: set[str] = dataclasses.field(default_factory=set)
    parent: Space | None = None

    @property
    def root(self) -> Space:
        """The space that this one is by now."""
        return self if self.parent is None else self.parent.root

    def fix(self, why: str) -> None:
        """Makes the matrix the identity."""
        root = self.root
        root.why = root.why or why

    def within(self, block: int) -> None:
        """Makes the matrix one of blocks of a size, or of the smaller ones it has."""
        root = self.root
        small, large = sorted((root.block, block))
        root.block = small
        if large % small:
            root.fix(f"its channels are cut into runs of {large} and of {small}")

    def join(self, other: Space, why: str) -> None:
        """Makes two spaces one."""
        a, b = self.root, other.root
        if a is b:
            return
        if a.size != b.size:
            a.fix(why)
            b.fix(why)
            return
        b.parent = a
        a.ones, a.why, a.needs = a.ones or b.ones, a.why or b.why, a.needs | b.needs
        a.within(b.block)


@dataclasses.dataclass(frozen=True)
class Turn:
    """How a value is turned.

    Args:
      dims: its axes, whose entries in row-major order are the channels.
      space: the space.
      square: whether it holds products of two vectors, of which only the sum is kept.
    """

    dims: tuple[int, ...]
    space: Space
    square: bool = False

    def moved(self, to: Callable[[int], int]) -> Turn:
        """Returns the turn with its axes renamed."""
        return dataclasses.replace(self, dims=tuple(map(to, self.dims)))


# Constants that are larger are not looked into.
_MOST = 1 << 20

Turns = list[Turn | None]
# What one use of a parameter is: the axes that are turned, and by which space.
Role = frozenset[tuple[tuple[int, ...], Space]]


class Spaces:
    """The spaces of a program.

    Args:
      graph: the program.
      rules: by the name of an operation from it to the turns of its results.
      flow: its factors, for how parameters are used.
      may_be_one: paths of scales that other parameters could take over.
    """

    def __init__(
        self,
        graph: Graph,
        rules: dict[str, Callable[[Spaces, Node], Turns]],
        flow: Flow,
        may_be_one: set[str],
    ):
        self.flow, self.may_be_one = flow, may_be_one
        self.every: list[Space] = []
        self.turns: dict[Value, Turn] = {}
        self.flat: dict[Value, dict[int, frozenset[str]]] = {}
        self.uses: dict[str, list[Role]] = {}
        self.constants: dict[int, tuple[Any, set[int]]] = {}
        for node in graph.nodes:
            found = rules.get(node.name, fixes)(self, node)
            for v, t in zip(node.outs, found, strict=True):
                self.flat.setdefault(v, _flat(self, node, v))
                if t is not None:
                    self.turns[v] = t
        self._settle()

    def _settle(self) -> None:
        """A parameter that is used in several ways has to be turned in one way."""
        for path, uses in self.uses.items():
            roles = {frozenset((axes, s.root) for axes, s in use) for use in uses}
            if len(roles) > 1:
                for _, space in set().union(*roles):
                    space.fix(f"{path} is used in several ways")

    def new(self, size: int) -> Space:
        """Makes a space."""
        self.every.append(Space(size, size))
        return self.every[-1]

    def live(self, x: Any) -> Turn | None:
        """Returns how a value is turned."""
        t = None if is_tracked(x) else self.turns.get(x)
        return None if t is None or t.space.root.why else t

    def why(self, x: Any) -> str:
        """Says why a value is not turned, if it could have been."""
        t = None if is_tracked(x) else self.turns.get(x)
        return f", as {t.space.root.why}" if t is not None and t.space.root.why else ""

    def stays(self, x: Any, but: Iterable[str] = ()) -> None:
        """Notes that parameters are used as they are."""
        if is_tracked(x):
            for path in paths_of(x) - set(but):
                self.uses.setdefault(path, []).append(frozenset())

    def member(self, node: Node, i: int, turns: Sequence[Turn | None]) -> bool:
        """Notes that a parameter is turned along axes of an operand; says whether it can be."""
        x, roles = node.operands[i], []
        lines = self.flow.lines(x, _shape(node, i))
        if any(h.step.name in ARITHMETIC | {"neg"} for o, _ in lines for h in o.hops):
            lines = []  # Entries that are scaled apart do not turn together.
        for o, line in lines:
            role = set()
            for turn in filter(None, turns):
                dims = [len(line.taken) + d for d in turn.dims]
                axes = sorted(set().union(*(line.varies(d) for d in dims)))
                sizes = tuple(o.shape[a] for a in axes)
                at = line.grid(dims, axes, sizes)
                if len(at) != math.prod(sizes) or not np.array_equal(at, np.arange(len(at))):
                    lines = []
                role.add((tuple(axes), turn.space))
            roles.append((o.path, frozenset(role)))
        if not lines:
            self.stays(x)
            return False
        for path, role in roles:
            self.uses.setdefault(path, []).append(role)
        self.stays(x, but=[p for p, _ in roles])
        return True

    def same_along(self, value: Any, shape: tuple[int, ...]) -> set[int]:
        """Returns the axes along which a constant is the same."""
        if not 0 < math.prod(shape) <= _MOST:
            return set()
        if id(value) not in self.constants:
            with jax.ensure_compile_time_eval():
                found = evaluate(value, {})
            same = set()
            if found is not None:
                array = np.broadcast_to(np.asarray(found), shape)
                same = {d for d in range(len(shape)) if np.all(array == array.take([0], d))}
            self.constants[id(value)] = value, same  # the value is held, as ids are used again
        return self.constants[id(value)][1]

    def constant_along(self, node: Node, i: int, dims: Sequence[int]) -> frozenset[str] | None:
        """Returns what has to be one for an operand to be the same along axes, if it ever is."""
        needs: frozenset[str] = frozenset()
        for d in dims:
            found = _flat_of(self, node, i).get(d)
            if found is None:
                return None
            needs |= found
        return needs


def _flat_of(s: Spaces, node: Node, i: int) -> dict[int, frozenset[str]]:
    """Returns the axes of an operand along which it is the same, and what has to be one for it."""
    x, shape = node.operands[i], _shape(node, i)
    ones: dict[int, frozenset[str]] = {d: frozenset() for d, n in enumerate(shape) if n == 1}
    if not shape:
        return {d: frozenset() for d in range(len(node.outs[0].shape))}
    if not is_tracked(x):
        return ones | s.flat.get(x, {})
    if not paths_of(x):
        return ones | {d: frozenset() for d in s.same_along(x.value, shape)}
    paths = frozenset(paths_of(x))
    if len(paths) == 1 and paths <= s.may_be_one and x.origins:
        return dict.fromkeys(range(len(shape)), paths) | ones
    return ones


def _shape(node: Node, i: int) -> tuple[int, ...]:
    x = node.operands[i]
    if isinstance(x, Value):
        return x.shape
    return node.outs[0].shape if node.name == "branches" else shape_of(node, i)


def _flat(s: Spaces, node: Node, v: Value) -> dict[int, frozenset[str]]:
    """Returns the axes along which a result is the same."""
    if node.name == "broadcast_in_dim":
        at = node.eqn.params["broadcast_dimensions"]
        before = _flat_of(s, node, 0)
        kept = {d: before[i] for i, d in enumerate(at) if i in before}
        return {d: frozenset() for d in range(len(v.shape)) if d not in at} | kept
    if node.name not in ENTRYWISE | ARITHMETIC | {"max", "min", "select_n"}:
        return {}
    every = [_flat_of(s, node, i) for i in range(len(node.operands))]
    both = set.intersection(*(set(e) for e in every))
    return {d: frozenset().union(*(e[d] for e in every)) for d in both}


def fixes(s: Spaces, node: Node) -> Turns:
    """Whatever is not listed sees a rotation."""
    verb = "is returned" if node.name == "return" else f"goes through {node.label}"
    for x in node.operands:
        if (t := s.live(x)) is not None:
            t.space.fix(f"it {verb}")
        s.stays(x)
    return [None] * len(node.outs)
