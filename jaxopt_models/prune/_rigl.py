"""Sparse training with masks that regrow."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from .._compress import fold
from .._options import portion, whole
from .._partition import check_trainable
from .._paths import flatten
from ._gradual import keep_step, select
from ._select import keep_largest


class RigLState(NamedTuple):
    """State of :func:`rigl`.

    Args:
      step: `int32`, updates so far.
      masks: booleans, a tree like the parameters; ``None`` where nothing is pruned.
      inner: state of the wrapped optimizer.
    """

    step: jax.Array
    masks: Any
    inner: Any


def rigl(
    optimizer: optax.GradientTransformation,
    *,
    sparsity: float,
    key: jax.Array,
    until: int,
    every: int = 100,
    fraction: float = 0.3,
    only: str | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Trains sparse from the first step: drops small weights, grows where gradients are large.

    Starts from random masks. Every ``every`` steps, up to step ``until``, each parameter
    drops the fraction

    .. math:: f_t = \frac{\alpha}{2} \left(1 + \cos \frac{\pi t}{T}\right)

    of its active entries, the smallest, and activates as many others with the largest
    gradient. What is grown starts at zero. It wraps the optimizer instead of following it,
    because the moments of what is grown or dropped are reset in the wrapped state.

    Args:
      optimizer: any optax optimizer, for instance ``optax.adamw(1e-3)``. Only moments with
        an entry for each weight are reset; row and column moments, as of Adafactor, stay.
      sparsity: share of entries that are zero, in each parameter, in [0, 1).
      key: random key of the first masks.
      until: step `T` after which the masks stay.
      every: steps between two updates of the masks.
      fraction: `alpha`.
      only: regular expression on whole paths; default: two or more axes.

    Returns:
      A transformation whose ``update`` needs ``params``; ``params + updates`` is exactly
      zero off the masks.

    Raises:
      ValueError: for options out of range, if nothing is selected, or without ``params``.
      TypeError: for options that are no numbers, or codes that no optimizer can train.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import prune
      >>> tx = prune.rigl(optax.adam(0.1), sparsity=0.75, key=jax.random.key(0), until=100)
      >>> params = {"w": jnp.ones((4, 4))}
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> int(jnp.sum(optax.apply_updates(params, updates)["w"] != 0))
      4

    References:
      Evci et al., `Rigging the Lottery: Making All Tickets Winners
      <https://arxiv.org/abs/1911.11134>`_, 2020
    """
    sparsity = portion(sparsity, "rigl: sparsity")
    every, until = whole(every, "rigl: every", least=1), whole(until, "rigl: until", least=0)
    if not portion(fraction, "rigl: fraction") > 0:
        raise ValueError(
            f"rigl: fraction={fraction} regrows nothing; write a number between 0 and 1"
        )
    optimizer = optax.with_extra_args_support(optimizer)

    def init(params: Any) -> RigLState:
        check_trainable(params, who="rigl")
        leaves, unflatten = flatten(params)
        masks = []
        for p, s in zip(leaves, select(leaves, only=only, recipe=None, who="rigl"), strict=True):
            if s is None:
                masks.append(None)
                continue
            score = jax.random.uniform(fold(key, p.path), p.value.shape)
            active = p.value.size - int(sparsity * p.value.size + 0.5)
            masks.extend(keep_largest([score], active, keep=[None]))
        return RigLState(jnp.zeros((), jnp.int32), unflatten(masks), optimizer.init(params))

    def update(updates: Any, state: RigLState, params: Any = None, **extra: Any):
        if params is None:
            raise ValueError("rigl: update needs params, tx.update(grads, state, params)")
        leaves, unflatten = flatten(params)
        pruned = select(leaves, only=only, recipe=None, who="rigl")
        found, unflatten_steps = flatten(updates)
        grads = [p.value for p in found]
        at = [i for i, s in enumerate(pruned) if s is not None]
        old = dict(zip(at, jax.tree.leaves(state.masks), strict=True))
        active = [jnp.where(old[i], g, 0) if i in old else g for i, g in enumerate(grads)]
        stepped, inner = optimizer.update(unflatten_steps(active), state.inner, params, **extra)
        steps = [p.value for p in flatten(stepped)[0]]

        share = fraction / 2 * (1 + jnp.cos(jnp.pi * state.step / max(until, 1)))
        due = (state.step % every == 0) & (state.step < until) & (state.step > 0)

        def move(masks: list[jax.Array]) -> list[jax.Array]:
            return [
                _move(m, optax.apply_updates(leaves[i].value, steps[i]), grads[i], share)
                for i, m in zip(at, masks, strict=True)
            ]

        moved = jax.lax.cond(due, move, lambda m: m, [old[i] for i in at])
        new = dict(zip(at, moved, strict=True))
        stays = {i: old[i] & new[i] for i in at}
        out = [
            u if i not in stays else keep_step(stays[i], u, p.value)
            for i, (u, p) in enumerate(zip(steps, leaves, strict=True))
        ]
        everywhere = unflatten(
            [
                stays[i] if i in stays else jax.tree.map(lambda _: jnp.ones((), bool), p.value)
                for i, p in enumerate(leaves)
            ]
        )
        inner = optax.tree.map_params(optimizer, _reset, inner, everywhere)
        masks = unflatten([new.get(i) for i in range(len(leaves))])
        return unflatten_steps(out), RigLState(state.step + 1, masks, inner)

    return optax.GradientTransformationExtraArgs(init, update)


def _reset(moment: jax.Array, stays: jax.Array) -> jax.Array:
    """Zeroes the moments of entries that do not stay; factored ones have none of their own."""
    if stays.ndim and stays.shape != moment.shape:
        return moment
    return jnp.where(stays, moment, jnp.zeros((), moment.dtype))


def _move(mask: jax.Array, w: jax.Array, grad: jax.Array, share: jax.Array) -> jax.Array:
    total = jnp.sum(mask, dtype=jnp.int32)
    change = jnp.minimum(jnp.floor(share * total).astype(jnp.int32), mask.size - total)
    [kept] = keep_largest([jnp.abs(w)], total - change, keep=[mask])
    [grown] = keep_largest([jnp.abs(grad)], change, keep=[~kept])
    return kept | grown
