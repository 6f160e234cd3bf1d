"""What each parameter meets in a program, what it costs, and what runs there."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import jax

from ._call import name_of, take_apart, trace
from ._epilogue import Epilogue
from ._jaxpr import bodies, scope_of
from ._kernels import Choice, pick
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
    walk, unused = explore(fn, params, args, kwargs, kernels=kernels, who="explain")
    rows = [use.cells() for use in walk.uses.values()]
    rows += [(path, "", "", None, None, None, 0, 0, "", why) for path, why in unused.items()]
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


def explore(
    fn: Any, params: Any, args: Any, kwargs: Any, *, kernels: bool, who: str
) -> tuple[Explaining, dict[str, str]]:
    """Walks through the program of ``fn(params, *args, **kwargs)``.

    Args:
      fn: the function.
      params: its parameters, compressed or not, or their shapes.
      args: arrays, shapes and static values.
      kwargs: the same.
      kernels: whether any may run.
      who: the public function, for messages.

    Returns:
      The walk, and why parameters without a use have none, by path.
    """
    frame, arrays = take_apart(params, args, kwargs)
    walk = Explaining(may_run=kernels)
    notes: dict[str, str] = {}

    def run(arrays: list[Any]) -> list[Any]:
        program = trace(fn, frame, arrays, who=who, every=True)
        notes.update({p.path: "never reaches the program" for p in program.unreached})
        out = walk.run(program.jaxpr, program.consts, program.operands)
        for x in filter(is_tracked, out):
            walk.lose(x, "it is returned")
        return [x for x in out if not is_tracked(x)]

    jax.eval_shape(run, arrays)
    used = {use.path for use in walk.uses.values() if use.position is not None}
    return walk, notes | {path: why for path, why in walk.lost.items() if path not in used}


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a parameter, or a product of values that are none.

    Args:
      path: of the parameter, ``""`` for none.
      eqn: the equation.
      operation: its primitive, and the name scope.
      output: shape of the result, ``None`` where there is none.
      times: how often it runs.
      multiply_adds: of all runs.
      where: the loop or branch it is in, where that matters for counts.
      position: which operand the parameter is, ``None`` if it meets none.
      axes: of the parameter, in words.
      parameter, input: shapes, ``None`` where there is no such operand.
      share: how much of the operand the parameter is.
      choice: what computes it, if a kernel does.
      runs: that in words.
      why: why no kernel does, for a compressed parameter.
      notes: all else there is to say.
    """

    path: str
    eqn: Any
    operation: str
    output: Any
    times: int
    multiply_adds: int
    where: tuple[str, ...]
    position: int | None = None
    axes: str = ""
    parameter: Any = None
    input: Any = None
    share: Fraction = Fraction(1)
    choice: Choice | None = None
    runs: str = ""
    why: str = ""
    notes: tuple[str, ...] = ()

    def cells(self) -> tuple[Any, ...]:
        """Returns the row of the table."""
        shapes = [None if s is None else list(s) for s in (self.parameter, self.input, self.output)]
        note = "; ".join(filter(None, (*self.where, self.why, *self.notes)))
        return (
            *(self.path, self.operation, self.axes, *shapes),
            *(self.times, self.multiply_adds, self.runs, note),
        )


@dataclasses.dataclass
class Explaining(Walk):
    """A walk that writes down what it meets.

    Args:
      uses: by the equation, and those around it, and the path.
      totals: multiply-adds by the equation, and whether it meets a parameter.
      lost: by path where a parameter went that was not followed.
      may_run: whether kernels may.
    """

    rules = ENTERING
    fuses = True
    uses: dict[Any, Use] = dataclasses.field(default_factory=dict)
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
            self._add(eqn, ("",), input=eqn.invars[0].aval.shape)
        return super().use(eqn, operands)

    def _follow(self, epilogues: Any, eqn: Any, operands: list[Any]) -> Epilogue | None:
        return super()._follow(epilogues, eqn, operands) if self.may_run else None

    def use_all(
        self, eqn: Any, operands: Sequence[Any], epilogue: Epilogue, bias: Any
    ) -> list[Any]:
        for i, x in enumerate(operands):
            for k, o in enumerate(origins_of(x)):
                self._write(eqn, operands, i, k, o, epilogue.label)
        add = epilogue.equations[0]
        if is_tracked(bias):
            i = next(i for i, v in enumerate(add.invars) if v is epilogue.bias)
            between = [bias if j == i else None for j in range(2)]
            for k, o in enumerate(origins_of(bias)):
                self._write(add, between, i, k, o)
        return super().use_all(eqn, operands, epilogue, bias)

    def _write(
        self, eqn: Any, operands: Sequence[Any], i: int, k: int, o: Any, tail: str = ""
    ) -> None:
        choice, why = None, ""
        value = operands[i].value
        if packed(value):
            choice, why = pick(eqn, operands) if self.may_run else (None, "no kernels here")
        notes = []
        product, axes, share = product_of(eqn, i), "", Fraction(1)
        if not isinstance(product, str):
            r = roles(o, product)
            if isinstance(r, Roles):
                axes, share = _axes(r, len(o.shape)), Fraction(*r.share)
            else:
                notes.append(r)
        else:
            share = Fraction(1, len(operands[i].origins))
        ruled = [e.primitive.name for e in self.around if e.primitive.name.startswith("custom_")]
        if packed(value) and ruled:
            choice, why, notes = None, f"rebuilt before a {ruled[0]}, whose rule is kept", []
        if o.rebuilt:
            notes.append(f"rebuilt whole {o.rebuilt}")
        between = len(operands) > 1 and all(map(origins_of, operands))
        unread = ruled or between or isinstance(product, str) or product.lookup
        if readers(value) and unread:
            notes.append("its input is not rounded here")
        otherwise = "rebuilt" if packed(value) or o.rebuilt else "dense"
        self._add(
            eqn,
            (o.path, i, k),
            position=i,
            axes=axes,
            parameter=eqn.invars[i].aval.shape,
            input=next((v.aval.shape for j, v in enumerate(eqn.invars) if j != i), None),
            share=share,
            choice=choice,
            runs=choice.label + tail if choice else otherwise,
            why=why,
            notes=tuple(notes),
        )

    def _add(self, eqn: Any, which: tuple[Any, ...], **known: Any) -> None:
        around = [e.primitive.name for e in self.around]
        where = ["for one iteration of a while loop"] if "while" in around else []
        where += ["in a branch"] if "cond" in around else []
        trail, costs = self.trail(eqn), multiply_adds(eqn)
        scope = scope_of(*self.around, eqn)
        self.totals[trail] = costs * self.times, "position" in known
        self.uses[trail, which] = Use(
            path=which[0],
            eqn=eqn,
            operation=eqn.primitive.name + (f" ({scope})" if scope else ""),
            output=next((v.aval.shape for v in eqn.outvars), None),
            times=self.times,
            multiply_adds=int(costs * known.get("share", 1)) * self.times,
            where=tuple(where),
            **known,
        )


def _multiplies(jaxpr: Any) -> bool:
    return any(multiply_adds(e) or any(map(_multiplies, bodies(e))) for e in jaxpr.eqns)


def _axes(r: Roles, ndim: int) -> str:
    out = set(r.axes.out or ())
    return " ".join(
        "stack" if a < r.axes.stack else "out" if a in out else "in" for a in range(ndim)
    )
