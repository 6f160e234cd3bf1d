"""Lloyd's algorithm on values that are divided over devices and stay there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .._divided import names_of
from ._lloyd import Sorted, block_of, iterate, ordered_sum


def comparisons(n: int) -> Iterator[list[tuple[int, int]]]:
    """Yields the stages of Batcher's odd-even merge sort of ``n`` places.

    Each is a list of pairs `(i, j)`, `i < j`, of which the smaller goes to `i`; no place is in
    two pairs of a stage.
    """
    width = 1
    while width < n:
        step = width
        while step:
            pairs = [
                (i, i + step)
                for first in range(step % width, n - step, 2 * step)
                for i in range(first, min(first + step, n - step))
                if i // (2 * width) == (i + step) // (2 * width)
            ]
            if pairs:
                yield pairs
            step //= 2
        width *= 2


def sort_divided(shard: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Sorts all entries of an array that is divided over mesh axes, inside ``shard_map``.

    Every device sorts its shard. Then pairs of devices merge: both send what they have to the
    other, one keeps the lower half and one the upper, in the stages of a sorting network, which
    sorts shards as it sorts numbers. No device ever holds more than two shards.

    Args:
      shard: what this device has, of any shape.
      names: the mesh axes.

    Returns:
      As many entries `[size]`: the whole is sorted along the devices.

    References:
      Batcher, Sorting Networks and their Applications, 1968; Knuth, The Art of Computer
      Programming 3, exercise 5.3.4-38 (shards instead of numbers)
    """
    mine, here = jnp.sort(shard.reshape(-1)), lax.axis_index(names)
    size = mine.shape[0]
    for pairs in comparisons(lax.axis_size(names)):
        other = lax.ppermute(mine, names, [p for i, j in pairs for p in ((i, j), (j, i))])
        both = jnp.sort(jnp.concatenate([mine, other]))
        lower, upper = (np.array(side) for side in zip(*pairs, strict=True))
        mine = jnp.where(jnp.any(here == lower), both[:size], mine)
        mine = jnp.where(jnp.any(here == upper), both[size:], mine)
    return mine


class SortedShards(Sorted):
    """Sorted values that are divided over mesh axes, inside ``shard_map``.

    All answers are sums over the devices of what one has and zeros, so they are those of
    :class:`Sorted` to the bit.

    Args:
      shard: the part of this device, at least a block of it.
      n: how many of all values count.
      names: the mesh axes.
    """

    def __init__(self, shard: jax.Array, n: jax.Array, names: tuple[str, ...]):
        self.x, self.n, self.dtype, self.names = shard, n, shard.dtype, names
        self.count = lax.axis_size(names)
        self.size = self.count * shard.shape[0]
        self.first = lax.axis_index(names) * shard.shape[0]

    def at(self, index: jax.Array) -> jax.Array:
        """Returns the values of these ranks."""
        local = jnp.minimum(index, self.size - 1) - self.first
        here = (local >= 0) & (local < self.x.shape[0])
        # The bits are summed: a sum of -0.0 and 0.0 would lose the sign, one with Inf be NaN.
        word = jnp.uint64 if self.dtype.itemsize == 8 else jnp.uint32
        bits = lax.bitcast_convert_type(self.x[jnp.where(here, local, 0)], word)
        found = lax.psum(jnp.where(here, bits, jnp.zeros((), word)), self.names)
        return lax.bitcast_convert_type(found, self.dtype)

    def rank(self, values: jax.Array) -> jax.Array:
        """Returns how many values are at most these."""
        found = jnp.searchsorted(self.x, values, side="right").astype(self.n.dtype)
        return lax.psum(found, self.names)

    def block_sums(self, block: int, rows: int) -> jax.Array:
        """Returns the sums of ``rows`` blocks of ranks; a block is summed where it begins."""
        size = self.x.shape[0]
        back = [(i + 1, i) for i in range(self.count - 1)]
        behind = lax.ppermute(self.x[:block], self.names, back)
        both = jnp.concatenate([self.x, behind])
        rank = self.first + jnp.arange(size + block)
        both = jnp.where(rank < self.n, both, jnp.zeros((), self.dtype))
        row = -(-self.first // block)
        begins = row * block - self.first + jnp.arange(size // block + 1) * block
        mine = begins < size
        index = jnp.where(mine, begins, 0)[:, None] + jnp.arange(block)[None, :]
        sums = jnp.where(mine, ordered_sum(both[index]), jnp.zeros((), self.dtype))
        at = jnp.where(mine, row + jnp.arange(len(begins)), rows)
        placed = jnp.zeros((rows,), self.dtype).at[at].set(sums, mode="drop")
        return lax.psum(placed, self.names)


def lloyd_divided(
    x: jax.Array, n: jax.Array, key: jax.Array | None, sharding: NamedSharding, **options: Any
) -> jax.Array | None:
    """Finds centroids of values where they lie; see :func:`iterate`.

    Args:
      x: values of any shape, divided as said; those that do not count are `+inf`.
      n: number of values that count.
      key: random key for ``start="random"``.
      sharding: how ``x`` is divided.
      **options: as for :func:`iterate`.

    Returns:
      The centroids `[k]`, bit for bit those of :func:`lloyd`; ``None`` where shards are smaller
      than a block of ranks, a few hundred values.
    """
    used = {n for entry in sharding.spec for n in names_of(entry)}
    # Devices are counted in the order of the mesh.
    names = tuple(n for n in sharding.mesh.axis_names if n in used)
    size = math.prod(sharding.shard_shape(x.shape))
    if size < block_of(x.size):
        return None

    def found(shard: jax.Array, n: jax.Array, key: Any) -> jax.Array:
        values = SortedShards(sort_divided(shard, names), n, names)
        return iterate(values, key, **options)

    # What else divides, a stack for instance, is left to XLA.
    return jax.shard_map(
        found,
        mesh=sharding.mesh,
        in_specs=(sharding.spec, PartitionSpec(), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names=set(names),
    )(x, n, key)
