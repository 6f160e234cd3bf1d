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
from ._state import Scheme, State, begin, taken_over

# (network, what the others show, batch) -> loss, (loss, metrics) or (loss, metrics, memory).
Loss = Callable[[Seen, Any, Any], Any]


def split_loss(found: Any, who: str) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    """Returns value, metrics and memory of what a loss returned.

    Raises:
      TypeError: if the value is no scalar, or metrics are no scalars by name.
    """
    value, metrics, memory = found, {}, None
    if isinstance(found, tuple):
        if not 2 <= len(found) <= 3:
            raise TypeError(
                f"{who}: loss returned a tuple of {len(found)}; return the value, (value, metrics) "
                "or (value, metrics, memory)"
            )
        value, metrics, memory = (*found, None)[:3]
    if not hasattr(value, "shape") or value.shape != ():
        got = getattr(value, "shape", type(value).__name__)
        raise TypeError(f"{who}: loss returned {got}; return one number, such as a mean")
    if not isinstance(metrics, dict) or any(jnp.shape(m) for m in metrics.values()):
        raise TypeError(f"{who}: loss returned {metrics!r:.80} for metrics; give {{name: scalar}}")
    if "loss" in metrics:
        raise ValueError(f"{who}: a metric is named 'loss', which is that of the value")
    return value, {k: jnp.asarray(m) for k, m in metrics.items()}, memory


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


def descend(txs: tuple[Any, Any], grads: Any, opt: Any, trained: Any) -> tuple[Any, Any]:
    """Returns a student's trained parameters and heads, and its optimizer's state, a step on."""
    new, states = [], []
    for tx, g, o, t in zip(txs, grads, opt, trained, strict=True):
        if jax.tree.leaves(t):  # heads may be none
            u, o = tx.update(g, o, t)
            t = optax.apply_updates(t, u)
        new.append(t)
        states.append(o)
    return tuple(new), tuple(states)


def compiled(advance: Callable[..., Any], place: Place) -> Callable[..., Any]:
    """Returns the public step of ``(state without teachers, teachers, batch) -> (state, metrics)``.

    The teachers are an argument of their own, so that they are not given up with the state.
    """

    def run(moving: State, teachers: Any, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        state = dataclasses.replace(moving, teachers=teachers)
        state, metrics = advance(state, batch)
        return state.moving(), metrics

    program = jax.jit(run, donate_argnums=0)

    def step(state: State, batch: Any = None) -> tuple[State, dict[str, jax.Array]]:
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
    who: str,
    taught_by: Callable[[State], Sequence[Any]] | None = None,
    after: Callable[[State, State], dict[str, Any]] | None = None,
    prepared: Callable[[Any, Any], Any] | None = None,
) -> Scheme:
    """Returns the scheme in which every student descends its own loss on the same batch.

    Args:
      students: what is trained.
      teachers: what is not.
      losses: of each student.
      others: from the number of a student, and what all students (without derivatives) and
        teachers show, to what its loss gets as its second argument.
      optimizers: of each student, for parameters and heads.
      place: where arrays lie.
      who: the public function, for messages.
      taught_by: from the state to the parameters of the teachers; default: those it holds.
      after: from the states before and after a step to what the scheme keeps.
      prepared: from teachers' parameters and a batch to what takes the batch's place.

    Returns:
      ``(init, step)`` over lists of students.
    """

    def advance(state: State, batch: Any) -> tuple[State, dict[str, jax.Array]]:
        batch = batch if prepared is None else prepared(state.teachers, batch)
        key = jax.random.fold_in(state.key, state.step)
        masters = state.teachers if taught_by is None else taught_by(state)
        fixed = [n.look(p, batch) for n, p in zip(teachers, masters, strict=True)]

        def total(trained: Any) -> Any:
            seen = []
            for i, (n, (t, heads), rest, memory) in enumerate(
                zip(students, trained, state.rest, state.memories, strict=True)
            ):
                look = n.look(combine(t, rest), batch, learn=True)
                more = {"heads": heads, "memory": memory, "step": state.step}
                more["key"] = jax.random.fold_in(key, i)
                seen.append(dataclasses.replace(look, **more))
            still = [Seen(*jax.lax.stop_gradient((s.out, s.taps))) for s in seen]
            found = [
                split_loss(loss(s, others(i, still, fixed), batch), who)
                for i, (loss, s) in enumerate(zip(losses, seen, strict=True))
            ]
            values = [value for value, _, _ in found]
            # A loss that returns none keeps the one it has.
            memories = [
                old if new is None else new
                for (_, _, new), old in zip(found, state.memories, strict=True)
            ]
            return sum(values), (
                [{"loss": value, **metrics} for value, metrics, _ in found],
                [s.new for s in seen],
                memories,
            )

        grads, (metrics, new, memories) = jax.grad(total, has_aux=True)(state.trained)
        moved = [
            descend(*parts)
            for parts in zip(optimizers, grads, state.opt, state.trained, strict=True)
        ]
        trained = tuple(t for t, _ in moved)
        rest = [taken_over(t, r, n) for (t, _), r, n in zip(trained, state.rest, new, strict=True)]
        after_step = dataclasses.replace(
            state,
            trained=trained,
            rest=tuple(rest),
            opt=tuple(o for _, o in moved),
            memories=tuple(memories),
            step=state.step + 1,
        )
        if after is not None:
            after_step = dataclasses.replace(after_step, kept=after(state, after_step))
        return after_step, _stacked(metrics)

    def init(
        students: Any,
        teachers: Any = (),
        *,
        heads: Any = None,
        memories: Any = None,
        kept: dict[str, Any] | None = None,
        key: jax.Array | None = None,
    ) -> State:
        heads = [None] * len(students) if heads is None else heads
        memories = [None] * len(students) if memories is None else memories
        state = begin(
            students,
            teachers,
            optimizers,
            heads=heads,
            memories=memories,
            kept=kept,
            key=key,
            who=who,
        )
        return place.state(state)

    return Scheme(init, compiled(advance, place))


def _stacked(metrics: list[dict[str, jax.Array]]) -> dict[str, jax.Array]:
    if len(metrics) == 1:
        return metrics[0]
    shared = [name for name in metrics[0] if all(name in m for m in metrics)]
    found = {name: jnp.stack([m[name] for m in metrics]) for name in shared}
    for i, m in enumerate(metrics):  # what only some of the losses tell
        found |= {f"{name}/{i}": value for name, value in m.items() if name not in shared}
    return found
