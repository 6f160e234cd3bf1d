"""How factors of channels go through the operations of a program.

Every value gets unknown factors such that nothing that is returned changes when values are
multiplied with them. An operation that commutes with positive factors hands them on; one that
takes several values wants theirs to be equal; one that does not commute makes them one, and so
does whatever is not listed here. Where a value meets a parameter that is linear there, the
parameter makes up the difference: a product with a kernel has factors of its own on the kernel's
output axes, and the kernel is multiplied with these and divided by those of its input.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .._roles import Lines, UnknownStep
from .._tracked import Origin, Tracked, is_tracked
from ._fixed import paths_of
from ._nodes import Graph, Node, Value
from ._scales import MOST, Pool, Term, term

Fields = list[list[Term]]
KINDS = ("product", "scaled", "added")


@dataclasses.dataclass(frozen=True, eq=False)
class Use:
    """What one use of a parameter asks of it.

    Args:
      path: its path.
      kind: ``"product"``, ``"lookup"``, ``"scaled"`` (entry by entry), ``"added"``, or
        ``"fixed"``, if it has to stay as it is.
      node: the operation.
      origin: how it came there.
      lines: where the axes of the operand lead in it.
      times: it is multiplied with these factors of the operand's entries,
      over: and divided by these.
    """

    path: str
    kind: str
    node: Node
    origin: Origin | None = None
    lines: Any = None
    times: tuple[Term, ...] = ()
    over: tuple[Term, ...] = ()


class Flow:
    """The factors of every value of a program.

    Args:
      graph: the program.
      rules: by the name of an operation from it to the factors of its results.
      absorbs: kinds of uses that may make up a difference of factors.
      takes: operations in which whatever is multiplied makes up a difference.
    """

    def __init__(
        self,
        graph: Graph,
        rules: dict[str, Callable[[Flow, Node], Fields]],
        *,
        absorbs: Sequence[str] = KINDS,
        takes: Sequence[Node] = (),
    ):
        self.graph, self.absorbs, self.takes = graph, absorbs, set(map(id, takes))
        self.pool = Pool()
        self.fields: dict[Value, list[Term]] = {}
        self.notes: dict[Value, str] = {}
        self.uses: list[Use] = []
        self.taken: dict[int, tuple[list[Term], list[Term]]] = {}
        for node in graph.nodes:
            found = rules.get(node.name, fixes)(self, node)
            for v, terms in zip(node.outs, found, strict=True):
                self.fields[v] = terms
                if not self.field(v):
                    self.notes.setdefault(v, self._why(node.operands))
        self._settle()

    def field(self, x: Any) -> list[Term]:
        """Returns the factors of a value that are not all one."""
        terms = [] if is_tracked(x) else self.fields.get(x, [])
        return [t for t in terms if self.pool.of(t.ids).any()]

    def why(self, x: Any) -> str:
        """Says why a value has no factors."""
        if is_tracked(x):
            return ""
        blocks = [np.unique(self.pool.block[t.ids]) for t in self.fields.get(x, [])]
        known = [self.pool.why[k] for b in blocks for k in b if self.pool.why[k]]
        return known[0] if known else self.notes.get(x, "")

    def _why(self, operands: Sequence[Any]) -> str:
        return next(filter(None, map(self.why, operands)), "")

    def fix(self, terms: Sequence[Term], why: str) -> None:
        """Makes factors one."""
        for t in terms:
            self.pool.fix(t.ids, why)

    def equal(self, a: Sequence[Term], b: Sequence[Term], why: str) -> None:
        """Makes the factors of two values equal."""
        a, b = list(a), list(b)
        for t in list(a):
            twin = next((u for u in b if self._alike(t, u)), None)
            if twin is not None:
                a.remove(t)
                b.remove(twin)
        if len(a) == len(b) == 1:
            dims = sorted({*a[0].dims, *b[0].dims})
            self.pool.same(a[0].over(dims), b[0].over(dims), why)
        else:
            self.fix([*a, *b], why)

    def _alike(self, t: Term, u: Term) -> bool:
        return t.dims == u.dims and np.array_equal(self.pool.of(t.ids), self.pool.of(u.ids))

    # -------------------------------------------------------------- parameters

    def lines(self, x: Tracked, shape: tuple[int, ...]) -> list[tuple[Origin, Any]]:
        """Returns, of each parameter of an operand, where its axes lead, or nothing at all."""
        found = []
        for o in x.origins:
            if o.lost or o.at:
                return []
            try:
                lines = Lines(o, shape)
                if not lines.add_up():
                    return []
            except UnknownStep:
                return []
            found.append((o, lines))
        return found

    def use(
        self,
        node: Node,
        i: int,
        kind: str,
        shape: tuple[int, ...],
        times: Sequence[Term],
        over: Sequence[Term] = (),
    ) -> bool:
        """Notes that a parameter makes up for factors; says whether it can."""
        x = node.operands[i]
        lines = self.lines(x, shape) if kind in self.absorbs or kind == "lookup" else []
        if not lines:
            self.stays(x, node)
            return False
        times = [self._narrow(t, lines) for t in times]
        over = [self._narrow(t, lines) for t in over]
        for o, line in lines:
            self.uses.append(Use(o.path, kind, node, o, line, tuple(times), tuple(over)))
        self.stays(x, node, but={o.path for o, _ in lines})
        return True

    def stays(self, x: Any, node: Node, but: set[str] | None = None) -> None:
        """Notes that an operation needs parameters as they are."""
        if is_tracked(x):
            self.uses += [Use(p, "fixed", node) for p in sorted(paths_of(x) - (but or set()))]

    def _narrow(self, t: Term, lines: list[tuple[Origin, Any]]) -> Term:
        """Makes factors equal along the axes that a parameter does not have."""
        return self.collapsed(t, set(t.dims) - set(_axes_of(lines)))

    def collapsed(self, t: Term, dims: set[int]) -> Term:
        """Makes factors equal along some axes, and returns the term without these."""
        ids = t.ids
        for d in dims:
            one = ids.take([0], t.dims.index(d))
            self.pool.same(ids, one, "")
            ids = one
        return term(t.dims, ids)

    def new(self, x: Tracked, shape: tuple[int, ...], dims: Sequence[int]) -> list[Term]:
        """Makes factors for a parameter along some axes of an operand, and along loops."""
        lines = self.lines(x, shape)
        sizes = _axes_of(lines)
        dims = [d for d in sorted(sizes) if d < 0 or d in dims]
        if not lines or np.prod([sizes[d] for d in dims]) > MOST:
            return []
        return [term(dims, self.pool.new([sizes[d] for d in dims]))]

    def _settle(self) -> None:
        """A parameter that is used in several ways has to be multiplied with one number."""
        by_path: dict[str, list[Use]] = {}
        for u in self.uses:
            by_path.setdefault(u.path, []).append(u)
        for path, uses in by_path.items():
            first, *others = uses
            if all(self._same_use(first, u) for u in others):
                continue
            for u in uses:
                self.fix([*u.times, *u.over], f"{path} is used in several ways")
        kept: dict[str, Use] = {u.path: u for u in reversed(self.uses)}
        self.uses = [u for u in kept.values() if u.kind != "fixed"][::-1]

    def _same_use(self, a: Use, b: Use) -> bool:
        if a.kind == b.kind == "fixed":
            return True
        if a.origin is None or b.origin is None or a.origin.key != b.origin.key:
            return False
        pairs = ((a.times, b.times), (a.over, b.over))
        return all(len(s) == len(t) and all(map(self._alike, s, t)) for s, t in pairs)


def _axes_of(lines: list[tuple[Origin, Any]]) -> dict[int, int]:
    """Returns the length of each axis of an operand along which a parameter varies."""
    found = {}
    for o, line in lines:
        taken = len(line.taken)
        for d, n in enumerate(line.sizes):
            if n > 1 and line.varies(d):
                found[axis_of(o, line, d) if d < taken else d - taken] = n
    return found


def axis_of(o: Origin, line: Any, d: int) -> int:
    """Returns the name of the axis that a loop took away."""
    return -o.loops[line.loops.index(d)]


def shape_of(node: Node, i: int) -> tuple[int, ...]:
    """Returns the shape of an operand."""
    return tuple(node.eqn.invars[i].aval.shape)


def fixes(f: Flow, node: Node) -> Fields:
    """Whatever is not listed does not commute with factors."""
    verb = "is returned" if node.name == "return" else f"goes through {node.label}"
    for x in node.operands:
        f.fix(f.field(x), f"it {verb}")
        f.stays(x, node)
    for v in node.outs:
        f.notes[v] = f"it comes out of {node.label}"
    return [[] for _ in node.outs]


def reasons(x: Tracked) -> str:
    """Says what a fixed operand is."""
    paths = sorted(paths_of(x))
    return f"what is made of {', '.join(paths)}" if paths else "a constant"
