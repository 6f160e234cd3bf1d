"""The atoms of a whole program: calls, loops and branches are opened, nothing is computed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from .._call import take_apart, trace
from .._encoded import is_encoded
from .._jaxpr import CALLS, inner, interpret, scan_counts, scope_of
from .._paths import Parameter, flatten, key_name
from ._atom_rules import KEEPS, RULES, unknown
from ._atoms import CONSTANT, DATA, PARAMETER, Axis, Use, Value, fix, fresh, join, value_of


@dataclasses.dataclass
class Followed:
    """What is known of the axes of a program.

    Args:
      parameters: the leaves of the parameters, those that are no array left out.
      values: the value of each, in the same order.
      every: all values of the program.
      uses: products with parameters, and lookups in them.
    """

    parameters: list[Parameter]
    values: list[Value]
    every: list[Value]
    uses: list[Use]


def axes_of(fn: Callable[..., Any], params: Any, args: Any, *, who: str) -> Followed:
    """Traces a call on shapes, and returns what is known of its axes.

    Args:
      fn: function of `(params, ...)`.
      params: its parameters, dense or compressed; shapes are enough.
      args: its other arguments.
      who: the public function, for messages.
    """
    leaves = [p for p in flatten(params)[0] if is_encoded(p.value) or hasattr(p.value, "dtype")]
    frame, arrays = take_apart(params, args, {})
    found: list[Followed] = []

    def look(arrays: list[Any]) -> None:
        program = trace(fn, frame, arrays, who=who, every=True)
        found.append(_followed(program, leaves))

    jax.eval_shape(look, arrays)
    return found[0]


def _followed(program: Any, leaves: list[Parameter]) -> Followed:
    t = _Tracing()
    variables = program.jaxpr.invars
    start = []
    for i, v in enumerate(variables):
        axes = fresh(v.aval.shape)
        if i < len(leaves):
            value = value_of(v, axes, [Value([], PARAMETER, frozenset([leaves[i].path]))])
        else:
            value = value_of(v, axes, [Value([])])
            for atom in sum(axes, ()):
                atom.argument = True
        start.append(t.noted(value))
    consts = [t.noted(value_of(v, fresh(v.aval.shape), ())) for v in program.jaxpr.constvars]
    values = start[: len(leaves)]
    out = t.run(program.jaxpr, consts, start)
    tree = program.out.unflatten(range(len(out)))
    for keys, i in jax.tree_util.tree_flatten_with_path(tree)[0]:
        given = _same(keys, out[i], leaves, values)
        if given is None:
            fix(out[i].axes, "it is an axis of what the function returns")
            continue
        for a, b in zip(out[i].axes, given.axes, strict=True):
            join(a, b, "it is returned cut in another way")
    return Followed(leaves, values, t.every, t.uses)


def _same(
    keys: Any, out: Value, leaves: Sequence[Parameter], values: Sequence[Value]
) -> Value | None:
    """Returns the parameter of which a result is the new value, as of batch statistics."""
    path = "/" + "/".join(map(key_name, keys)).removesuffix("/value")
    for p, v in zip(leaves, values, strict=True):
        ends = path.endswith("/" + p.path)
        if ends and len(path) > len(p.path) + 1 and len(v.axes) == len(out.axes):
            return v
    return None


class _Tracing:
    """Interprets a program on :class:`Value`."""

    def __init__(self) -> None:
        self.every: list[Value] = []
        self.uses: list[Use] = []
        self.times = 1
        self._around: tuple[Any, ...] = ()

    def label(self, eqn: Any) -> str:
        """Returns the name and scope of an equation."""
        scope = scope_of(*self._around, eqn)
        return eqn.primitive.name + (f" in {scope}" if scope else "")

    def noted(self, value: Value) -> Value:
        """Keeps a value."""
        self.every.append(value)
        return value

    def run(self, jaxpr: Any, consts: Sequence[Value], args: Sequence[Value]) -> list[Value]:
        """Returns the outputs of a jaxpr."""
        return interpret(jaxpr, consts, args, self._apply, number=lambda _: Value([], CONSTANT))

    def _body(self, eqn: Any, jaxpr: Any, given: Any, operands: Sequence[Value]) -> list[Value]:
        outside, self._around = self._around, (*self._around, eqn)
        consts = [self.noted(value_of(v, fresh(v.aval.shape), ())) for v in jaxpr.constvars]
        try:
            return self.run(jaxpr, consts, operands)
        finally:
            self._around = outside

    def _apply(self, eqn: Any, operands: list[Value]) -> list[Value]:
        name = eqn.primitive.name
        if name in CALLS:
            return self._body(eqn, *inner(eqn.params), operands)
        loops = {"scan": self._scan, "while": self._while, "cond": self._cond}
        if name in loops:
            return loops[name](eqn, operands)
        axes = RULES.get(name, unknown)(self, eqn, operands)
        found = [
            self.noted(value_of(v, a, operands)) for v, a in zip(eqn.outvars, axes, strict=True)
        ]
        multiplied = name in ("dot_general", "conv_general_dilated") and found[0].kind == DATA
        for v in found:
            v.product = multiplied or (name in KEEPS and any(x.product for x in operands))
        return found

    def _scan(self, eqn: Any, operands: list[Value]) -> list[Value]:
        jaxpr, consts = inner(eqn.params)
        n, m = scan_counts(eqn.params)
        why = "the layers of a loop follow one another"
        start = self._carried(operands[n : n + m], jaxpr.invars[n : n + m], jaxpr.outvars[:m])
        parts = []
        for x in operands[n + m :]:
            fix(x.axes[:1], why)
            parts.append(self.noted(dataclasses.replace(x, axes=x.axes[1:])))
        length = eqn.params["length"]
        self.times *= length
        out = self._body(eqn, jaxpr, consts, [*operands[:n], *start, *parts])
        self.times //= length
        self._closed(start, out[:m])
        stacks = [
            self.noted(dataclasses.replace(y, axes=[*fresh((length,), why), *y.axes], kind=DATA))
            for y in out[m:]
        ]
        return [*out[:m], *stacks]

    def _while(self, eqn: Any, operands: list[Value]) -> list[Value]:
        p = eqn.params
        n, m = p["cond_nconsts"], p["body_nconsts"]
        jaxpr, consts = inner(p, "body_jaxpr")
        state = operands[n + m :]
        start = self._carried(state, jaxpr.invars[m:], jaxpr.outvars)
        self._body(eqn, *inner(p, "cond_jaxpr"), [*operands[:n], *start])
        out = self._body(eqn, jaxpr, consts, [*operands[n : n + m], *start])
        self._closed(start, out)
        return out

    def _carried(
        self, values: Sequence[Value], before: Sequence[Any], after: Sequence[Any]
    ) -> list[Value]:
        """Returns what a loop carries, inside; what it hands on unchanged is what it was."""
        return [
            x if a is b else self.noted(dataclasses.replace(x, kind=DATA, paths=frozenset()))
            for x, a, b in zip(values, before, after, strict=True)
        ]

    def _closed(self, start: Sequence[Value], out: Sequence[Value]) -> None:
        for a, b in zip(start, out, strict=True):
            for x, y in zip(a.axes, b.axes, strict=True):
                join(x, y, "a loop carries it cut in another way")

    def _cond(self, eqn: Any, operands: list[Value]) -> list[Value]:
        _, *rest = operands
        branches = [self._body(eqn, *inner({"jaxpr": b}), rest) for b in eqn.params["branches"]]
        found = []
        for first, *others in zip(*branches, strict=True):
            for other in others:
                for x, y in zip(first.axes, other.axes, strict=True):
                    join(x, y, "branches return it cut in several ways")
            kind = max(v.kind for v in (first, *others))
            found.append(self.noted(dataclasses.replace(first, kind=kind)))
        return found


def axis_of(value: Value, atoms: Sequence[Axis]) -> list[int]:
    """Returns which axes of a value these are, by what they were before anything was joined."""
    mine = {id(a) for axis in atoms for a in axis}
    return [d for d, axis in enumerate(value.axes) if any(id(a) in mine for a in axis)]
