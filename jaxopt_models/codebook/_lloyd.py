"""Lloyd's algorithm in one dimension, exact and without a distance matrix."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def midpoints(centroids: jax.Array) -> jax.Array:
    """Returns the `[k - 1]` boundaries between `[k]` sorted centroids."""
    # Halved first, as the sum may overflow; XLA would factor the half out again.
    half = lax.optimization_barrier(centroids * jnp.array(0.5, centroids.dtype))
    return half[:-1] + half[1:]


def assign(x: jax.Array, centroids: jax.Array) -> jax.Array:
    """Returns the index of the nearest centroid, `int32`; the lower one on a tie.

    Args:
      x: values of any shape.
      centroids: sorted, `[k]`.
    """
    method = "compare_all" if centroids.shape[0] <= 32 else "scan"
    codes = jnp.searchsorted(midpoints(centroids), x, side="left", method=method)
    return codes.astype(jnp.int32)


def ordered_sum(x: jax.Array) -> jax.Array:
    """Sums the last axis in a fixed order, `[..., n]` to `[...]`.

    A reduction adds in an order that XLA picks anew for each program, so that a stack, a
    mesh and a single tensor get centroids an ulp apart. Sums of four, level by level, have
    no choice; the barrier keeps the levels from being fused into one huge expression.
    """
    while (n := x.shape[-1]) > 1:
        quarter = -(-n // 4)
        x = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, 4 * quarter - n)])
        a, b, c, d = (x[..., i * quarter : (i + 1) * quarter] for i in range(4))
        x = lax.optimization_barrier((a + b) + (c + d))
    return x[..., 0]


class Sorted:
    """Sorted values in one place, and what Lloyd's algorithm asks of them.

    Args:
      x: sorted values, `[size]`, of which the first ``n`` count and the rest are `+inf`.
      n: number of values that count.
    """

    def __init__(self, x: jax.Array, n: jax.Array):
        self.x, self.n, self.dtype = x, n, x.dtype
        self.size = x.shape[0]

    def at(self, index: jax.Array) -> jax.Array:
        """Returns the values of these ranks; of a rank beyond the last anything finite."""
        return self.x[jnp.minimum(index, self.size - 1)]

    def rank(self, values: jax.Array) -> jax.Array:
        """Returns how many values are at most these."""
        return jnp.searchsorted(self.x, values, side="right").astype(self.n.dtype)

    def block_sums(self, block: int, rows: int) -> jax.Array:
        """Returns the sums of ``rows`` blocks of ranks, `[rows]`; 0 beyond the last."""
        counted = jnp.where(jnp.arange(self.size) < self.n, self.x, jnp.zeros((), self.dtype))
        blocks = jnp.zeros((rows * block,), self.dtype).at[: self.size].set(counted)
        return ordered_sum(blocks.reshape(rows, block))


@functools.partial(jax.jit, static_argnames=("k", "start", "iterations"))
def lloyd(
    x: jax.Array, n: jax.Array, key: jax.Array | None, *, k: int, start: str, iterations: int
) -> jax.Array:
    """Finds `k` centroids of sorted values by Lloyd's iteration; see :func:`iterate`."""
    return iterate(Sorted(x, n), key, k=k, start=start, iterations=iterations)


def iterate(
    values: Sorted, key: jax.Array | None, *, k: int, start: str, iterations: int
) -> jax.Array:
    """Finds `k` centroids of sorted values by Lloyd's iteration.

    On sorted data a cluster is an interval, so an iteration needs `k` binary searches and
    `k` interval sums. Those come from sums of blocks of about `sqrt(n)` entries, never as
    a difference of two long prefix sums, whose rounding would drown a cluster of a few
    outliers.

    Args:
      values: the values, wherever they are.
      key: random key for ``start="random"``.
      k: number of centroids.
      start: ``"linear"``, ``"density"`` or ``"random"``.
      iterations: most iterations; it stops as soon as no boundary moves.

    Returns:
      Sorted centroids `[k]`. If there are at most `k` distinct values, these themselves,
      which makes clustering idempotent.
    """
    n, dtype = values.n, values.dtype
    block = block_of(values.size)
    rows = values.size // block + 2  # one beyond the last boundary, so that it can be read
    sums = values.block_sums(block, rows)

    def interval_sums(edges: jax.Array) -> jax.Array:
        first, last = edges[:-1], edges[1:]
        head, tail = first // block, last // block
        index = jnp.arange(rows)[None, :]
        whole = jnp.where((head[:, None] < index) & (index < tail[:, None]), sums, 0)

        def part(row: jax.Array) -> jax.Array:
            at = row[:, None] * block + jnp.arange(block)[None, :]
            inside = (first[:, None] <= at) & (at < last[:, None])
            return ordered_sum(jnp.where(inside, values.at(at), 0))

        return ordered_sum(whole) + part(head) + jnp.where(tail > head, part(tail), 0)

    def edges_of(centroids: jax.Array) -> jax.Array:
        inner = jnp.minimum(values.rank(midpoints(centroids)), n)
        return jnp.concatenate([jnp.zeros_like(n)[None], inner, n[None]])

    def step(state):
        centroids, edges, _, i = state
        count = edges[1:] - edges[:-1]
        mean = interval_sums(edges) / jnp.maximum(count, 1).astype(dtype)
        centroids = jnp.where(count > 0, mean, centroids)
        # Rounded means of neighbours may swap by an ulp; the searches need them sorted.
        centroids = lax.cummax(centroids)
        new = edges_of(centroids)
        return centroids, new, jnp.any(new != edges), i + 1

    first = _start(values, key, k=k, start=start)
    state = first, edges_of(first), jnp.array(True), 0
    found, *_ = lax.while_loop(lambda s: s[2] & (s[3] < iterations), step, state)
    distinct, exact = _distinct(values, k)
    return jnp.where(n > 0, jnp.where(exact, distinct, found), jnp.zeros((), dtype))


def block_of(size: int) -> int:
    """Returns how many ranks are summed once for all."""
    return 1 << max(7, math.ceil(math.log2(size) / 2))


def _start(values: Sorted, key: jax.Array | None, *, k: int, start: str) -> jax.Array:
    n, dtype = values.n, values.dtype
    last = jnp.maximum(n - 1, 0)
    if start == "linear":
        # A convex combination: subtracting first would overflow at the ends of the range. Its
        # weights are NumPy's, as XLA's division by a constant depends on the program around it.
        t = np.linspace(0, 1, k)
        low, high = values.at(jnp.stack([jnp.zeros_like(last), last]))
        return lax.sort(low * jnp.array(1 - t, dtype) + high * jnp.array(t, dtype))
    if start == "density":
        share = (jnp.arange(k, dtype=jnp.float32) + 0.5) / k
        return values.at(jnp.clip((share * n.astype(jnp.float32)).astype(n.dtype), 0, last))
    return lax.sort(values.at(jax.random.randint(key, (k,), 0, jnp.maximum(n, 1))))


def _distinct(values: Sorted, k: int) -> tuple[jax.Array, jax.Array]:
    """Returns the first `k` distinct values, the last repeated, and whether that is all."""
    n = values.n

    def step(at, _):
        value = values.at(jnp.clip(at, 0, jnp.maximum(n - 1, 0)))
        return jnp.maximum(at, values.rank(value)), value

    at, found = lax.scan(step, jnp.zeros_like(n), None, length=k)
    return found, at >= n
