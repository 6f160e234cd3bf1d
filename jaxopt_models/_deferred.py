"""Rules for what waits: layout, type and arithmetic of parameters, until a parameter is used."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._encoded import is_encoded
from ._jaxpr import bind, bodies
from ._tracked import (
    Deferred,
    Hop,
    Origin,
    Step,
    Tracked,
    dense,
    is_fixed,
    is_tracked,
    origins_of,
    packed,
    values_of,
)

# Where a value is used again and again by those that wait, they would be computed as often.
_MOST_STEPS = 48


def deferred(walk: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The rule of operations on parameters that wait until the parameter is used."""
    if not is_fixed(eqn, operands):
        return walk.meet(eqn, operands)
    [out] = eqn.outvars
    offset, after, step = 0, tuple(out.aval.shape), Step.of(eqn)
    origins: dict[Any, Origin] = {}
    for i, (x, v) in enumerate(zip(operands, eqn.invars, strict=True)):
        before = tuple(v.aval.shape)
        # Entry by entry a parameter stays where it is, and what comes twice is one.
        stays = before == after and step.name not in LAYOUT
        for o in origins_of(x):
            new = o if stays else o.then(Hop(step, i, before, after, offset))
            origins.setdefault(new.key, new)
        if step.name == "concatenate":
            offset += before[eqn.params["dimension"]]
    value = _apply(step, *operands)
    new = Tracked(value, tuple(origins.values()))
    if isinstance(value, Deferred) and value.size > _MOST_STEPS:
        walk.lose(new, "it goes through more steps than can wait until it is used")
        note = [dataclasses.replace(o, rebuilt="before it is used") for o in new.origins]
        return [Tracked(dense(value), tuple(note))]
    return [new]


def _apply(step: Step, *operands: Any) -> Any:
    values = tuple(values_of(operands))
    if not any(map(packed, values)):
        return step.call(*values)
    if len(values) == 1 and (on_parts := _on_stack(step, values[0])) is not None:
        return on_parts
    return Deferred(values, step, 1 + sum(v.size for v in values if isinstance(v, Deferred)))


def _on_stack(step: Step, leaf: Any) -> Any:
    """Applies a step to the stack axes of the parts of a leaf, where that is all it touches."""
    if not is_encoded(leaf) or not leaf.stack:
        return None
    n, core = len(leaf.stack), tuple(leaf.core)
    if step.name == "slice":
        start, limit = step.params["start_indices"], step.params["limit_indices"]
        strides = step.params["strides"] or (1,) * leaf.ndim
        if (start[n:], limit[n:], set(strides[n:])) == ((0,) * len(core), core, {1}):
            cut = tuple(map(slice, start[:n], limit[:n], strides[:n]))
            return jax.tree.map(lambda part: part[cut], leaf)
    if step.name == "reshape":
        new = tuple(step.params["new_sizes"])
        if len(new) >= len(core) and new[len(new) - len(core) :] == core:
            return jax.tree.map(
                lambda part: part.reshape(new[: len(new) - len(core)] + part.shape[n:]), leaf
            )
    return None


def entrywise(jaxpr: Any) -> bool:
    """Says whether a body works on each entry of one shape by itself."""
    shapes = {v.aval.shape for v in (*jaxpr.invars, *jaxpr.outvars)}
    if len(shapes) != 1 or len(jaxpr.outvars) != 1:
        return False

    def each(eqn: Any) -> bool:
        inside = bodies(eqn)
        if inside and eqn.primitive.name in ("jit", "custom_jvp_call"):
            return all(map(entrywise, inside))
        scalars = all(v.aval.shape == () for v in eqn.invars)
        return scalars or eqn.primitive.name in ENTRYWISE | ARITHMETIC

    return all(map(each, jaxpr.eqns))


def several(walk: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """``split`` and ``unstack`` are slices."""
    [x], p = operands, eqn.params
    shape, axis = eqn.invars[0].aval.shape, p["axis"]
    ends = np.cumsum(p["sizes"] if "sizes" in p else [1] * shape[axis]).tolist()
    found = []
    for start, end, out in zip([0, *ends], ends, eqn.outvars, strict=False):
        begin, limit = [0] * len(shape), list(shape)
        begin[axis], limit[axis] = start, end
        piece = _unary(x, "slice", shape, tuple(begin), tuple(limit))
        between = tuple(np.subtract(limit, begin).tolist())
        if between != out.aval.shape:
            piece = _unary(piece, "reshape", between, tuple(out.aval.shape))
        found.append(piece)
    return found


def _unary(x: Tracked, name: str, before: tuple[int, ...], *spec: tuple[int, ...]) -> Tracked:
    """Applies ``slice`` (begin, limit) or ``reshape`` (shape) as a step of its own."""
    if name == "slice":
        params = dict(zip(("start_indices", "limit_indices"), spec, strict=True), strides=None)
        after = tuple(np.subtract(spec[1], spec[0]).tolist())
        step = Step(name, params, lambda a: jax.lax.slice(a, *spec))
    else:
        [after] = spec
        step = Step(name, {"new_sizes": after}, lambda a: a.reshape(after))
    hop = Hop(step, 0, tuple(before), after)
    return Tracked(_apply(step, x), tuple(o.then(hop) for o in x.origins))


def stacked(walk: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """``stack`` of leaves of one kind along the first axis is a leaf with a stack axis."""
    if not all(map(is_tracked, operands)):
        return walk.meet(eqn, operands)
    axis, [out] = eqn.params["axis"], eqn.outvars
    after, origins = tuple(out.aval.shape), []
    joined = Step("concatenate", {"dimension": axis}, never)
    for i, (x, v) in enumerate(zip(operands, eqn.invars, strict=True)):
        before = tuple(v.aval.shape)
        between = (*before[:axis], 1, *before[axis:])
        widened = Hop(Step("reshape", {"new_sizes": between}, never), 0, before, between)
        hops = (widened, Hop(joined, i, between, after, i))
        origins += [o.then(*hops) for o in x.origins]
    values = values_of(operands)
    alike = all(map(is_encoded, values)) and len(set(map(jax.tree.structure, values))) == 1
    if axis == 0 and alike:
        return [Tracked(jax.tree.map(lambda *a: jnp.stack(a), *values), tuple(origins))]
    return [Tracked(_apply(Step.of(eqn), *operands), tuple(origins))]


def dynamic_slice(walk: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """One slice along the first axis, by an index that only the data knows, stays packed."""
    x, *starts = operands
    shape, sizes = eqn.invars[0].aval.shape, eqn.params["slice_sizes"]
    if not is_tracked(x) or len(starts) != len(shape) or sizes != (1, *shape[1:]):
        return walk.meet(eqn, operands)
    start = dense(starts[0])
    index = jnp.clip(start, 0, shape[0] - 1)
    if is_encoded(x.value) and x.value.stack:
        value = jax.tree.map(lambda part: jax.lax.dynamic_slice_in_dim(part, start, 1), x.value)
    elif packed(x):
        value = Deferred((x.value, *map(dense, starts)), Step.of(eqn))
    else:
        [value] = bind(eqn, [dense(v) for v in operands])
    hop = Hop(Step("index", None, never), 0, tuple(shape), tuple(sizes))
    return [
        Tracked(
            value, tuple(dataclasses.replace(o.then(hop), at=(*o.at, index)) for o in x.origins)
        )
    ]


def never(*_: Any) -> Any:
    raise AssertionError("this step stands for what a loop or an index does")


def sliceable(value: Any) -> tuple[Any, Callable[[Any], Any]]:
    """Returns the part of a value that a loop may slice, and the steps that stay inside it."""
    if not packed(value):
        return value, lambda part: part
    if is_encoded(value) and value.stack:
        return value, lambda part: part
    if isinstance(value, Deferred) and len(value.operands) == 1:
        step = _in_slice(value.step)
        whole, inside = sliceable(value.operands[0])
        if step is not None and packed(whole):
            return whole, lambda part: Deferred((inside(part),), step, value.size)
    rebuilt = dense(value)
    return rebuilt, lambda part: part


def _in_slice(step: Step) -> Step | None:
    """Returns the step that does to one slice what ``step`` does to a stack of them."""
    if step.name in ENTRYWISE - {"sharding_constraint"}:
        return step  # a constraint holds the shape of the stack
    if step.name == "transpose" and step.params["permutation"][0] == 0:
        order = tuple(a - 1 for a in step.params["permutation"][1:])
        return Step("transpose", {"permutation": order}, lambda a: jax.lax.transpose(a, order))
    return None


ENTRYWISE = {
    *("convert_element_type", "copy", "name", "reduce_precision", "pvary"),
    *("sharding_constraint", "neg", "abs", "sign", "exp", "exp2", "log", "log1p", "expm1", "tanh"),
    *("logistic", "erf", "sqrt", "rsqrt", "cbrt", "square", "integer_pow", "floor", "ceil"),
    *("round", "stop_gradient", "sin", "cos", "is_finite", "not"),
}
ARITHMETIC = {
    *("add", "sub", "mul", "div", "max", "min", "pow", "rem", "select_n", "clamp", "add_any"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and", "or", "atan2"),
}
LAYOUT = {
    *("transpose", "reshape", "squeeze", "broadcast_in_dim", "rev", "slice", "concatenate", "pad"),
}
