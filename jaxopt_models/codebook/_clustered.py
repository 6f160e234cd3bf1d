"""The leaf of shared weights."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .._axes import Matrix
from .._bits import packed_layout, unpack_codes
from .._encoded import Encoded, leaf, static


@leaf
class Clustered(Encoded):
    """Codes into a table of shared weights.

    .. math:: w_i = c_{q_i}

    Args:
      codes: packed unsigned integers, `[*stack, *core]` or bit planes along the last axis.
      codebook: centroids `[*stack, *core[out], k]`.
      core: shape of the core tensor.
      out: axes of the core whose entries have codebooks of their own; `()` for one.
      bits: width of a code.
      dtype_name: data type of the tensor.
    """

    trainable: ClassVar[tuple[str, ...]] = ("codebook",)
    coded: ClassVar[dict[str, str]] = {"codes": "codes"}
    codes: jax.Array
    codebook: jax.Array
    core: tuple[int, ...] = static()
    out: tuple[int, ...] = static()
    bits: int = static()
    dtype_name: str = static()

    @property
    def dtype(self) -> jnp.dtype:
        """Data type of the tensor."""
        return jnp.dtype(self.dtype_name)

    @property
    def stack(self) -> tuple[int, ...]:
        """Leading axes of the codebooks."""
        return tuple(self.codebook.shape[: self.codebook.ndim - len(self.out) - 1])

    @property
    def signed(self) -> bool:
        """Codes are unsigned."""
        return False

    def integers(self) -> jax.Array:
        """Unpacks the codes: `int32`, shape of the tensor."""
        n = self.core[-1] if self.core else 1
        return unpack_codes(self.codes, n, bits=self.bits, signed=False).reshape(self.shape)

    def rebuild(self) -> jax.Array:
        """Looks up the codes of one core tensor."""
        codes = self.integers()
        if not self.out:
            return jnp.take(self.codebook, codes, axis=0).astype(self.dtype)
        m = Matrix(self.core, self.out)
        table = self.codebook.reshape(m.columns, -1).T
        return m.unview(jnp.take_along_axis(table, m.view(codes), axis=0)).astype(self.dtype)

    def check(self) -> list[str]:
        """Checks shapes, the range of the codes and the centroids."""
        wrong = []
        m = Matrix(self.core, self.out)
        if tuple(self.codebook.shape[len(self.stack) : -1]) != m.out_shape:
            wrong.append(f"codebooks have shape {self.codebook.shape}, outputs {m.out_shape}")
        shape, dtype = packed_layout(self.core, bits=self.bits, signed=self.signed)
        if self.codes.dtype != dtype or tuple(self.codes.shape) != self.stack + shape:
            have = f"{self.codes.dtype}{list(self.codes.shape)}"
            wrong.append(f"codes are {have}, not {dtype}{list(self.stack + shape)}")
        elif int(jnp.max(self.integers())) >= self.codebook.shape[-1]:
            wrong.append(f"a code is beyond the {self.codebook.shape[-1]} centroids")
        if not np.all(np.isfinite(self.codebook)):
            wrong.append("a centroid is NaN or Inf")
        return wrong
