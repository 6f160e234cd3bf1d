"""Runs the program of a function with parameters that are followed, compressed or not.

A function is traced to a jaxpr on the dense shapes, and the jaxpr is interpreted with a
:class:`Tracked` value wherever a value hangs on parameters only. A tracked value knows how to
rebuild itself and by which way it came from which parameter (its origins). An equation without
a tracked operand is bound as it is. One with such an operand is handled by the rule of its
primitive:

* layout, type and entrywise arithmetic of parameters are deferred: the way gets longer, nothing
  is computed (:func:`deferred`);
* ``jit`` is entered; ``scan``, ``while``, ``cond``, ``remat`` and ``shard_map`` are wrapped again
  through JAX's public functions with leaves as pytree arguments, so that loops stay loops and
  ``remat`` saves what it saves;
* everything else goes to :meth:`Walk.use`, the one place where an operation meets a parameter.
  There operands are rebuilt just in time, inside `jax.checkpoint`, so that no rebuilt weight is
  kept for the backward pass. Custom derivative rules are used like this, never entered, or their
  gradient would be that of their body.

Kinds of walk are subclasses that override :meth:`Walk.use`. One that collects values (statistics,
taps) sets ``collects`` and calls :meth:`Walk.emit`; the rules carry what was emitted out of loops
and branches.

**How a rule is added.** A rule takes the walk, the equation and its operands, and returns the
outputs of the equation. Say that ``cumsum`` of a parameter along an axis should be deferred like a
change of layout, as it hangs on the parameter alone: that needs no more than

>>> from jaxopt_models._walk import Walk, deferred
>>> class Summing(Walk):
...     rules = {**Walk.rules, "cumsum": deferred}

(statistics of such a parameter are then listed as missing, until :func:`_roles.pull` says what the
step does to axes). A rule for a primitive with a body runs ``walk.body(...)``; see ``_remat``,
the shortest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ._encoded import is_encoded
from ._jaxpr import as_function, bind, inner, is_literal, scan_counts, scope_of
from ._kernels import pick
from ._products import Product, multiply_adds, product_of
from ._roles import Roles, roles
from ._tracked import (
    ARITHMETIC,
    ENTRYWISE,
    LAYOUT,
    Hop,
    Origin,
    Step,
    Tracked,
    deferred,
    dense,
    dynamic_slice,
    entrywise,
    is_tracked,
    never,
    packed,
    readers,
    several,
    sliceable,
    stacked,
)

# ------------------------------------------------------------------ the interpreter


@dataclasses.dataclass
class Walk:
    """Interprets jaxprs.

    Args:
      depth: number of loops around. In a loop nothing is merged across iterations, and
        `jax.checkpoint` need not prevent it.
      around: the equations whose bodies are being run, outermost first.
      times: how often it is run: the product of the lengths of the scans around it.
      bounded: whether that is all, with no ``while`` around.
      side: what was emitted, by name, as :class:`Emitted`.
    """

    depth: int = 0
    around: tuple[Any, ...] = ()
    times: int = 1
    bounded: bool = True
    side: dict[str, Any] = dataclasses.field(default_factory=dict)

    collects: ClassVar[bool] = False
    kernels: ClassVar[bool] = True

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Returns the outputs of a jaxpr; an output that is an untouched leaf stays one."""
        env: dict[Any, Any] = {}

        def read(v: Any) -> Any:
            return v.val if is_literal(v) else env[v]

        # Constants hang on no data: arithmetic of a parameter with one is still deferred.
        env.update(zip(jaxpr.constvars, map(Tracked, consts), strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            if any(map(is_tracked, operands)) or self.wants(eqn):
                rule = self.rules.get(eqn.primitive.name, type(self).meet)
                found = rule(self, eqn, operands)
            else:
                found = bind(eqn, operands)
                if all(map(is_literal, eqn.invars)):  # as iota: a constant, too
                    found = [Tracked(x) for x in found]
            self.after(eqn, found)
            env.update(zip(eqn.outvars, found, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def wants(self, eqn: Any) -> bool:
        """Says whether an equation without a tracked operand has to go by its rule."""
        return False

    def lose(self, x: Any, why: str) -> None:
        """Is told that a parameter goes where it is not followed, or is rebuilt whole."""
        if readers(x.value):
            raise ValueError(
                f"{', '.join(o.path for o in x.origins)}: its input could not be rounded, as "
                f"{why}; leave quant.Input off it, or change the program (a stack that a loop "
                "slices needs jaxopt_models.Axes(stack=1))"
            )

    def after(self, eqn: Any, found: list[Any]) -> None:
        """Is told the outputs of every equation."""

    def meet(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """Applies an operation to parameters; what hangs on nothing else stays tracked."""
        found = self.use(eqn, operands)
        fixed = all(
            is_tracked(x) or is_literal(v) for x, v in zip(operands, eqn.invars, strict=True)
        )
        if fixed:
            for x in filter(_has_origin, operands):
                if not _is_norm_or_product(eqn):
                    self.lose(x, f"it goes through {eqn.primitive.name} before it is used")
        return [Tracked(x) for x in found] if fixed else found

    def use(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """An operation meets a parameter: runs a kernel, or rebuilds it just in time."""
        if eqn.effects or not any(packed(x) for x in operands if is_tracked(x)):
            return bind(eqn, [dense(x) for x in operands])
        kernel = pick(eqn, operands)[0] if self.kernels else None
        if kernel is not None:
            return kernel.on(eqn, operands, otherwise=self.rebuild)
        return self.rebuild(eqn, operands)

    def rebuild(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """Rebuilds the operands of an equation and binds it, keeping none for the gradient."""
        looping = self.depth > 0

        def rebuilt(values: list[Any]) -> list[Any]:
            ordered = values if looping else _in_order(values)
            return bind(eqn, _rebuilt(eqn, operands, ordered))

        values = [x.value if is_tracked(x) else x for x in operands]
        return jax.checkpoint(rebuilt, prevent_cse=not looping)(values)

    def body(
        self, eqn: Any, jaxpr: Any, consts: Sequence[Any], *, loop: bool = False, times: Any = 1
    ) -> Callable[..., tuple[list[Any], dict[str, Any]]]:
        """Returns a body as a function of its operands to arrays, and what it emits.

        ``times`` is how often a loop runs it, ``None`` if only the data knows.
        """

        def run(*args: Any) -> tuple[list[Any], dict[str, Any]]:
            child = dataclasses.replace(
                self,
                depth=self.depth + loop,
                around=(*self.around, eqn),
                times=self.times * (times or 1),
                bounded=self.bounded and times is not None,
                side={},
            )
            out = child.run(jaxpr, consts, args)
            for v, x in zip(jaxpr.outvars, out, strict=True):
                if _has_origin(x) and v not in jaxpr.invars:
                    self.lose(x, f"it is returned by a {eqn.primitive.name}")
            return [dense(x) for x in out], child.side

        return run

    def scope(self, eqn: Any) -> str:
        """Returns the name scope of an equation in the whole program."""
        return "/".join(s for s in map(scope_of, (*self.around, eqn)) if s)

    def emit(self, name: str, value: Any, loops: tuple[int, ...] = ()) -> None:
        """Puts a value beside the outputs of the program, merged with an earlier one."""
        new = Emitted(value, tuple(loops))
        self.side[name] = self.merge(self.side[name], new) if name in self.side else new

    def emit_all(self, side: dict[str, Any]) -> None:
        """Passes on what a body emitted."""
        for name, e in side.items():
            self.emit(name, e.value, e.loops)

    def zero(self, e: Any) -> Any:
        """Returns what a branch that is not taken emits in the shapes of ``e``."""
        raise NotImplementedError

    def merge(self, a: Any, b: Any) -> Any:
        """Merges two values emitted under one name."""
        raise NotImplementedError

    def over_mesh(self, name: str, e: Any, axes: tuple[str, ...], typed: bool) -> Any:
        """Makes one of what the devices of a mesh emitted; its partition is ``mesh_spec``.

        ``typed`` says whether JAX knows along which axes a value varies.
        """
        raise NotImplementedError

    def mesh_spec(self, axes: tuple[str, ...]) -> Any:
        """Returns the partition of what :meth:`over_mesh` returns."""
        return jax.sharding.PartitionSpec()

    rules: ClassVar[dict[str, Callable[..., list[Any]]]] = {}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Emitted:
    """A value beside the outputs.

    Args:
      value: arrays.
      loops: depths of the loops whose iterations it keeps apart, along a leading axis each.
    """

    value: Any
    loops: tuple[int, ...] = dataclasses.field(metadata={"static": True})


def _rebuilt(eqn: Any, operands: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    """Rebuilds values; an input goes through what the leaf it is multiplied with says."""
    arrays = [dense(x) for x in values]
    for i, x in enumerate(values):
        product = product_of(eqn, i) if packed(x) and readers(x) else ""
        if isinstance(product, Product) and not (product.lookup or _has_origin(operands[1 - i])):
            arrays[1 - i] = _as_read(arrays[1 - i], readers(x), operands[i].origins, product)
    return arrays


def _as_read(x: Any, leaves: list[Any], origins: Sequence[Origin], product: Product) -> Any:
    paths = ", ".join(o.path for o in origins)
    leaf, *others = leaves
    if any(_spec(leaf) != _spec(o) for o in others):
        raise ValueError(
            f"{paths} meet one input and round it in different ways; give them one quant.Input"
        )
    found = [roles(o, product) for o in origins]
    over = [n for r in found if isinstance(r, Roles) for _, names in r.gathered for n in names]
    for o, r in zip(origins, found, strict=True):
        if o.lost and isinstance(r, str):
            raise ValueError(f"{o.path}: its input could not be rounded, as {r}")
    try:
        return leaf.read(x, product.row, tuple(dict.fromkeys(over)))
    except ValueError as e:
        raise ValueError(f"{paths}: {e}") from e


def _spec(leaf: Any) -> Any:
    return type(leaf), [getattr(leaf, n) for n in type(leaf).static_names if n != "core"]


def _is_norm_or_product(eqn: Any) -> bool:
    """Says whether what comes of a parameter is a number of it, or a factor of its own."""
    return eqn.primitive.name.startswith(("reduce_", "arg")) or bool(multiply_adds(eqn))


def _has_origin(x: Any) -> bool:
    return is_tracked(x) and bool(x.origins)


# ------------------------------------------------------------------ order of rebuilding
# Nothing in an unrolled model says when a weight is rebuilt, and the scheduler of XLA on a CPU
# rebuilds all of them first. So each rebuild is made to wait for the other operand. Up to JAX
# 0.11 XLA drops barriers on a CPU; there the codes get a zero added that only the data knows.

_BARRIERS_HOLD = jax.__version_info__ >= (0, 12)


def _in_order(operands: list[Any]) -> Sequence[Any]:
    partners = [x for x in operands if not packed(x) and _can_order(x)]
    if not partners:
        return operands
    if _BARRIERS_HOLD:
        return jax.lax.optimization_barrier(tuple(operands))
    zero = _zero(jax.lax.stop_gradient(partners[0]))
    return [jax.tree.map(lambda a: _wait(a, zero), x) if packed(x) else x for x in operands]


def _can_order(x: Any) -> bool:
    # An entry of an array that is divided over Explicit mesh axes cannot be sliced out of it.
    divided = any(axis is not None for axis in jax.typeof(x).sharding.spec)
    return jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.size(x) > 0 and not divided


@jax.custom_batching.custom_vmap
def _zero(x: jax.Array) -> jax.Array:
    first = jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()).astype(jnp.float32)
    return (jax.lax.bitcast_convert_type(first, jnp.uint32) >> 31) >> 1


@_zero.def_vmap
def _zero_of_a_batch(axis_size: int, in_batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
    # One zero for the whole batch, or the weight would be rebuilt for each of its elements.
    return _zero(x), False


def _wait(part: jax.Array, zero: jax.Array) -> jax.Array:
    return part + zero.astype(part.dtype) if jnp.issubdtype(part.dtype, jnp.integer) else part


# ------------------------------------------------------------------ rules: bodies


def enter(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
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
        if isinstance(s, jax.sharding.Sharding) and not _has_origin(found[i]):
            found[i] = jax.lax.with_sharding_constraint(dense(found[i]), s)
    return found


def _custom(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    jaxpr, _ = inner(eqn.params)
    return (deferred if entrywise(jaxpr) else Walk.meet)(walk, eqn, operands)


def _remat(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    p = eqn.params
    jaxpr, consts = inner(p)
    fn = walk.body(eqn, jaxpr, consts)
    out, side = jax.checkpoint(fn, prevent_cse=p["prevent_cse"], policy=p["policy"])(*operands)
    walk.emit_all(side)
    # What a body hands back as it came is the parameter still; nnx returns all of them.
    given = {v: x for v, x in zip(jaxpr.invars, operands, strict=True) if is_tracked(x)}
    pairs = zip(jaxpr.outvars, out, strict=True)
    return [x if is_literal(v) else given.get(v, x) for v, x in pairs]


def _scan(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    p = eqn.params
    jaxpr, jaxpr_consts = inner(p)
    n, m = scan_counts(p)
    consts, xs = operands[:n], operands[n + m :]
    carry = _Carry(walk, operands[n : n + m], jaxpr.invars[n : n + m], jaxpr.outvars[:m])
    depth = walk.depth + 1
    run = walk.body(eqn, jaxpr, jaxpr_consts, loop=True, times=p["length"])
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

    def __init__(self, walk: Walk, values: Sequence[Any], before: Any, after: Any):
        self.values = values
        kept = zip(values, before, after, strict=True)
        self.still = [is_tracked(x) and a is b for x, b, a in kept]
        for x in filter(_has_origin, self.moving(values)):
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
    walk: Walk, x: Any, shape: tuple[int, ...], depth: int
) -> tuple[Any, Callable[[Any], Any]]:
    """Returns what a scan runs over, and how one slice of it becomes an operand."""
    if not is_tracked(x):
        return x, lambda part: part
    hop = Hop(Step("loop", None, never), 0, shape, shape[1:])
    value, inside = sliceable(x.value)
    whole = "before the loop" if packed(x) and not packed(value) else ""
    if whole and x.origins:
        walk.lose(x, f"it is rebuilt whole {whole}")

    def open_(part: Any) -> Tracked:
        origins = [
            dataclasses.replace(o.then(hop), loops=(*o.loops, depth), rebuilt=o.rebuilt or whole)
            for o in x.origins
        ]
        return Tracked(inside(part), tuple(origins))

    return value, open_


def _while(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    body_jaxpr, body_consts = inner(p, "body_jaxpr")
    test = walk.body(eqn, *inner(p, "cond_jaxpr"), loop=True, times=None)
    run = walk.body(eqn, body_jaxpr, body_consts, loop=True, times=None)
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


def _cond(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
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


def _shard_map(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
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
    walk: Walk, x: Any, shape: tuple[int, ...], spec: Any, mesh: Any
) -> tuple[Any, Any, Any]:
    """Returns what ``shard_map`` divides, how, and how one shard becomes an operand."""
    if not is_tracked(x):
        return x, spec, lambda part: part
    names = {a: n if isinstance(n, tuple) else (n,) for a, n in enumerate(spec) if n is not None}
    counts = {a: int(np.prod([mesh.shape[n] for n in names[a]])) for a in names}
    local = tuple(n // counts.get(a, 1) for a, n in enumerate(shape))
    origins = tuple(_of_shard(o, names, counts) for o in x.origins)
    if is_encoded(x.value) and (specs := x.value.specs(spec, local)) is not None:
        return x.value, specs, lambda part: Tracked(part.resized(local), origins)
    if packed(x):
        walk.lose(x, "it is rebuilt whole before shard_map")
        origins = tuple(dataclasses.replace(o, rebuilt="before shard_map") for o in origins)
    return dense(x), spec, lambda part: Tracked(part, origins)


def _of_shard(o: Origin, names: dict[int, Any], counts: dict[int, int]) -> Origin:
    if not names:
        return o
    if any(h.step.name != "loop" and h.step.name not in ENTRYWISE for h in o.hops):
        return dataclasses.replace(o, lost="its layout is changed before shard_map")
    loops = sum(h.step.name == "loop" for h in o.hops)
    shape = list(o.shape)
    for axis, count in counts.items():
        shape[axis + loops] //= count
    shards = tuple((axis + loops, n) for axis, n in names.items())
    return dataclasses.replace(o, shape=tuple(shape), shards=(*o.shards, *shards))


# ------------------------------------------------------------------ which rule

Walk.rules = {
    **dict.fromkeys(ENTRYWISE | ARITHMETIC | LAYOUT, deferred),
    **dict.fromkeys(("split", "unstack"), several),
    "stack": stacked,
    "dynamic_slice": dynamic_slice,
    **dict.fromkeys(("jit", "closed_call"), enter),
    "remat2": _remat,
    "custom_jvp_call": _custom,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
# Where nothing is differentiated, bodies with derivative rules of their own may be entered.
ENTERING: dict[str, Callable[..., list[Any]]] = {
    **Walk.rules,
    **dict.fromkeys(("custom_vjp_call", "custom_jvp_call"), enter),
}
