"""Rules for primitives with bodies: entered, or wrapped again through JAX's public functions.

Leaves go in as pytree arguments, so that loops stay loops and ``remat`` saves what it saves. What a
walk emits inside comes out beside the outputs: stacked by a ``scan`` or summed up over it, carried
by a ``while`` loop, neutral in a branch that is not taken, made one over the devices of a mesh.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from ._deferred import deferred, entrywise, never, sliceable
from ._encoded import is_encoded
from ._jaxpr import as_function, inner, is_literal, scan_counts, scope_of
from ._latent import holds_latent
from ._tracked import Hop, Origin, Step, Tracked, dense, is_tracked, origins_of, packed
from .kernels._layout import unstacked


def enter(walk: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """A call is part of the program around it."""
    jaxpr, consts = inner(eqn.params)
    pairs = zip(operands, eqn.invars, strict=True)
    operands = [Tracked(x) if is_literal(v) else x for x, v in pairs]  # else data inside
    operands = _placed(operands, eqn.params.get("in_shardings", ()))
    outside, walk.around = walk.around, (*walk.around, eqn)
    try:
        with jax.named_scope(scope_of(eqn)):
            found = walk.run(jaxpr, consts, operands)
    finally:
        walk.around = outside
    return _placed(found, eqn.params.get("out_shardings", ()))


def _placed(values: Sequence[Any], shardings: Sequence[Any]) -> list[Any]:
    """Puts arrays where an inner ``jit`` says they are; parameters stay where they are."""
    found = list(values)
    for i, s in enumerate(shardings):
        if isinstance(s, jax.sharding.Sharding) and not origins_of(found[i]):
            found[i] = jax.lax.with_sharding_constraint(dense(found[i]), s)
    return found


def custom(walk: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """A derivative rule is kept: entry by entry it waits, else its operands are rebuilt."""
    jaxpr, _ = inner(eqn.params)
    return deferred(walk, eqn, operands) if entrywise(jaxpr) else walk.meet(eqn, operands)


def remat(walk: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """The body is checkpointed again, under the same policy."""
    p = eqn.params
    jaxpr, consts = inner(p)
    fn = walk.body(eqn, jaxpr, consts)
    out, side = jax.checkpoint(fn, prevent_cse=p["prevent_cse"], policy=p["policy"])(*operands)
    walk.emit_all(side)
    # What a body hands back as it came is the parameter still; nnx returns all of them.
    given = {v: x for v, x in zip(jaxpr.invars, operands, strict=True) if is_tracked(x)}
    pairs = zip(jaxpr.outvars, out, strict=True)
    return [x if is_literal(v) else given.get(v, x) for v, x in pairs]


def scan(walk: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """A stacked leaf is sliced packed, a layer each iteration."""
    p = eqn.params
    jaxpr, jaxpr_consts = inner(p)
    n, m = scan_counts(p)
    consts, xs = operands[:n], operands[n + m :]
    carry = _Carry(walk, operands[n : n + m], jaxpr.invars[n : n + m], jaxpr.outvars[:m])
    depth = len(walk.loops) + 1
    run = walk.body(eqn, jaxpr, jaxpr_consts)
    shapes = [tuple(v.aval.shape) for v in eqn.invars[n + m :]]
    pairs = [_slices(walk, x, shape, depth) for x, shape in zip(xs, shapes, strict=True)]
    parts, opened = [value for value, _ in pairs], [open_ for _, open_ in pairs]

    def once(moving: Any, parts: Any) -> tuple[list[Any], list[Any], dict[str, Any]]:
        slices = [open_(part) for open_, part in zip(opened, parts, strict=True)]
        out, side = run(*consts, *carry.full(moving), *slices)
        return carry.moving(out[:m]), out[m:], side

    sums: dict[str, Any] = {}
    if walk.collects:
        one = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), parts)
        once, (_, _, side) = _traced(once, carry.start, one)
        sums = {k: walk.zero(e) for k, e in side.items() if depth not in e.loops}

    def body(state: Any, parts: Any) -> tuple[Any, Any]:
        moving, sums = state
        moving, ys, side = once(moving, parts)
        sums = {k: walk.merge(old, side.pop(k)) for k, old in sums.items()}
        return (moving, sums), (ys, side)

    (moving, sums), (ys, side) = jax.lax.scan(
        body,
        (carry.start, sums),
        parts,
        length=p["length"],
        reverse=p["reverse"],
        unroll=p["unroll"],
    )
    walk.emit_all(sums)
    walk.emit_all(side)
    return [*carry.full(moving), *ys]


class _Carry:
    """What a loop carries; parameters that it hands on unchanged stay outside, as constants."""

    def __init__(self, walk: Any, values: Sequence[Any], before: Any, after: Any):
        self.values = values
        kept = zip(values, before, after, strict=True)
        self.still = [is_tracked(x) and a is b for x, b, a in kept]
        for x in filter(origins_of, self.moving(values)):
            walk.lose(x, "it is carried by a loop, which changes it")
        self.start = [dense(x) for x in self.moving(values)]

    def moving(self, values: Sequence[Any]) -> list[Any]:
        """Returns the values that change."""
        return [x for x, still in zip(values, self.still, strict=True) if not still]

    def full(self, moving: Sequence[Any]) -> list[Any]:
        """Returns all of them."""
        left = iter(moving)
        return [x if s else next(left) for x, s in zip(self.values, self.still, strict=True)]


def _slices(
    walk: Any, x: Any, shape: tuple[int, ...], depth: int
) -> tuple[Any, Callable[[Any], Any]]:
    """Returns what a scan runs over, and how one slice of it becomes an operand."""
    if not is_tracked(x):
        return x, lambda part: part
    hop = Hop(Step("loop", None, never), 0, shape, shape[1:])
    apart = unstacked(x.value) if is_encoded(x.value) and walk.kernels else None
    value, inside = apart or sliceable(x.value)
    whole = "before the loop" if packed(x) and not apart and not packed(value) else ""
    if whole and x.origins:
        walk.lose(x, f"it is rebuilt whole {whole}")

    def open_(part: Any) -> Tracked:
        origins = [
            dataclasses.replace(o.then(hop), loops=(*o.loops, depth), rebuilt=o.rebuilt or whole)
            for o in x.origins
        ]
        return Tracked(inside(part), tuple(origins))

    return value, open_


def while_loop(walk: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Parameters are constants of the loop."""
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    body_jaxpr, body_consts = inner(p, "body_jaxpr")
    test = walk.body(eqn, *inner(p, "cond_jaxpr"))
    run = walk.body(eqn, body_jaxpr, body_consts)
    for_test, for_body = operands[:n], operands[n : n + m]
    carry = _Carry(walk, operands[n + m :], body_jaxpr.invars[m:], body_jaxpr.outvars)

    def once(moving: Any) -> tuple[list[Any], dict[str, Any]]:
        # What the condition emits is collected here, where it can be carried; the last time,
        # when it ends the loop, is not.
        side = test(*for_test, *carry.full(moving))[1] if walk.collects else {}
        out, found = run(*for_body, *carry.full(moving))
        both = dataclasses.replace(walk, side=dict(side))
        both.emit_all(found)
        return carry.moving(out), both.side

    side = {}
    if walk.collects:
        once, (_, side) = _traced(once, carry.start)
    sums = {k: walk.zero(e) for k, e in side.items()}

    def body(state: Any) -> Any:
        moving, sums = state
        moving, side = once(moving)
        return moving, {k: walk.merge(old, side[k]) for k, old in sums.items()}

    def goes_on(state: Any) -> Any:
        return test(*for_test, *carry.full(state[0]))[0][0]

    moving, sums = jax.lax.while_loop(goes_on, body, (carry.start, sums))
    walk.emit_all(sums)
    return carry.full(moving)


def _traced(fn: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], Any]:
    """Traces a body once, to know what it emits before it is put into a loop or branch.

    Were it traced again there, deeply nested bodies would be traced a power of two times.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    run, treedef = as_function(closed), jax.tree.structure(shapes)
    return lambda *a: jax.tree.unflatten(treedef, run(*jax.tree.leaves(a))), shapes


def cond(walk: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Every branch emits what any of them does."""
    runs = [walk.body(eqn, *inner({"jaxpr": b})) for b in eqn.params["branches"]]
    index, *rest = operands
    union: dict[str, Any] = {}
    if walk.collects:
        pairs = [_traced(run, *rest) for run in runs]
        runs = [run for run, _ in pairs]
        union = {k: e for _, (_, side) in pairs for k, e in side.items()}

    def branch(run: Callable[..., Any]) -> Callable[..., Any]:
        def taken(*rest: Any) -> tuple[list[Any], dict[str, Any]]:
            out, side = run(*rest)
            return out, {k: side[k] if k in side else walk.zero(e) for k, e in union.items()}

        return taken

    out, side = jax.lax.switch(dense(index), [branch(run) for run in runs], *rest)
    walk.emit_all(side)
    return out


def shard_map(walk: Any, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Each device has the shard of a leaf, packed."""
    p = eqn.params
    axes = tuple(a for a in p["mesh"].axis_names if a in p["newly_manual_axes"])
    run = walk.body(eqn, *inner(p))
    shapes = [tuple(v.aval.shape) for v in eqn.invars]
    triples = [
        _shards(walk, x, shape, spec, p["mesh"])
        for x, shape, spec in zip(operands, shapes, p["in_specs"], strict=True)
    ]

    def body(*parts: Any) -> tuple[list[Any], dict[str, Any]]:
        opened = [open_(part) for (_, _, open_), part in zip(triples, parts, strict=True)]
        out, side = run(*opened)
        return out, {k: walk.over_mesh(k, e, axes, p["check_vma"]) for k, e in side.items()}

    out, side = jax.shard_map(
        body,
        mesh=p["mesh"],
        in_specs=tuple(spec for _, spec, _ in triples),
        out_specs=(list(p["out_specs"]), walk.mesh_spec(axes)),
        check_vma=p["check_vma"],
        axis_names=set(axes),
    )(*(value for value, _, _ in triples))
    walk.emit_all(side)
    return out


def _shards(
    walk: Any, x: Any, shape: tuple[int, ...], spec: Any, mesh: Any
) -> tuple[Any, Any, Any]:
    """Returns what ``shard_map`` divides, how, and how one shard becomes an operand."""
    if not is_tracked(x):
        return x, spec, lambda part: part
    names = {a: n if isinstance(n, tuple) else (n,) for a, n in enumerate(spec) if n is not None}
    counts = {a: int(np.prod([mesh.shape[n] for n in names[a]])) for a in names}
    local = tuple(n // counts.get(a, 1) for a, n in enumerate(shape))
    origins = tuple(_of_shard(o, names, counts) for o in x.origins)
    # What is in training may look at the whole tensor to show an entry.
    apart = is_encoded(x.value) and not holds_latent(x.value)
    if apart and (specs := x.value.specs(spec, local)) is not None:
        return x.value, specs, lambda part: Tracked(part.resized(local), origins)
    if packed(x):
        walk.lose(x, "it is rebuilt whole before shard_map")
        origins = tuple(dataclasses.replace(o, rebuilt="before shard_map") for o in origins)
    return dense(x), spec, lambda part: Tracked(part, origins)


def _of_shard(o: Origin, names: dict[int, Any], counts: dict[int, int]) -> Origin:
    if not names:
        return o
    if any(h.step.name != "loop" for h in o.hops):
        return dataclasses.replace(o, lost="its layout is changed before shard_map")
    loops = sum(h.step.name == "loop" for h in o.hops)
    shape = list(o.shape)
    for axis, count in counts.items():
        shape[axis + loops] //= count
    shards = tuple((axis + loops, n) for axis, n in names.items())
    return dataclasses.replace(o, shape=tuple(shape), shards=(*o.shards, *shards))
