"""Runs the program of a function with compressed parameters in place of arrays.

A function is traced to a jaxpr on the dense shapes, and the jaxpr is interpreted with a
:class:`Tracked` value wherever a value is a parameter, perhaps transposed, reshaped or cast.
An equation without such an operand is bound as it is. One with such an operand is handled by
the rule of its primitive in ``RULES``:

* a change of layout only makes the way from the leaf to the value longer;
* ``jit`` is entered, the other control flow is wrapped again through JAX's public functions
  with leaves as pytree arguments, so that loops stay loops and ``remat`` saves what it saves;
* everything else goes to :meth:`Walk.use`, the one place where an operation meets a leaf.
  There operands are rebuilt just in time, inside `jax.checkpoint`, so that no rebuilt weight is
  kept for the backward pass. Custom derivative rules are used like this, never entered.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from ._encoded import is_encoded

# ------------------------------------------------------------------ what JAX keeps private
# The only place that reads equations; JAX 0.12 made `Jaxpr` hold its constants and gave `scan`
# the counts of its operands in another form.


def _inner(params: dict[str, Any], *names: str) -> tuple[Any, Sequence[Any]]:
    jaxpr = next(params[n] for n in names if n in params)
    return (jaxpr.jaxpr, jaxpr.consts) if hasattr(jaxpr, "consts") else (jaxpr, ())


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Applies the primitive of an equation to dense operands."""
    found = eqn.primitive.get_bind_params(eqn.params)
    subfuns, params = ([], found) if isinstance(found, dict) else found
    with jax.named_scope(str(eqn.source_info.name_stack)):
        out = eqn.primitive.bind(*subfuns, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


# ------------------------------------------------------------------ values


@dataclasses.dataclass(frozen=True, eq=False)
class Move:
    """An equation that only changes the layout or the type of a parameter."""

    eqn: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Move) and (
            (self.eqn.primitive, self.eqn.params) == (other.eqn.primitive, other.eqn.params)
        )

    def __hash__(self) -> int:
        return hash(self.eqn.primitive)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tracked:
    """A value that is a parameter, and the way there from its leaf.

    Args:
      leaf: the compressed parameter.
      path: its path.
      moves: changes of layout and type since.
    """

    leaf: Any
    path: str = dataclasses.field(metadata={"static": True})
    moves: tuple[Move, ...] = dataclasses.field(default=(), metadata={"static": True})

    def dense(self) -> jax.Array:
        """Rebuilds the value."""
        value = self.leaf.materialize()
        for move in self.moves:
            [value] = bind(move.eqn, [value])
        return value

    @property
    def sliceable(self) -> bool:
        """Whether a loop over the first axis may slice the parts of the leaf."""
        return bool(self.leaf.stack) and not self.moves


def is_tracked(x: Any) -> bool:
    """Says whether ``x`` is a parameter that is not rebuilt yet."""
    return isinstance(x, Tracked)


def dense(x: Any) -> Any:
    """Rebuilds a tracked value; leaves others alone."""
    return x.dense() if is_tracked(x) else x


# ------------------------------------------------------------------ the interpreter


@dataclasses.dataclass(frozen=True)
class Walk:
    """Interprets jaxprs.

    Args:
      looping: whether this is inside a loop, where nothing is merged across iterations and
        `jax.checkpoint` need not prevent it.
    """

    looping: bool = False

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        """Returns the outputs of a jaxpr; an output that is an untouched leaf stays one."""
        env: dict[Any, Any] = {}

        def read(v: Any) -> Any:
            return v.val if isinstance(v, jex.Literal) else env[v]

        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        for eqn in jaxpr.eqns:
            operands = [read(v) for v in eqn.invars]
            if any(map(is_tracked, operands)):
                rule = RULES.get(eqn.primitive.name, Walk.use)
                found = rule(self, eqn, operands)
            else:
                found = bind(eqn, operands)
            env.update(zip(eqn.outvars, found, strict=True))
        return [read(v) for v in jaxpr.outvars]

    def use(self, eqn: Any, operands: Sequence[Any]) -> list[Any]:
        """An operation meets a parameter: rebuilds it just in time."""

        def rebuilt(*operands: Any) -> list[Any]:
            ordered = operands if self.looping else _in_order(operands)
            return bind(eqn, [dense(x) for x in ordered])

        return jax.checkpoint(rebuilt, prevent_cse=not self.looping)(*operands)

    def dense_outputs(self, jaxpr: Any, consts: Sequence[Any]) -> Callable[..., list[Any]]:
        """Returns a jaxpr as a function whose outputs are arrays."""
        return lambda *args: [dense(x) for x in self.run(jaxpr, consts, args)]


# ------------------------------------------------------------------ order of rebuilding
# Nothing in an unrolled model says when a weight is rebuilt, and the scheduler of XLA on a CPU
# rebuilds all of them first. So each rebuild is made to wait for the other operand. Up to JAX
# 0.11 XLA drops barriers on a CPU; there the codes get a zero added that only the data knows.

_BARRIERS_HOLD = jax.__version_info__ >= (0, 12)


def _in_order(operands: Sequence[Any]) -> Sequence[Any]:
    partners = [
        x
        for x in operands
        if not is_tracked(x) and jnp.issubdtype(jnp.result_type(x), jnp.floating) and jnp.size(x)
    ]
    if not partners:
        return operands
    if _BARRIERS_HOLD:
        return jax.lax.optimization_barrier(tuple(operands))
    zero = _zero(jax.lax.stop_gradient(partners[0]))
    return [_plus(x, zero) if is_tracked(x) else x for x in operands]


@jax.custom_batching.custom_vmap
def _zero(x: jax.Array) -> jax.Array:
    first = jax.lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()).astype(jnp.float32)
    return (jax.lax.bitcast_convert_type(first, jnp.uint32) >> 31) >> 1


@_zero.def_vmap
def _zero_of_a_batch(axis_size: int, in_batched: Any, x: jax.Array) -> tuple[jax.Array, bool]:
    # One zero for the whole batch, or the weight would be rebuilt for each of its elements.
    return _zero(x), False


def _plus(value: Tracked, zero: jax.Array) -> Tracked:
    def wait(part: Any) -> Any:
        return part + zero.astype(part.dtype) if jnp.issubdtype(part.dtype, jnp.integer) else part

    return dataclasses.replace(value, leaf=jax.tree.map(wait, value.leaf))


# ------------------------------------------------------------------ rules


def _move(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    [value] = operands
    return [dataclasses.replace(value, moves=(*value.moves, Move(eqn)))]


def _enter(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    jaxpr, consts = _inner(eqn.params, "jaxpr", "call_jaxpr")
    with jax.named_scope(str(eqn.source_info.name_stack)):
        return walk.run(jaxpr, consts, operands)


def _remat(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    fn = walk.dense_outputs(*_inner(eqn.params, "jaxpr"))
    p = eqn.params
    return jax.checkpoint(fn, prevent_cse=p["prevent_cse"], policy=p["policy"])(*operands)


def _scan(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    p = eqn.params
    jaxpr, jaxpr_consts = _inner(p, "jaxpr")
    n, m = _scan_counts(p)
    consts, carry, xs = operands[:n], operands[n : n + m], operands[n + m :]
    run = Walk(looping=True).dense_outputs(jaxpr, jaxpr_consts)

    def body(carry: list[Any], xs: list[Any]) -> tuple[list[Any], list[Any]]:
        out = run(*consts, *carry, *xs)
        return out[:m], out[m:]

    carry = [dense(x) for x in carry]
    xs = [x if is_tracked(x) and x.sliceable else dense(x) for x in xs]
    carry, ys = jax.lax.scan(
        body, carry, xs, length=p["length"], reverse=p["reverse"], unroll=p["unroll"]
    )
    return [*carry, *ys]


def _while(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    p = eqn.params
    n, m = p["cond_nconsts"], p["body_nconsts"]
    inside = Walk(looping=True)
    test = inside.dense_outputs(*_inner(p, "cond_jaxpr"))
    body = inside.dense_outputs(*_inner(p, "body_jaxpr"))
    for_test, for_body = operands[:n], operands[n : n + m]
    return jax.lax.while_loop(
        lambda carry: test(*for_test, *carry)[0],
        lambda carry: body(*for_body, *carry),
        [dense(x) for x in operands[n + m :]],
    )


def _cond(walk: Walk, eqn: Any, operands: Sequence[Any]) -> list[Any]:
    branches = [walk.dense_outputs(*_inner({"jaxpr": b}, "jaxpr")) for b in eqn.params["branches"]]
    index, *rest = operands
    return jax.lax.switch(dense(index), branches, *rest)


MOVES = (
    *("transpose", "reshape", "convert_element_type", "squeeze", "broadcast_in_dim", "copy"),
    *("copy_p", "name", "reduce_precision", "pvary", "sharding_constraint", "rev"),
)
RULES: dict[str, Callable[[Walk, Any, Sequence[Any]], list[Any]]] = {
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(("jit", "pjit", "closed_call", "core_call"), _enter),
    **dict.fromkeys(("remat2", "remat", "checkpoint"), _remat),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def track(path: str, value: Any) -> Any:
    """Starts to follow a compressed parameter; arrays are left alone."""
    return Tracked(value, path) if is_encoded(value) else value
