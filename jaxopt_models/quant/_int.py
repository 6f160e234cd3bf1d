"""Integers of 2 to 8 bits."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from .._axes import Axes, Matrix, divisors
from .._bits import pack_codes, wide_dtype
from .._encoder import Encoder
from .._options import whole
from ._quantized import Quantized


@dataclasses.dataclass(frozen=True)
class Int(Encoder):
    r"""Rounds a tensor to integers on a uniform grid, a grid for each channel or group.

    Symmetric: the smallest grid around zero that covers the largest magnitude,

    .. math:: s = \max|w| / (2^{b-1} - 1), \qquad q = \mathrm{round}(w / s).

    Asymmetric: the grid covers :math:`[\min(w, 0), \max(w, 0)]`, so that zero is exact,

    .. math:: s = (\max - \min) / (2^b - 1), \quad z = \mathrm{round}(-\min / s),
              \quad q = \mathrm{round}(w / s) + z,

    with `s` cut to 16 significant bits, which makes every product exact in `float32`.
    Encoding again changes nothing, except for asymmetric grids of 16-bit tensors, whose
    rounded values no longer span the range they were cut from.

    Args:
      bits: width of a code, 2 to 8.
      group: number of consecutive inputs that share a scale; ``None`` for all.
      symmetric: signed codes without zero point, or unsigned ones with.
      per: ``"channel"``, scales for each output; ``"tensor"``, one for everything.

    Raises:
      TypeError: for options that are no whole numbers.
      ValueError: for a width outside 2 to 8, a group with ``per="tensor"``, or, when
        called, a group that does not divide the inputs.

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
    group: int | None = None
    symmetric: bool = True
    per: Literal["channel", "tensor"] = "channel"

    def __post_init__(self) -> None:
        object.__setattr__(self, "bits", whole(self.bits, "Int: bits"))
        if self.group is not None:
            object.__setattr__(self, "group", whole(self.group, "Int: group"))
        if not 2 <= self.bits <= 8:
            raise ValueError(f"Int: bits={self.bits!r} is not a width of 2 to 8")
        if self.per not in ("channel", "tensor"):
            raise ValueError(f"Int: per={self.per!r} is neither 'channel' nor 'tensor'")
        if self.group is not None and (self.group < 1 or self.per == "tensor"):
            raise ValueError(f"Int: group={self.group} needs to be positive and per='channel'")

    def encode(self, w: jax.Array, *, axes: Axes, keep: Any, stats: Any, key: Any) -> Quantized:
        """Encodes one core tensor; see :class:`Int`."""
        out = axes.out if self.per == "channel" else ()
        m = Matrix(tuple(w.shape), out)
        group = self.group or m.rows
        if m.rows % group:
            raise ValueError(
                f"group={group} does not divide the {m.rows} inputs of shape "
                f"{tuple(w.shape)} (out axes {out}); groups that do: {divisors(m.rows)}"
            )
        wide = wide_dtype(w.dtype)
        x = m.view(w.astype(wide)).reshape(m.rows // group, group, m.columns)
        codes, scale, zero = _symmetric(x, self.bits) if self.symmetric else _affine(x, self.bits)
        codes = jnp.atleast_1d(m.unview(codes.reshape(m.rows, m.columns)))
        place = (*m.out_shape, m.rows // group)
        return Quantized(
            pack_codes(codes, bits=self.bits, signed=self.symmetric),
            scale.T.reshape(place),
            None if zero is None else zero.astype(jnp.uint8).T.reshape(place),
            core=tuple(w.shape),
            out=out,
            bits=self.bits,
            dtype_name=str(w.dtype),
        )


def divide(x: jax.Array, n: int) -> jax.Array:
    """Divides by a constant as IEEE does."""
    # XLA turns a division by a constant into a product with its rounded reciprocal, which
    # is neither what NumPy gives nor idempotent; a divisor that depends on data is exact.
    return x / jnp.where(x < jnp.inf, jnp.array(n, x.dtype), jnp.ones((), x.dtype))


def positive(scale: jax.Array) -> jax.Array:
    """Returns a scale that can be divided by."""
    # An all-zero or denormal group, flushed to zero by XLA, gets the scale one and codes zero.
    return jnp.where(scale >= jnp.finfo(scale.dtype).tiny, scale, jnp.ones((), scale.dtype))


def _symmetric(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, None]:
    top = 2 ** (bits - 1) - 1
    scale = positive(divide(jnp.max(jnp.abs(x), axis=1), top))
    codes = jnp.round(x / scale[:, None, :])
    return jnp.clip(codes, -top, top).astype(jnp.int32), scale, None


def _affine(x: jax.Array, bits: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    top = 2**bits - 1
    zero = jnp.zeros((), x.dtype)
    low = jnp.minimum(jnp.min(x, axis=1), zero)
    high = jnp.maximum(jnp.max(x, axis=1), zero)
    half = jnp.array(0.5, x.dtype)
    # Halved first, as the range of finite numbers may be beyond them.
    span = lax.optimization_barrier((high * half, low * half))
    scale = _truncate(positive(2 * divide(span[0] - span[1], top)))
    # Halves go towards the zero point for codes and away from it for the zero point, so
    # that the lowest value has code 0 and the highest code 2^b - 1: encoding is idempotent.
    point = jnp.clip(-jnp.ceil(low / scale - half), 0, top)
    codes = jnp.ceil(x / scale[:, None, :] - half) + point[:, None, :]
    return jnp.clip(codes, 0, top).astype(jnp.int32), scale, point.astype(jnp.int32)


def _truncate(scale: jax.Array) -> jax.Array:
    if scale.dtype != jnp.float32:  # float64 products of 8-bit codes need no cut
        return scale
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint32) & jnp.uint32(0xFFFFFF00)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
