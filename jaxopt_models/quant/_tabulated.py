"""The leaf of codes whose values stand in a table that is part of the format."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .._encoded import leaf, static
from ._grouped import Grouped
from ._tables import table_of


@leaf
class Tabulated(Grouped):
    r"""Codes into a fixed table of values, with a scale for each run.

    .. math:: w = s \, t_q

    The table is part of the format and not stored with the numbers: the values of an 8-, 6- or
    4-bit float, the quantiles of NF4, plus and minus one, or what a user gives.

    Args:
      codes: packed unsigned integers, `[*stack, *core]` or bit planes along the last axis.
      scale: floating `[*stack, *core[out], groups]`, or a leaf of that shape.
      core: shape of the core tensor.
      out: axes of the core whose entries have scales of their own.
      bits: width of a code.
      table: name of a number type (``"float8_e4m3fn"``), or the values themselves.
      dtype_name: data type of the tensor.
      block: number of neighbours along the last output axis that share a scale.
    """

    trainable: ClassVar[tuple[str, ...]] = ("scale",)
    codes: jax.Array
    scale: Any
    core: tuple[int, ...] = static()
    out: tuple[int, ...] = static()
    bits: int = static()
    table: str | tuple[float, ...] = static()
    dtype_name: str = static()
    block: int = static(default=1)

    @property
    def signed(self) -> bool:
        """Codes are unsigned."""
        return False

    def rebuild(self) -> jax.Array:
        """Looks up the codes of one core tensor and multiplies by the scales."""
        scale = self.scales()
        return (self._values(scale.dtype) * self.spread(scale)).astype(self.dtype)

    def _values(self, dtype: Any) -> jax.Array:
        if self.bits < 8 or isinstance(self.table, tuple):
            return jnp.asarray(table_of(self.table).values, dtype)[self.integers()]
        # The same numbers; a lookup among 256 is no part of a product on a TPU, a cast is.
        codes = self.codes.reshape(self.core)
        found = jax.lax.bitcast_convert_type(codes, jnp.dtype(self.table)).astype(dtype)
        return jnp.where(jnp.isfinite(found), found, jnp.zeros((), dtype))

    def check(self) -> list[str]:
        """Checks also that no code is beyond the table."""
        wrong = super().check()
        n = len(table_of(self.table).values)
        if not wrong and self.size and int(jnp.max(self.integers())) >= n:
            wrong.append(f"a code is beyond the {n} values of the table")
        return wrong
