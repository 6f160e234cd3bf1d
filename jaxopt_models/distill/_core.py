"""One compiled step for any number of networks that are trained side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._partition import combine
from ._network import Network, Seen
from ._place import Place
from ._state import State, begin, check_state, strong, taken_over

# (network, what the others show, batch) -> loss, (loss, metrics) or (loss, metrics, memory).
Loss = Callable[[Seen, Any, Any], Any]
# What metrics cannot be named: columns of the history, and the value itself.
RESERVED = ("loss", "step", "score")


def check_loss(loss: Any, who: str, name: str = "loss") -> None:
    """Raises a `TypeError` unless a loss can be called."""
    if not callable(loss):
        raise TypeError(
            f"{who}: {name} is {type(loss).__name__}; give a function (student, teacher, batch) "
            "-> value, such as distill.classification()"
        )


def split_loss(
    found: Any, who: str, memory: Any = None, *, reserved: Sequence[str] = RESERVED
) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Returns value, metrics and new memory of what a loss returned.

    Args:
      found: what it returned.
      who: the public function, for messages.
      memory: what the loss kept before; it stays if none is returned.
      reserved: what metrics cannot be named.

    Raises:
      TypeError: if the value is no floating scalar, metrics are no scalars by name, or the memory
        has another structure.
      ValueError: for a reserved name.
    """
    value, metrics, new = found, {}, None
    if isinstance(found, tuple):
        if not 2 <= len(found) <= 3:
            raise TypeError(
                f"{who}: loss returned a tuple of {len(found)}; return the value, (value, metrics) "
                "or (value, metrics, memory)"
            )
        value, metrics, new = (*found, None)[:3]
    value = one_number(value, who)
    if not isinstance(metrics, dict) or not all(map(_is_metric, metrics.values())):
        raise TypeError(f"{who}: loss returned {metrics!r:.80} for metrics; give {{name: scalar}}")
    metrics = {name: _metric(x) for name, x in metrics.items()}
    if taken := [name for name in metrics if name in reserved]:
        raise ValueError(
            f"{who}: a metric is named {taken[0]!r}; {', '.join(reserved)} are taken, rename it"
        )
    if new is None:
        return value, metrics, memory
    shapes = [jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), m) for m in (memory, new)]
    if shapes[0] != shapes[1]:
        raise TypeError(
            f"{who}: the loss returned memory {shapes[1]!r:.200}, and got {shapes[0]!r:.200}; pass "
            "init(memory=) what it begins with, of the same structure, shapes and dtypes"
        )
    return value, metrics, jax.tree.map(strong, new)


def one_number(value: Any, who: str) -> jax.Array:
    """Returns the value of a loss, or raises a `TypeError` if it is no floating scalar."""
    if _is_number(value) and jnp.issubdtype(value.dtype, jnp.floating):
        return value
    got = getattr(value, "aval", type(value).__name__)
    raise TypeError(
        f"{who}: loss returned {got}; return one floating number that JAX computed, such as a mean"
    )


def _is_number(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.shape(x) == () and jnp.issubdtype(x.dtype, jnp.number)


def _is_metric(x: Any) -> bool:
    if isinstance(x, (bool, int, float)) or _is_number(x):
        return True
    return hasattr(x, "dtype") and jnp.shape(x) == () and jnp.issubdtype(x.dtype, jnp.bool_)


def _metric(x: Any) -> jax.Array:
    x = strong(x)
    # Means are taken of them.
    return x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.bool_) else x


def pairs(optimizer: Any, heads_optimizer: Any, count: int, who: str) -> list[tuple[Any, Any]]:
    """Returns for each student the optimizers of its parameters and of its heads.

    Raises:
      TypeError: for what is no optax transformation.
      ValueError: for a list of another length.
    """
    given = list(optimizer) if isinstance(optimizer, list) else [optimizer] * count
    if len(given) != count:
        raise ValueError(f"{who}: {len(given)} optimizers for {count} students; give one for each")
    for tx in (*given, *([] if heads_optimizer is None else [heads_optimizer])):
        if not hasattr(tx, "init") or not hasattr(tx, "update"):
            raise TypeError(
                f"{who}: optimizer is {type(tx).__name__}; give an optax transformation such as "
                "optax.adam(1e-3), or a list with one for each student"
            )
    given = [optax.with_extra_args_support(tx) for tx in given]
    other = None if heads_optimizer is None else optax.with_extra_args_support(heads_optimizer)
    return [(tx, other or tx) for tx in given]


def descend(
    txs: Sequence[Any], grads: Any, opt: Any, trained: Any, value: jax.Array
) -> tuple[Any, Any]:
    """Returns a student's trained parameters and heads, and its optimizer's state, a step on.

    Args:
      txs: the optimizers of both.
      grads: derivatives of both.
      opt: their states.
      trained: parameters and heads.
      value: the student's loss, for optimizers that look at it.
    """
    new, states = [], []
    for tx, g, o, t in zip(txs, grads, opt, trained, strict=True):
        if jax.tree.leaves(t):  # heads may be none
            u, o = tx.update(g, o, t, value=value)
            t = optax.apply_updates(t, u)
        new.append(t)
        states.append(o)
    return tuple(new), tuple(states)


def compiled(advance: Callable[..., Any], place: Place) -> Callable[..., Any]:
    """Returns the public step of ``(state, batch) -> (state, metrics)``.

    The teachers are an argument of their own, so that they are not given up with the state.
    """

    def run(moving: State, teachers: Any, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        state = dataclasses.replace(moving, teachers=teachers)
        state, metrics = advance(state, batch)
        return state.moving(), metrics

    program = jax.jit(run, donate_argnums=0)

    def step(state: State, batch: Any = None) -> tuple[State, dict[str, jax.Array]]:
        check_state(state, place.who)
        teachers = state.teachers
        moving, metrics = program(state.moving(), teachers, place.batch(batch))
        return dataclasses.replace(moving, teachers=teachers), metrics

    step.program = program  # type: ignore[attr-defined]
    return step


def side_by_side(
    students: Sequence[Network],
    teachers: Sequence[Network],
    losses: Sequence[Loss],
    others: Callable[[int, Sequence[Seen], Sequence[Seen]], Any],
    optimizers: Sequence[tuple[Any, Any]],
    *,
    place: Place,
    taught_by: Callable[[State], Sequence[Any]] | None = None,
    after: Callable[[State, State], dict[str, Any]] | None = None,
    prepared: Callable[[Any, Any], Any] | None = None,
    reserved: Sequence[str] = RESERVED,
) -> tuple[Callable[..., State], Callable[..., tuple[State, dict[str, jax.Array]]]]:
    """Returns how every student descends its own loss on the same batch.

    Args:
      students: what is trained.
      teachers: what is not.
      losses: of each student.
      others: from the number of a student, and what all students (without derivatives) and
        teachers show, to what its loss gets as its second argument.
      optimizers: of each student, for parameters and heads.
      place: where arrays lie; it knows the public function's name.
      taught_by: from the state to the parameters of the teachers; default: those it holds.
      after: from the states before and after a step to what the scheme keeps.
      prepared: from teachers' parameters and a batch to what networks read in its place.
      reserved: what metrics cannot be named.

    Returns:
      ``init`` over lists, and ``advance(state, batch)``, not compiled yet.
    """
    who = place.who
    for loss in losses:
        check_loss(loss, who)

    def advance(state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        read = batch if prepared is None else prepared(state.teachers, batch)
        key = jax.random.fold_in(state.key, state.step)
        masters = state.teachers if taught_by is None else taught_by(state)
        fixed = [n.look(p, read) for n, p in zip(teachers, masters, strict=True)]

        def total(trained: Any) -> Any:
            seen = []
            for i, (n, (t, heads), rest, memory) in enumerate(
                zip(students, trained, state.rest, state.memories, strict=True)
            ):
                look = n.look(combine(t, rest), read, learn=True)
                more = {"heads": heads, "memory": memory, "step": state.step}
                more["key"] = jax.random.fold_in(key, i)
                seen.append(dataclasses.replace(look, **more))
            still = [Seen(*jax.lax.stop_gradient((s.out, s.taps))) for s in seen]
            found = [
                split_loss(
                    loss(s, others(i, still, fixed), batch), who, s.memory, reserved=reserved
                )
                for i, (loss, s) in enumerate(zip(losses, seen, strict=True))
            ]
            return sum(value for value, _, _ in found), (found, [s.new for s in seen])

        grads, (found, new) = jax.grad(total, has_aux=True)(state.trained)
        moved = [
            descend(*parts)
            for parts in zip(
                optimizers, grads, state.opt, state.trained, [f[0] for f in found], strict=True
            )
        ]
        trained = tuple(t for t, _ in moved)
        rest = [
            taken_over(network, t, r, n)
            for network, (t, _), r, n in zip(students, trained, state.rest, new, strict=True)
        ]
        done = dataclasses.replace(
            state,
            trained=trained,
            rest=tuple(rest),
            opt=tuple(o for _, o in moved),
            memories=tuple(memory for _, _, memory in found),
            step=state.step + 1,
        )
        if after is not None:
            done = dataclasses.replace(done, kept=after(state, done))
        return done, stacked([{"loss": value, **metrics} for value, metrics, _ in found])

    def init(
        students_params: Sequence[Any],
        teachers_params: Sequence[Any] = (),
        *,
        heads: Sequence[Any] | None = None,
        memories: Sequence[Any] | None = None,
        kept: dict[str, Any] | None = None,
        key: jax.Array | None = None,
    ) -> State:
        none = [None] * len(students)
        state = begin(
            students,
            students_params,
            teachers_params,
            optimizers,
            heads=none if heads is None else heads,
            memories=none if memories is None else memories,
            kept=kept,
            key=key,
            who=who,
        )
        return place.state(state)

    return init, advance


def stacked(metrics: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    """Returns the metrics of several students as arrays; of a single one as they are."""
    if len(metrics) == 1:
        return metrics[0]
    shared = [name for name in metrics[0] if all(name in m for m in metrics)]
    found = {name: jnp.stack([m[name] for m in metrics]) for name in shared}
    for i, m in enumerate(metrics):  # what only some of the losses tell
        found |= {f"{name}/{i}": value for name, value in m.items() if name not in shared}
    return found
