"""Exact selection of the largest scores, ties broken by index."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from .._bits import wide_dtype


def keep_largest(
    scores: Sequence[jax.Array], count: jax.Array | int, *, keep: Sequence[jax.Array | None]
) -> list[jax.Array]:
    """Marks exactly ``count`` entries with the largest scores over all arrays together.

    The bits of a non-negative float order as integers, so the smallest kept score is found
    by bisection on its bits: one count a bit, no sort, the same under `jit`, `vmap` and
    sharding. Among equal scores the earlier array and the lower index win.

    Args:
      scores: non-negative arrays of any shapes, all of one floating type.
      count: how many to mark, at most the number of candidates; may be traced.
      keep: for each array the candidates (booleans), or ``None`` for all. Others are never
        marked while candidates remain.

    Returns:
      Booleans of the shapes of ``scores``.
    """
    size = sum(math.prod(s.shape) for s in scores)
    if size >= 1 << 31:
        raise ValueError(
            f"{size} entries are pruned together; at most 2^31 - 1 can be counted, so prune in "
            "parts (only=, or a rule for each layer)"
        )
    words = [_ordered(s, k) for s, k in zip(scores, keep, strict=True)]
    dtype = words[0].dtype
    width = 8 * dtype.itemsize

    def total(threshold: jax.Array) -> jax.Array:
        return sum(jnp.sum(w >= threshold, dtype=jnp.int32) for w in words)

    def narrow(i: jax.Array, threshold: jax.Array) -> jax.Array:
        trial = threshold | jnp.left_shift(jnp.ones((), dtype), (width - 1 - i).astype(dtype))
        return jnp.where(total(trial) >= count, trial, threshold)

    smallest = lax.fori_loop(0, width, narrow, jnp.zeros((), dtype))
    # Of the entries that equal the threshold those before one place are kept. It is found by
    # bisection as well: ranks would need all entries in one place.
    places, start = [], 0
    for w in words:
        places.append(start + _index(w.shape))
        start += w.size

    def kept(place: jax.Array) -> list[jax.Array]:
        pairs = zip(words, places, strict=True)
        return [(w > smallest) | ((w == smallest) & (i < place)) for w, i in pairs]

    def halve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = state
        middle = low + (high - low) // 2
        enough = sum(jnp.sum(k, dtype=jnp.int32) for k in kept(middle)) >= count
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    # Where all of them are kept, as nearly always, there is nothing to find.
    low = jnp.where(total(smallest) == count, size, 0).astype(jnp.int32)
    place, _ = lax.while_loop(lambda s: s[0] < s[1], halve, (low, jnp.full_like(low, size)))
    return kept(place)


def _index(shape: tuple[int, ...]) -> jax.Array:
    """Returns the place of each entry in the flattened array."""
    place, step = jnp.zeros(shape, jnp.int32), 1
    for axis in reversed(range(len(shape))):
        place += step * lax.broadcasted_iota(jnp.int32, shape, axis)
        step *= shape[axis]
    return place


def _ordered(score: jax.Array, keep: jax.Array | None) -> jax.Array:
    wide = wide_dtype(score.dtype)
    word = jnp.uint64 if wide == jnp.float64 else jnp.uint32
    # abs() clears the sign of -0.0; one is added so that zero is left for non-candidates.
    bits = lax.bitcast_convert_type(jnp.abs(score.astype(wide)), word) + jnp.ones((), word)
    return bits if keep is None else jnp.where(keep, bits, jnp.zeros((), word))
