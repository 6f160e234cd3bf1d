"""What each parameter meets in a program, what it costs, and what runs there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from ._call import name_of, take_apart, trace
from ._jaxpr import bodies, scope_of
from ._kernels import pick
from ._products import multiply_adds, product_of
from ._roles import Roles, roles
from ._table import Table
from ._tracked import is_tracked, origins_of, packed, readers
from ._walk import ENTERING, Walk


def explain(fn: Any, params: Any, args: Any, kwargs: Any, *, kernels: bool) -> Table:
    """Says what each parameter meets in ``fn(params, *args, **kwargs)``; nothing is computed.

    Args:
      fn: the function.
      params: its parameters, compressed or not, or their shapes.
      args: arrays, shapes (`jax.ShapeDtypeStruct`) and static values.
      kwargs: the same.
      kernels: whether any may run.

    Returns:
      A row for each use of a parameter, and for each product of values that are no parameters:
      path, operation, its axes (`in`, `out`, `stack`), shapes of the parameter, the other operand
      and the result, how often it runs, multiply-adds of all runs, what runs, and a note: why no
      kernel does, why axes cannot be told. Parameters that never reach the program end the table.
      ``data["multiply_adds"]`` counts each product once, both branches of a condition.
    """
    frame, arrays = take_apart(params, args, kwargs)
    walk = Explaining(may_run=kernels)
    notes: dict[str, str] = {}

    def run(arrays: list[Any]) -> list[Any]:
        program = trace(fn, frame, arrays, who="explain", every=True)
        notes.update({p.path: "never reaches the program" for p in program.unreached})
        out = walk.run(program.jaxpr, program.consts, program.operands)
        for x in filter(is_tracked, out):
            walk.lose(x, "it is returned")
        return [x for x in out if not is_tracked(x)]

    jax.eval_shape(run, arrays)
    rows = [tuple(row) for row in walk.rows.values()]
    used = {row[0] for row in rows}
    notes |= {path: why for path, why in walk.lost.items() if path not in used}
    rows += [(path, "", "", None, None, None, 0, 0, "", why) for path, why in notes.items()]
    return Table(
        COLUMNS,
        rows,
        title=f"explain {name_of(fn)}",
        notes=[_note(walk.totals)],
        data={"multiply_adds": sum(n for n, _ in walk.totals.values())},
    )


COLUMNS = (
    *("path", "operation", "axes", "parameter", "input", "output"),
    *("times", "multiply-adds", "runs", "note"),
)


def _note(totals: dict[Any, tuple[int, bool]]) -> str:
    with_, without = (sum(n for n, met in totals.values() if met == w) for w in (True, False))
    return f"multiply-adds: {with_:,} with parameters, {without:,} between other values"


@dataclasses.dataclass
class Explaining(Walk):
    """A walk that writes down what it meets.

    Args:
      rows: by the equation, and those around it, and the path.
      totals: multiply-adds by the equation, and whether it meets a parameter.
      lost: by path where a parameter went that was not followed.
      may_run: whether kernels may.
    """

    rules = ENTERING
    rows: dict[Any, Any] = dataclasses.field(default_factory=dict)
    totals: dict[Any, tuple[int, bool]] = dataclasses.field(default_factory=dict)
    lost: dict[str, str] = dataclasses.field(default_factory=dict)
    may_run: bool = True

    def lose(self, x: Any, why: str) -> None:
        for o in x.origins:
            self.lost.setdefault(o.path, why)

    def wants(self, eqn: Any) -> bool:
        return bool(multiply_adds(eqn)) or any(map(_multiplies, bodies(eqn)))

    def use(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        named = False
        for i, x in enumerate(operands):
            for k, o in enumerate(origins_of(x)):
                named = True
                self._write(eqn, operands, i, k, o)
        if not named and multiply_adds(eqn):
            self._row(eqn, ("",), "", None, eqn.invars[0].aval.shape, multiply_adds(eqn), "", "")
        return super().use(eqn, operands)

    def _write(self, eqn: Any, operands: Sequence[Any], i: int, k: int, o: Any) -> None:
        choice, why = None, ""
        value = operands[i].value
        if packed(value):
            choice, why = pick(eqn, operands) if self.may_run else (None, "no kernels here")
        notes = [why]
        product, axes, costs = product_of(eqn, i), "", multiply_adds(eqn)
        if not isinstance(product, str):
            r = roles(o, product)
            if isinstance(r, Roles):
                axes, costs = _axes(r, len(o.shape)), costs * r.share[0] // r.share[1]
            else:
                notes.append(r)
        ruled = [e.primitive.name for e in self.around if e.primitive.name.startswith("custom_")]
        if packed(value) and ruled:
            choice, notes = None, [f"rebuilt before a {ruled[0]}, whose rule is kept"]
        if o.rebuilt:
            notes.append(f"rebuilt whole {o.rebuilt}")
        between = len(operands) > 1 and all(map(origins_of, operands))
        unread = ruled or between or isinstance(product, str) or product.lookup
        if readers(value) and unread:
            notes.append("its input is not rounded here")
        runs = choice.label if choice else "rebuilt" if packed(value) or o.rebuilt else "dense"
        other = next((v.aval.shape for j, v in enumerate(eqn.invars) if j != i), None)
        note = "; ".join(n for n in notes if n)
        self._row(eqn, (o.path, i, k), axes, eqn.invars[i].aval.shape, other, costs, runs, note)

    def _row(
        self,
        eqn: Any,
        which: tuple[Any, ...],
        axes: str,
        mine: Any,
        other: Any,
        costs: int,
        runs: str,
        note: str,
    ) -> None:
        path = which[0]
        around = [e.primitive.name for e in self.around]
        where = ["for one iteration of a while loop"] if "while" in around else []
        where += ["in a branch"] if "cond" in around else []
        trail = self.trail(eqn)
        out = next((v.aval.shape for v in eqn.outvars), None)
        scope = scope_of(*self.around, eqn)
        name = eqn.primitive.name + (f" ({scope})" if scope else "")
        shapes = [None if s is None else list(s) for s in (mine, other, out)]
        note = "; ".join([*where, note] if note else where)
        self.totals[trail] = multiply_adds(eqn) * self.times, bool(path)
        cells = (path, name, axes, *shapes, self.times, costs * self.times, runs, note)
        self.rows[trail, which] = cells


def _multiplies(jaxpr: Any) -> bool:
    return any(multiply_adds(e) or any(map(_multiplies, bodies(e))) for e in jaxpr.eqns)


def _axes(r: Roles, ndim: int) -> str:
    out = set(r.axes.out or ())
    return " ".join(
        "stack" if a < r.axes.stack else "out" if a in out else "in" for a in range(ndim)
    )
