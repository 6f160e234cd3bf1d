"""k-means as a number format, for solvers that choose its codes."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .._axes import Matrix
from .._bits import pack_codes
from ..codebook._clustered import Clustered
from ..codebook._kmeans import KMeans
from ..codebook._lloyd import lloyd, midpoints
from ._format import Format


class Codebook(NamedTuple):
    """Sorted centroids of each column, `[1, columns, k]`, or of all, `[1, 1, k]`."""

    centroids: jax.Array


@dataclasses.dataclass(frozen=True)
class Centroids(Format):
    """The grid of :class:`jaxopt_models.codebook.KMeans`: centroids of a tensor, or of each output.

    Args:
      kmeans: how they are found.
    """

    kmeans: KMeans

    @classmethod
    def of(cls, kmeans: KMeans) -> Centroids:
        """Returns the format of an encoder."""
        return cls(kmeans, per="tensor" if kmeans.per == "leaf" else "channel")

    def fit_runs(self, x: jax.Array, weight: jax.Array | None) -> Codebook:
        """Finds the centroids of the kept entries."""
        kept = jnp.ones(x.shape, bool) if weight is None else jnp.broadcast_to(weight > 0, x.shape)
        options = {f: getattr(self.kmeans, f) for f in ("start", "iterations")}

        def one(x: jax.Array, kept: jax.Array) -> jax.Array:
            x = jnp.where(x == 0, jnp.zeros((), x.dtype), x)  # sorting may put -0.0 anywhere
            n = jnp.sum(kept, dtype=jnp.int32)
            return lloyd(jnp.sort(jnp.where(kept, x, jnp.inf)), n, None, k=self.k, **options)

        return Codebook(jax.vmap(one, in_axes=-1)(x[0], kept[0])[None])

    @property
    def k(self) -> int:
        """Number of centroids."""
        return int(2**self.kmeans.bits)

    def codes(self, x: jax.Array, grid: Codebook) -> jax.Array:
        """Returns the codes of the nearest centroids, the lower one on a tie."""
        middle = jnp.moveaxis(midpoints(jnp.moveaxis(grid.centroids, -1, 0)), 0, -1)
        return jnp.sum(x[..., None] > middle, axis=-1, dtype=jnp.int32)

    def values(self, codes: jax.Array, grid: Codebook) -> jax.Array:
        """Returns what codes mean."""
        places = jnp.arange(self.k).reshape((1,) * codes.ndim + (-1,))
        return jnp.sum(jnp.where(codes[..., None] == places, grid.centroids, 0), axis=-1)

    def pack(self, codes: jax.Array, grid: Codebook, m: Matrix, dtype: Any) -> Clustered:
        """Returns the leaf of codes."""
        return Clustered(
            pack_codes(jnp.atleast_1d(m.unview(codes)), bits=self.kmeans.bits, signed=False),
            grid.centroids.reshape(*m.out_shape, -1),
            core=m.core,
            out=m.out,
            bits=self.kmeans.bits,
            dtype_name=str(jnp.dtype(dtype)),
        )
