"""A program cut where its parameters come in, so that each part runs once.

The program is laid out flat: calls are entered, and a loop over stacked layers is run layer by
layer. Then every equation either hangs on parameters alone, and is repeated wherever its result is
needed, or on data. A cut between two equations on data leaves behind what is alive there.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._call import Frame, take_apart, trace
from .._deferred import LAYOUT
from .._jaxpr import bodies, is_literal
from .._tracked import origins_of
from ._flat import Flat, Unit, laid_out, like

_SAME = LAYOUT | {"convert_element_type", "copy", "name", "pvary", "sharding_constraint"}


@dataclasses.dataclass(frozen=True)
class Part:
    """Equations that are run together.

    Args:
      jaxpr: what :meth:`Walk.run` reads of one.
      units: for each first operand the parameter, or an array that is none.
      consts: the constants.
      env: the variables on data that it reads, which are its other operands.
      outs: the variables on data that it returns.
      key: equal for parts that compute the same.
    """

    jaxpr: Any
    units: list[Any]
    consts: list[Any]
    env: list[Any]
    outs: list[Any]
    key: Any


class Layout:
    """A program laid out flat.

    Args:
      fn, frame, arrays: the call; see :func:`trace`.
      inputs: number of its arrays that are no parameters.
      stacked: paths of parameters whose first axis may be taken apart; those are left that
        nothing but a loop over layers uses.
      wanted: paths for which a loop is run layer by layer.
    """

    def __init__(
        self,
        fn: Any,
        frame: Frame,
        arrays: Sequence[Any],
        inputs: int,
        stacked: set[str],
        wanted: Collection[str],
    ):
        program = trace(fn, frame, arrays, who="sequential", every=True)
        n = len(program.operands) - inputs
        paths = [o[0].path if (o := origins_of(x)) else None for x in program.operands[:n]]
        avals = [v.aval for v in program.jaxpr.invars]
        apart = False
        while True:
            args = [
                [like(a, 1)] * a.shape[0] if apart and p in stacked else like(a, 0)
                for p, a in zip(paths, avals[:n], strict=True)
            ]
            flat, stacks = Flat(wanted), [p if p in stacked else None for p in paths]
            run = functools.partial(laid_out, flat, program, stacks)
            closed = jax.make_jaxpr(run)(args, [like(a, 0) for a in avals[n:]])
            stacked &= flat.layered - flat.whole
            if apart and not flat.whole:
                break
            apart = True
        self.jaxpr, self.consts = closed.jaxpr, list(closed.consts)
        self.units: list[Any] = []
        for p, x, a in zip(paths, program.operands, args, strict=False):
            if p is None:
                self.units.append(x)
            else:
                layers = range(len(a)) if isinstance(a, list) else [None]
                self.units += [Unit(p, i) for i in layers]
        self._sort()

    def _sort(self) -> None:
        """Tells equations on data from others, and says which parameters these touch."""
        jaxpr = self.jaxpr
        self.params = list(jaxpr.invars[: len(self.units)])
        self.inputs = list(jaxpr.invars[len(self.units) :])
        fixed: dict[Any, frozenset[Unit]] = dict.fromkeys(jaxpr.constvars, frozenset())
        for v, u in zip(self.params, self.units, strict=True):
            fixed[v] = frozenset([u] if isinstance(u, Unit) else [])
        root = {v: v for v in self.inputs}
        self.on_data: list[bool] = []
        self.touched: list[frozenset[Unit]] = []
        self.sources: list[Any] = []
        for i, eqn in enumerate(jaxpr.eqns):
            operands = [v for v in eqn.invars if not is_literal(v)]
            touched = frozenset().union(*(fixed[v] for v in operands if v in fixed))
            data = [root[v] for v in operands if v not in fixed]
            self.on_data.append(bool(data))
            self.touched.append(touched if data else frozenset())
            self.sources.append(("loop", i) if bodies(eqn) else frozenset(data))
            if not data:
                fixed.update(dict.fromkeys(eqn.outvars, touched))
            else:
                same = eqn.primitive.name in _SAME and len(data) == 1 and not touched
                root.update((v, data[0] if same else v) for v in eqn.outvars)
        self.fixed = fixed

    def uses(self, unit: Unit) -> list[int]:
        """Returns the equations that a parameter meets data in."""
        return [i for i, t in enumerate(self.touched) if unit in t]

    def alive(self, cut: int, end: int) -> list[Any]:
        """Returns the variables on data that a cut before one equation leaves, up to another."""
        read = {
            v
            for eqn, data in zip(self.jaxpr.eqns[cut : end + 1], self.on_data[cut:], strict=False)
            for v in eqn.invars
            if data and not is_literal(v)
        }
        made = self.inputs + [
            v
            for eqn, data in zip(self.jaxpr.eqns[:cut], self.on_data, strict=False)
            for v in eqn.outvars
            if data
        ]
        return [v for v in made if v in read]

    def part(self, start: int, stop: int, outs: Sequence[Any], ends: Iterable[int] = ()) -> Part:
        """Returns the equations on data in a range that some variables, or equations, hang on."""
        need, eqns, ends = set(outs), [], set(ends)
        for i in reversed(range(stop)):
            eqn = self.jaxpr.eqns[i]
            if self.on_data[i] and i < start:
                continue
            if i in ends or any(v in need for v in eqn.outvars):
                eqns.append(eqn)
                need.update(v for v in eqn.invars if not is_literal(v))
        eqns.reverse()
        made = {v for eqn in eqns for v in eqn.outvars}
        params = [i for i, v in enumerate(self.params) if v in need]
        consts = [i for i, v in enumerate(self.jaxpr.constvars) if v in need]
        env = [v for v in need if v not in self.fixed and v not in made]
        order = {v: i for i, v in enumerate(self.alive(start, stop))}
        env.sort(key=order.__getitem__)
        jaxpr = types.SimpleNamespace(
            constvars=[self.jaxpr.constvars[i] for i in consts],
            invars=[*(self.params[i] for i in params), *env],
            eqns=eqns,
            outvars=list(outs),
        )
        return Part(
            jaxpr,
            [self.units[i] for i in params],
            [self.consts[i] for i in consts],
            env,
            list(outs),
            _key(jaxpr),
        )


def layouts(
    fn: Any, params: Any, batches: Sequence[Any], stacked: set[str], wanted: Collection[str]
) -> list[Layout]:
    """Returns the layout of the program for each batch; equal shapes share one."""
    while True:
        known: dict[Any, Layout] = {}
        found, before = [], set(stacked)
        for batch in batches:
            frame, arrays = take_apart(params, batch, {})
            key = (frame if frame.hashable() else id(batch), tuple(map(_shape, arrays)))
            if key not in known:
                inputs = len(take_apart(None, batch, {})[1])
                known[key] = Layout(fn, frame, arrays, inputs, stacked, wanted)
            found.append(known[key])
        if stacked == before:
            return found


def _shape(x: Any) -> Any:
    return tuple(x.shape), jnp.dtype(x.dtype) if hasattr(x, "dtype") else None


def _key(jaxpr: Any) -> Any:
    """Returns a value that is equal for jaxprs which compute the same."""
    numbers: dict[Any, int] = {}

    def variable(v: Any) -> Any:
        if is_literal(v):
            return v.aval, np.asarray(v.val).tobytes()
        return numbers.setdefault(v, len(numbers)), v.aval

    def value(x: Any) -> Any:
        if hasattr(x, "eqns"):
            return program(x)
        if hasattr(x, "jaxpr"):
            return program(x.jaxpr), tuple(map(id, x.consts))
        if isinstance(x, (tuple, list)):
            return tuple(map(value, x))
        try:
            hash(x)
        except TypeError:
            return id(x)
        return x

    def program(j: Any) -> Any:
        heads = [tuple(map(variable, vs)) for vs in (j.constvars, j.invars)]
        eqns = [
            (
                e.primitive,
                tuple((k, value(v)) for k, v in sorted(e.params.items())),
                tuple(map(variable, e.invars)),
                tuple(map(variable, e.outvars)),
            )
            for e in j.eqns
        ]
        return (*heads, tuple(eqns), tuple(map(variable, j.outvars)))

    return program(jaxpr)
