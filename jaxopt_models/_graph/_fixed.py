"""What hangs on parameters and constants only: in which parameters it is linear, what it is.

Nothing is computed until :func:`evaluate` is asked; the origins of such a value are the parameters
in which it is linear together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._deferred import LAYOUT, never
from .._jaxpr import bind
from .._tracked import Deferred, Hop, Origin, Step, Tracked, is_tracked

LINEAR = {
    *("convert_element_type", "copy", "name", "reduce_precision", "pvary"),
    *("sharding_constraint", "stop_gradient"),
}


@dataclasses.dataclass(frozen=True)
class Ref:
    """The parameter of a path; ``loops`` of its leading axes were taken away by loops."""

    path: str
    loops: int = 0


def fixed(eqn: Any, operands: list[Tracked]) -> list[Tracked]:
    """Applies an equation to parameters and constants; their linear ones stay its origins."""
    origins = _linear(eqn, operands)
    values = tuple(x.value for x in operands)

    def step(i: int) -> Step:
        return Step(eqn.primitive.name, eqn.params, lambda *a: bind(eqn, a)[i])

    return [Tracked(Deferred(values, step(i)), origins) for i in range(len(eqn.outvars))]


def _linear(eqn: Any, operands: list[Tracked]) -> tuple[Origin, ...]:
    name = eqn.primitive.name
    if len(eqn.outvars) != 1:
        return ()
    after = tuple(eqn.outvars[0].aval.shape)
    pairs = [(x, tuple(v.aval.shape)) for x, v in zip(operands, eqn.invars, strict=True)]
    if name in LINEAR:
        return operands[0].origins
    if name in LAYOUT:
        found, offset = [], 0
        for i, (x, before) in enumerate(pairs):
            hop = Hop(Step.of(eqn), i, before, after, offset)
            found += [o.then(hop) for o in x.origins]
            offset += before[eqn.params["dimension"]] if name == "concatenate" else 0
        return () if name == "pad" and not is_zero(operands[1]) else tuple(found)
    if name == "gather":
        return _rows(eqn, operands, after)
    if name == "neg":
        return _through(eqn, operands, 0, after, None)
    if name in ("mul", "div"):
        inside = [paths_of(x) for x in operands]
        for i in range(1 if name == "div" else 2):
            free = operands[i].origins
            if free and not {o.path for o in free} & inside[1 - i]:
                return _through(eqn, operands, i, after, None)
        return ()
    if name in ("add", "sub"):
        return _sum(eqn, operands, after)
    return ()


def _sum(eqn: Any, operands: list[Tracked], after: tuple[int, ...]) -> tuple[Origin, ...]:
    if all(x.origins or is_zero(x) for x in operands):
        every = [_through(eqn, operands, i, after, None) for i in (0, 1)]
        return (*every[0], *every[1])
    i = 0 if operands[0].origins else 1
    other = operands[1 - i]
    if not operands[i].origins or paths_of(other) or np.ndim(other.value) or _moved(operands[i]):
        return ()
    if isinstance(other.value, Deferred):
        return ()
    # p + c and p - c are linear in p + c; c - p in p - c.
    c = float(other.value)
    return _through(eqn, operands, i, after, c if eqn.primitive.name == "add" else -c)


def _rows(eqn: Any, operands: list[Tracked], after: tuple[int, ...]) -> tuple[Origin, ...]:
    """Rows of a table that follow each other, or one row again and again, by constant indices."""
    table, at = operands
    dims, (rows, *width) = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    first = tuple(range(len(after) - len(width), len(after)))
    whole = (dims.start_index_map, dims.collapsed_slice_dims, dims.offset_dims) == (
        *((0,), (0,)),
        first,
    )
    if (
        not whole
        or paths_of(at)
        or dims.operand_batching_dims
        or len(eqn.params["slice_sizes"]) < 2
    ):
        return ()
    with jax.ensure_compile_time_eval():
        index = np.asarray(evaluate(at, {})).ravel()
    if not index.size or index.min() < 0 or index.max() >= rows:
        return ()
    steps, start = np.unique(np.diff(index)), int(index[0])
    end = int(index[-1]) + 1
    if len(steps) and steps.tolist() not in ([0], [1]):
        return ()
    cut = (end - start, *width)
    begin, limit = (start, *(0,) * len(width)), (end, *width)
    params = {"start_indices": begin, "limit_indices": limit, "strides": None}
    hops = [Hop(Step("slice", params, never), 0, (rows, *width), cut)]
    if end - start == index.size:
        hops.append(Hop(Step("reshape", {"new_sizes": after}, never), 0, cut, after))
    else:
        hops.append(Hop(Step("reshape", {"new_sizes": (*width,)}, never), 0, cut, (*width,)))
        spread = {"broadcast_dimensions": first}
        hops.append(Hop(Step("broadcast_in_dim", spread, never), 0, (*width,), after))
    return tuple(o.then(*hops) for o in table.origins)


def _moved(x: Tracked) -> bool:
    return any(
        h.step.name in ("mul", "div", "neg", "add", "sub") for o in x.origins for h in o.hops
    )


def _through(
    eqn: Any, operands: list[Tracked], i: int, after: tuple[int, ...], shift: float | None
) -> tuple[Origin, ...]:
    """Returns the origins of an operand after arithmetic that may shift it."""
    before = tuple(eqn.invars[i].aval.shape)
    hop = Hop(Step(eqn.primitive.name, shift, never), i, before, after)
    return tuple(o.then(hop) for o in operands[i].origins)


def shift_of(o: Origin) -> float:
    """Returns what is added to a parameter before it is used: it is linear in their sum."""
    return next((h.step.params for h in o.hops if isinstance(h.step.params, float)), 0.0)


def paths_of(x: Any) -> set[str]:
    """Returns the paths of all parameters that a value hangs on."""
    found: set[str] = set()
    seen: set[int] = set()
    todo = [x.value if is_tracked(x) else x]
    while todo:
        v = todo.pop()
        if isinstance(v, Ref):
            found.add(v.path)
        elif isinstance(v, Deferred) and id(v) not in seen:
            seen.add(id(v))
            todo += v.operands
    return found


def is_zero(x: Any) -> bool:
    """Says whether a constant is known to be zero everywhere."""
    return _everywhere(x, lambda a: not np.any(a))


def is_infinite(x: Any) -> bool:
    """Says whether a constant is known to be infinite everywhere, one way or the other."""
    return _everywhere(x, lambda a: np.issubdtype(a.dtype, np.floating) and np.all(np.isinf(a)))


def _everywhere(x: Any, test: Callable[[np.ndarray], Any]) -> bool:
    value = x.value if is_tracked(x) else x
    if isinstance(value, Ref):
        return False
    if isinstance(value, Deferred):
        steps = LINEAR | (LAYOUT - {"pad"}) | {"loop"}
        return value.step.name in steps and all(_everywhere(v, test) for v in value.operands)
    return jnp.issubdtype(jnp.result_type(value), jnp.number) and bool(test(np.asarray(value)))


def evaluate(x: Any, values: dict[str, Any]) -> Any:
    """Computes what hangs on parameters.

    Args:
      x: the tracked value.
      values: by path the parameter, or its slice in one iteration of the loops around.

    Returns:
      An array, or ``None`` if it goes through a loop in a way that cannot be followed.
    """
    known: dict[int, Any] = {}

    def of(v: Any) -> Any:
        if isinstance(v, Ref):
            return values[v.path]
        if not isinstance(v, Deferred):
            return v
        if id(v) not in known:
            if v.step.name == "loop":
                raise LookupError
            known[id(v)] = v.step.call(*map(of, v.operands))
        return known[id(v)]

    try:
        return of(x.value if is_tracked(x) else x)
    except LookupError:
        return None


def sliced(x: Tracked, shape: tuple[int, ...], depth: int) -> Tracked:
    """Returns the slice of one iteration of a loop."""
    hop = Hop(Step("loop", None, never), 0, shape, shape[1:])
    origins = [dataclasses.replace(o.then(hop), loops=(*o.loops, depth)) for o in x.origins]
    if isinstance(x.value, Ref):
        value: Any = dataclasses.replace(x.value, loops=x.value.loops + 1)
    else:
        value = Deferred((x.value,), hop.step)
    return Tracked(value, tuple(origins))
