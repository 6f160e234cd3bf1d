"""A program as a list of operations on data, calls and loops opened; nothing is computed.

The rewrites of parameters ask where a value came from and who reads it. So the program is run as
the walk runs it, but on :class:`Value` instead of arrays: what hangs on data is a value, what
hangs on parameters and constants only is a :class:`Tracked`, whose origins are the parameters in
which it is linear: were all of them multiplied with a number, it would be. Where loops and
branches begin and end there are operations of their own:

* ``loop_in`` (initial) -> what a loop carries, inside; ``loop_out`` (that, what the body makes of
  it) -> the carried value, outside;
* ``loop_slice`` and ``loop_stack``: the slice of one iteration, and the stack of all;
* ``branches`` (one of each branch) -> the result; ``decide``: what a branch hangs on;
* ``return``: everything that is returned.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp

from .._call import Program
from .._jaxpr import CALLS, inner, interpret, scan_counts, scope_of
from .._tracked import Origin, Tracked, is_tracked
from ._fixed import Ref, fixed, sliced


@dataclasses.dataclass(eq=False)
class Value:
    """An array that hangs on data: its shape and type, who made it, who reads it."""

    shape: tuple[int, ...]
    dtype: Any
    made: Node | None = None
    readers: list[Node] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class Node:
    """One operation.

    Args:
      name: the primitive, or one of those of the module.
      eqn: the equation.
      operands: values, and tracked ones.
      around: the equations in whose bodies it is, outermost first.
      outs: what it returns.
    """

    name: str
    eqn: Any
    operands: list[Any]
    around: tuple[Any, ...]
    outs: list[Value] = dataclasses.field(default_factory=list)

    @property
    def depth(self) -> int:
        """Number of scans around."""
        return sum(e.primitive.name == "scan" for e in self.around)

    @property
    def trail(self) -> tuple[int, ...]:
        """What tells its equation from all others, as :meth:`Walk.trail`."""
        return tuple(id(e) for e in (*self.around, self.eqn))

    @property
    def label(self) -> str:
        """Its name and scope, for messages."""
        scope = scope_of(*self.around, self.eqn) if self.eqn is not None else ""
        return self.name + (f" ({scope})" if scope else "")


class Graph:
    """The operations of a program, in order.

    Args:
      program: a traced call.
      values: its parameters by path, in order: arrays, leaves, or their shapes.
    """

    def __init__(self, program: Program, values: dict[str, Any]):
        self.nodes: list[Node] = []
        self._around: tuple[Any, ...] = ()
        operands: list[Any] = [_value(v) for v in program.jaxpr.invars]
        for i, (path, value) in enumerate(values.items()):
            if jnp.issubdtype(value.dtype, jnp.floating):
                operands[i] = Tracked(Ref(path), (Origin((), path, tuple(value.shape)),))
        self.add("return", None, self._run(program.jaxpr, program.consts, operands), ())

    def add(self, name: str, eqn: Any, operands: list[Any], outs: Sequence[Any]) -> list[Value]:
        """Adds an operation with results like these variables."""
        node = Node(name, eqn, operands, self._around)
        node.outs = [_value(v, node) for v in outs]
        for x in operands:
            if isinstance(x, Value):
                x.readers.append(node)
        self.nodes.append(node)
        return node.outs

    def _run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        return interpret(jaxpr, list(map(Tracked, consts)), args, self._apply, number=Tracked)

    def _body(
        self, eqn: Any, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any]
    ) -> list[Any]:
        outside, self._around = self._around, (*self._around, eqn)
        try:
            return self._run(jaxpr, consts, operands)
        finally:
            self._around = outside

    def _apply(self, eqn: Any, operands: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name in CALLS:
            return self._body(eqn, *inner(eqn.params), operands)
        if all(map(is_tracked, operands)) and not eqn.effects:
            return fixed(eqn, operands)
        rule = {"scan": self._scan, "while": self._while, "cond": self._cond}.get(name)
        return rule(eqn, operands) if rule else self.add(name, eqn, operands, eqn.outvars)

    def _scan(self, eqn: Any, operands: list[Any]) -> list[Any]:
        jaxpr, consts = inner(eqn.params)
        n, m = scan_counts(eqn.params)
        depth = 1 + sum(e.primitive.name == "scan" for e in self._around)
        start, finish = self._carry(eqn, operands[n : n + m], jaxpr.invars[n : n + m])
        parts = []
        for x, v in zip(operands[n + m :], jaxpr.invars[n + m :], strict=True):
            if is_tracked(x):
                parts.append(sliced(x, (eqn.params["length"], *v.aval.shape), depth))
            else:
                parts += self.add("loop_slice", eqn, [x], [v])
        out = self._body(eqn, jaxpr, consts, [*operands[:n], *start, *parts])
        stacks = [
            self.add("loop_stack", eqn, [y], [v])[0]
            for y, v in zip(out[m:], eqn.outvars[m:], strict=True)
        ]
        return [*finish(out[:m], eqn.outvars[:m]), *stacks]

    def _while(self, eqn: Any, operands: list[Any]) -> list[Any]:
        p = eqn.params
        n, m = p["cond_nconsts"], p["body_nconsts"]
        jaxpr, consts = inner(p, "body_jaxpr")
        start, finish = self._carry(eqn, operands[n + m :], jaxpr.invars[m:])
        goes_on = self._body(eqn, *inner(p, "cond_jaxpr"), [*operands[:n], *start])
        self.add("decide", eqn, goes_on, ())
        out = self._body(eqn, jaxpr, consts, [*operands[n : n + m], *start])
        return finish(out, eqn.outvars)

    def _carry(
        self, eqn: Any, values: list[Any], before: Sequence[Any]
    ) -> tuple[list[Any], Callable[..., list[Any]]]:
        """Returns what the body of a loop begins with, and what makes its end the result."""
        jaxpr, _ = inner(eqn.params, "jaxpr", "body_jaxpr")
        ends = jaxpr.outvars[: len(values)]
        # A parameter that is handed on unchanged is one inside, too.
        still = [is_tracked(x) and a is b for x, a, b in zip(values, before, ends, strict=True)]
        start = [
            x if s else self.add("loop_in", eqn, [x], [v])[0]
            for x, v, s in zip(values, before, still, strict=True)
        ]

        def finish(out: list[Any], outvars: Sequence[Any]) -> list[Any]:
            return [
                x if s else self.add("loop_out", eqn, [x, y], [v])[0]
                for x, y, s, v in zip(start, out, still, outvars, strict=True)
            ]

        return start, finish

    def _cond(self, eqn: Any, operands: list[Any]) -> list[Any]:
        index, *rest = operands
        self.add("decide", eqn, [index], ())
        branches = [self._body(eqn, *inner({"jaxpr": b}), rest) for b in eqn.params["branches"]]
        return [
            self.add("branches", eqn, list(outs), [v])[0]
            for *outs, v in zip(*branches, eqn.outvars, strict=True)
        ]


def _value(v: Any, made: Node | None = None) -> Value:
    return Value(tuple(getattr(v.aval, "shape", ())), getattr(v.aval, "dtype", None), made)
