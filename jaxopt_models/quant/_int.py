"""Integers of 2 to 8 bits."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._axes import Matrix
from .._options import flag, width
from ._format import Format
from ._grid import Grid, divide, quotient, truncate
from ._quantized import Quantized


@dataclasses.dataclass(frozen=True)
class Int(Format):
    r"""Rounds a tensor to integers on a uniform grid, a grid for each channel or group.

    Symmetric: the smallest grid around zero that covers the largest magnitude,

    .. math:: s = \max|w| / (2^{b-1} - 1), \qquad q = \mathrm{round}(w / s).

    Asymmetric: the grid covers :math:`[\min(w, 0), \max(w, 0)]`, so that zero is exact,

    .. math:: s = (\max - \min) / (2^b - 1), \quad z = \mathrm{round}(-\min / s),
              \quad q = \mathrm{round}(w / s) + z,

    with `s` cut to 16 significant bits, which makes every product exact in `float32`.
    Encoding again changes nothing, except for asymmetric grids of 16-bit tensors or with
    rounded scales, whose values no longer span the range they were cut from, and with observers
    that clip.

    Args:
      bits: width of a code, 2 to 8.
      symmetric: signed codes without zero point, or unsigned ones with.
      per: ``"channel"``, scales for each output; ``"tensor"``, one for everything.
      group: number of consecutive inputs that share a scale; ``None`` for all.
      block: number of consecutive outputs, along the last output axis, that share a scale.
      scale: how scales are kept; see :class:`Format`.
      observer: how the range of a grid is chosen; by default all of it.

    Raises:
      TypeError: for options of another type.
      ValueError: for a width outside 2 to 8, a group or block with ``per="tensor"``, or, when
        called, a group or block that does not divide the tensor.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant
      >>> w = jnp.array([[1.0, -8.0], [0.6, 4.2]])
      >>> q = quant.Int(bits=4)(w)
      >>> q.integers()
      Array([[ 7, -7],
             [ 4,  4]], dtype=int32)
      >>> q.storage_bits()        # four codes of 4 bits, two float32 scales
      80

    References:
      Jacob et al., `Quantization and Training of Neural Networks for Efficient
      Integer-Arithmetic-Only Inference <https://arxiv.org/abs/1712.05877>`_, 2018
    """

    bits: int
    _: dataclasses.KW_ONLY
    symmetric: bool = True

    def __post_init__(self) -> None:
        name = type(self).__name__
        object.__setattr__(self, "bits", width(self.bits, f"{name}: bits"))
        flag(self.symmetric, f"{name}: symmetric")
        super().__post_init__()

    @property
    def magnitudes(self) -> int:
        """Number of magnitudes of the codes."""
        return 2 ** (self.bits - 1)

    def grid(self, low: jax.Array, high: jax.Array) -> Grid:
        """Returns the grid that spans ranges; see :class:`Int`."""
        if self.symmetric:
            top = 2 ** (self.bits - 1) - 1
            return Grid(self.kept_scale(divide(jnp.maximum(-low, high), top)))
        top = 2**self.bits - 1
        half = jnp.array(0.5, low.dtype)
        # Halved first, as the range of finite numbers may be beyond them.
        span = lax.optimization_barrier((high * half, low * half))
        scale = self.kept_scale(truncate(2 * divide(span[0] - span[1], top)))
        # Halves go towards the zero point for codes and away from it for the zero point, so
        # that the lowest value has code 0 and the highest code 2^b - 1: encoding is idempotent.
        return Grid(scale, jnp.clip(-jnp.ceil(quotient(low, scale) - half), 0, top))

    def codes(self, x: jax.Array, grid: Grid) -> jax.Array:
        """Returns the nearest codes; see :class:`Int`."""
        if self.symmetric:
            top = 2 ** (self.bits - 1) - 1
            return jnp.clip(jnp.round(quotient(x, grid.scale)), -top, top).astype(jnp.int32)
        nearest = jnp.ceil(quotient(x, grid.scale) - jnp.array(0.5, x.dtype) + grid.zero)
        return jnp.clip(nearest, 0, 2**self.bits - 1).astype(jnp.int32)

    def values(self, codes: jax.Array, grid: Grid) -> jax.Array:
        """Returns what codes mean."""
        q = codes.astype(grid.scale.dtype)
        return (q if grid.zero is None else q - grid.zero) * grid.scale

    def pack(self, codes: jax.Array, grid: Grid, m: Matrix, dtype: Any) -> Quantized:
        """Returns the leaf of codes; zero points that are no integers are kept in `float16`."""
        leaf = self.leaf(codes, grid.scale, m, dtype, bits=self.bits, signed=self.symmetric)
        zero = None if grid.zero is None else self.pack_zero(grid.zero, m)
        return Quantized(**leaf, zero_point=zero)

    def pack_zero(self, zero: jax.Array, m: Matrix) -> jax.Array:
        """Returns zero points `[groups, columns]` as a leaf keeps them: `uint8`."""
        return self.place(zero, m).astype(jnp.uint8)
