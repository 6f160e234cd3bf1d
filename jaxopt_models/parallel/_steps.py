"""Training of members that live apart: each one's optimizer beside its parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from .._options import number
from .._partition import combine, partition
from ..distill._core import pairs
from ._apart import Apart, place
from ._slices import Slices, no_mesh, one_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ApartState:
    """What training members apart hands from step to step.

    Args:
      trained: the half of all parameters that may be trained.
      rest: the other half: codes, masks, counters.
      opt: each member's state of its optimizer.
      step: number of steps done.
    """

    trained: Apart
    rest: Apart
    opt: Apart
    step: jax.Array

    @property
    def params(self) -> Apart:
        """The parameters of all members, apart."""
        return combine(self.trained, self.rest)

    def members(self) -> list[Any]:
        """Returns the parameters of all members, in the form they came in."""
        return self.params.members()


class Training(NamedTuple):
    """A way to train members that live apart, as two functions.

    Args:
      init: from a list of the members' parameters to the :class:`ApartState` before the first step.
      step: `(state, *batch) -> (state, metrics)`, compiled once; ``metrics["loss"]`` is the loss.
        The state that goes in is given up.
    """

    init: Callable[..., ApartState]
    step: Callable[..., tuple[ApartState, dict[str, jax.Array]]]


def training(
    slices: Slices,
    value_and_grad: Callable[..., tuple[jax.Array, Apart]],
    optimizer: Any,
    *,
    max_norm: float | None,
) -> Training:
    """Returns how members descend a loss of them all.

    Args:
      slices: where they live.
      value_and_grad: `(members, *batch) -> (value, gradients)`.
      optimizer: an optax transformation, or a list with one for each member.
      max_norm: to what norm of all members' gradients together they are scaled down.
    """
    who = slices.who
    txs = [tx for tx, _ in pairs(optimizer, None, slices.count, who)]
    if not isinstance(optimizer, list):
        txs = txs[:1] * slices.count
    if max_norm is not None and number(max_norm, f"{who}: max_norm") <= 0:
        raise ValueError(f"{who}: max_norm={max_norm}; give a number above 0, or None")

    def init(members: Any) -> ApartState:
        given = place(members, slices, name="members' parameters")
        halves = [partition(tree)[0] for tree in given.members()]
        if not jax.tree.leaves(halves):
            raise TypeError(f"{who}: no member has a floating parameter to train")
        with no_mesh():
            opt = [tx.init(half) for tx, half in zip(txs, halves, strict=True)]
        trained, rest = jax.tree.map(jnp.copy, given).split()
        return ApartState(trained, rest, place(opt, slices), slices.everywhere(jnp.int32(0)))

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state: ApartState, *batch: Any) -> Any:
        value, grads = value_and_grad(state.params, *batch)
        if max_norm is not None:
            clip = optax.clip_by_global_norm(max_norm)
            grads, _ = clip.update(grads, clip.init(grads))
        trained, opt = descend(slices, txs, grads, state.opt, state.trained, value)
        new = dataclasses.replace(state, trained=trained, opt=opt, step=state.step + 1)
        return new, {"loss": value}

    def step(state: ApartState, *batch: Any) -> tuple[ApartState, dict[str, jax.Array]]:
        check_given(state, ApartState, who)
        return advance(state, *batch)

    step.program = advance  # type: ignore[attr-defined]
    return Training(init, step)


def check_given(state: Any, kind: type, who: str) -> None:
    """Raises a `TypeError` unless it is a state, and a `ValueError` if it was given up."""
    if not isinstance(state, kind):
        raise TypeError(
            f"{who}: state is {type(state).__name__}; a step takes what its init returned"
        )
    for x in jax.tree.leaves(state):
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) and x.is_deleted():
            raise ValueError(
                f"{who}: this state was given up to an earlier step; go on with the state that "
                "step returned, or call init again"
            )


def descend(
    slices: Slices, txs: Any, grads: Apart, opt: Apart, trained: Apart, value: jax.Array
) -> tuple[Apart, Apart]:
    """Returns trained parameters and optimizers' states of all members, a step on.

    Each device runs its member's optimizer on that member's parameters as a tree, so that it sees
    their shapes, and no other's.
    """
    same = one_of(txs) and trained.arrangement.uniform and opt.arrangement.uniform

    def local(grads: Apart, opt: Apart, trained: Apart, value: jax.Array) -> Any:
        def run(i: int, *given: Any) -> Any:
            g, o, t = (a.arrangement.unpack(a.held(), i) for a in given)
            u, o = txs[i].update(g, o, t, value=value)
            t = optax.apply_updates(t, u)
            return trained.arrangement.pack(t, i, trained=True), opt.arrangement.pack(o, i)

        found = slices.branch(run, grads, opt, trained, same=same)
        return jax.tree.map(lambda x: x[None], found)

    spec = slices.apart.spec
    mapped = slices.mapped(local, (spec, spec, spec, PartitionSpec()), spec)
    new, states = mapped(grads, opt, trained, value)
    return Apart(new, trained.arrangement), Apart(states, opt.arrangement)
