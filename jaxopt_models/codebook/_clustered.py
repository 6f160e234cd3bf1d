"""The leaf of shared weights."""

from __future__ import annotations

from typing import ClassVar

import jax
import jax.numpy as jnp

from .._axes import Matrix
from .._coded import Coded
from .._encoded import leaf, static


@leaf
class Clustered(Coded):
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
    codes: jax.Array
    codebook: jax.Array
    core: tuple[int, ...] = static()
    out: tuple[int, ...] = static()
    bits: int = static()
    dtype_name: str = static()

    @property
    def signed(self) -> bool:
        """Codes are unsigned."""
        return False

    def rebuild(self) -> jax.Array:
        """Looks up the codes of one core tensor."""
        codes = self.integers()
        if not self.out:
            return jnp.take(self.codebook, codes, axis=0).astype(self.dtype)
        m = Matrix(self.core, self.out)
        table = self.codebook.reshape(m.columns, -1).T
        return m.unview(jnp.take_along_axis(table, m.view(codes), axis=0)).astype(self.dtype)

    def check(self) -> list[str]:
        """Checks also that no code is beyond the centroids."""
        wrong = super().check()
        if not wrong and int(jnp.max(self.integers())) >= self.codebook.shape[-1]:
            wrong.append(f"a code is beyond the {self.codebook.shape[-1]} centroids")
        return wrong
