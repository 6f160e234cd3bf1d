"""Training one stage after another, with a bar, checkpoints and a table."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from . import artifact
from ._compress import compress
from ._encoded import materialize
from ._loop import loop
from ._partition import combine, matching, partition
from ._paths import flatten, is_variables
from ._recipe import Rule
from ._resume import Checkpoints

# What a call sows is a report of that call, no state of the next one.
_SOWN = ("collection 'intermediates'", "collection 'losses'", "nnx.Intermediate")


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
      new: the same, as a function returned them; of linen's ``variables`` the collections that
        `apply(..., mutable=[...])` returns are enough.
      fixed: paths of floating leaves that are no parameters either, as for :func:`partition`.

    Raises:
      ValueError: if a leaf of the state gets no new value, or a new one has no place.
    """
    leaves, unflatten = flatten(tree)
    stays = matching(leaves, fixed, "fixed")
    alone = isinstance(new, Mapping) and "params" not in new
    if alone and is_variables(tree) and is_variables({**new, "params": None}):
        new = {**tree, **new}
    found = flatten(new)[0]
    fresh = {p.path: p.value for p in found}
    lost = [p.path for p in leaves if (p.reason or p.path in stays) and p.path not in fresh]
    known = {p.path for p in leaves}
    odd = [p.path for p in found if p.path not in known and p.reason not in _SOWN]
    if lost or odd:
        wrong = [f"no new value for {', '.join(lost)}"] if lost else []
        wrong += [f"{', '.join(odd)}, which params do not hold"] if odd else []
        raise ValueError(
            f"a stateful function returned {'; and '.join(wrong)}. Return (out, new_params) with "
            "the paths of params, such as {**params, **new}, or take the function from "
            "jaxopt_models.functional(model, mutable=True)"
        )
    whole = unflatten([fresh[p.path] if p.reason or p.path in stays else p.value for p in leaves])
    return partition(whole, fixed=fixed)[1]
