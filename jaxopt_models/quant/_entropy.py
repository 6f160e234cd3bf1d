"""TensorRT's choice of a range: least divergence between a histogram and its rounded self."""

from __future__ import annotations

import jax
import jax.numpy as jnp

BINS = 2048
_SMOOTH = 1e-4


def entropy_range(counts: jax.Array, width: jax.Array, levels: int) -> jax.Array:
    r"""Returns the magnitude beyond which values are clipped.

    For each :math:`i` the first :math:`i` bins, the rest added to the last of them, are compared
    with what is left of them when they are merged into ``levels`` runs,
    :math:`\min_i D_{KL}(P_i \| Q_i)`.

    Args:
      counts: histogram of magnitudes, `float32` `[2048]`.
      width: width of a bin.
      levels: number of magnitudes of the grid.

    Returns:
      The range, a number.
    """
    place = jnp.arange(BINS)
    total = jnp.sum(counts)
    filled = jnp.max(jnp.where(counts > 0, place + 1, 0))

    def divergence(i: jax.Array) -> jax.Array:
        inside = place < i
        p = jnp.where(inside, counts, 0)
        run = jnp.where(inside, place * levels // i, levels)
        sums = jnp.zeros(levels + 1, counts.dtype).at[run].add(p)
        hits = jnp.zeros(levels + 1, counts.dtype).at[run].add((p > 0).astype(counts.dtype))
        q = jnp.where(p > 0, (sums / jnp.maximum(hits, 1))[run], 0)
        p = p.at[i - 1].add(total - jnp.sum(p))
        p, q = _smoothed(p, inside), _smoothed(q, inside)
        return jnp.sum(jnp.where(inside, p * jnp.log(p / q), 0))

    start = min(levels, BINS)
    steps = jnp.arange(start, BINS + 1)
    losses = jax.lax.map(divergence, steps, batch_size=8)
    # Bins beyond the last filled one add nothing but empty levels.
    losses = jnp.where(steps <= jnp.maximum(filled, start), losses, jnp.inf)
    return steps[jnp.argmin(losses)] * width


def _smoothed(p: jax.Array, inside: jax.Array) -> jax.Array:
    """Gives empty bins a little of the others, so that the divergence is finite."""
    p = p / jnp.maximum(jnp.sum(p), jnp.finfo(p.dtype).tiny)
    empty = inside & (p <= 0)
    some = inside & (p > 0)
    share = _SMOOTH * jnp.sum(empty) / jnp.maximum(jnp.sum(some), 1)
    return jnp.where(empty, _SMOOTH, jnp.where(some, jnp.maximum(p - share, _SMOOTH), 1.0))
