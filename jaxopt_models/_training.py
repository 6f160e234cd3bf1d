"""Training one stage after another, with a bar, checkpoints and a table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import artifact
from ._compress import compress
from ._encoded import materialize
from ._loop import loop
from ._partition import combine, matching, partition
from ._paths import flatten
from ._recipe import Rule
from ._resume import Checkpoints


@dataclasses.dataclass
class Run:
    """What all stages of one training share, and the rows of its table."""

    loss_fn: Callable[..., Any]
    batches: Callable[[int], Any]
    optimizer: Callable[[str, int], optax.GradientTransformation]
    stateful: bool
    save_every: int
    progress: bool
    checkpoints: Checkpoints
    evaluate: Callable[[Any], float] | None
    parameters: int
    recipe: list[Rule]
    rows: list[tuple] = dataclasses.field(default_factory=list)

    def stage(
        self, name: str, tree: Any, steps: int, *, offset: int, tail: Any = None, counted: Any = ()
    ) -> Any:
        """Trains ``tree`` for some steps, or goes on where a checkpoint left it."""
        if not steps:
            return tree
        tx = self.optimizer(name, steps)
        tx = optax.with_extra_args_support(tx if tail is None else optax.chain(tx, tail))
        trainable, rest = partition(tree)
        # A copy, since the steps donate their state and the tree belongs to the caller.
        state = jax.tree.map(jnp.copy, State(trainable, rest, tx.init(trainable), jnp.int32(0)))
        state = self.checkpoints.restore(name, state)
        step_fn = jax.jit(
            functools.partial(_step, self.loss_fn, tx, self.stateful), donate_argnums=0
        )
        state = loop(
            step_fn,
            state,
            lambda i: self.batches(offset + i),
            steps=steps,
            title=name,
            show=self.progress,
            save=lambda state: self.checkpoints.save(name, state),
            save_every=self.save_every,
            text=lambda loss: f"loss {float(loss):.4f}",
        )
        tree = combine(state.trainable, state.rest)
        self.record(name, steps, compress(tree, counted))
        return tree

    def record(self, name: str, steps: int, tree: Any, *, file_bytes: int | None = None) -> None:
        """Adds a row to the table of stages."""
        dense = materialize(tree)
        error = None if self.evaluate is None else float(self.evaluate(dense))
        size = file_bytes or artifact.size(tree, recipe=self.recipe)
        self.rows.append((name, steps, size, 4 * self.parameters / size, error))


class State(NamedTuple):
    """What one step hands to the next: both halves of the tree, the optimizer, the count."""

    trainable: Any
    rest: Any
    opt: Any
    step: jax.Array


def _step(loss_fn: Any, tx: Any, stateful: bool, state: State, batch: Any) -> Any:
    trainable, rest, opt, step = state

    def loss(t: Any) -> Any:
        out = loss_fn(materialize(combine(t, rest)), batch)
        return out if stateful else (out, None)

    (value, new), grads = jax.value_and_grad(loss, has_aux=True)(trainable)
    updates, opt = tx.update(grads, opt, trainable)
    trainable = optax.apply_updates(trainable, updates)
    if stateful:
        rest = take_state(combine(trainable, rest), new)
    return State(trainable, rest, opt, step + 1), value


def take_state(tree: Any, new: Any, *, fixed: str | None = None) -> Any:
    """Returns the untrained half of ``tree``, with what is no parameter taken from ``new``.

    Args:
      tree: parameters and state.
      new: the same, as a function returned them.
      fixed: paths of floating leaves that are no parameters either, as for :func:`partition`.
    """
    leaves, unflatten = flatten(tree)
    stays = matching(leaves, fixed, "fixed")
    fresh = {p.path: p.value for p in flatten(new)[0] if p.reason or p.path in stays}
    whole = unflatten([fresh.get(p.path, p.value) for p in leaves])
    return partition(whole, fixed=fixed)[1]
