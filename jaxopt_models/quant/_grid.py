"""Arithmetic of grids that is exact wherever it runs."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Grid(NamedTuple):
    """The numbers that codes stand for, for each group and column, `[groups, columns]`.

    Args:
      scale: step of the codes.
      zero: code of the value zero, where that is not code 0.
      threshold: magnitude from which on a value is not zero (ternary codes).
    """

    scale: jax.Array
    zero: jax.Array | None = None
    threshold: jax.Array | None = None


def divide(x: jax.Array, n: float) -> jax.Array:
    """Divides by a constant as IEEE does."""
    # XLA turns a division by a constant into a product with its rounded reciprocal, which
    # is neither what NumPy gives nor idempotent; a divisor that depends on data is exact.
    return x / jnp.where(x < jnp.inf, jnp.array(n, x.dtype), jnp.ones((), x.dtype))


def quotient(x: jax.Array, scale: jax.Array) -> jax.Array:
    """Divides by a scale, whose shape broadcasts to that of ``x``, as IEEE does; zero is one."""
    # In some programs XLA multiplies by the reciprocal of a divisor that is broadcast, in others
    # it divides, and at a tie the codes of the two differ. A divisor that depends on data is
    # exact in all of them.
    return x / jnp.where((x < jnp.inf) & (scale != 0), scale, jnp.ones((), scale.dtype))


def positive(scale: jax.Array) -> jax.Array:
    """Returns a scale that can be divided by."""
    # An all-zero or denormal group, flushed to zero by XLA, gets the scale one and codes zero.
    return jnp.where(scale >= jnp.finfo(scale.dtype).tiny, scale, jnp.ones((), scale.dtype))


def truncate(scale: jax.Array) -> jax.Array:
    """Cuts a scale to 16 significant bits, so that products with 8-bit codes are exact."""
    if scale.dtype != jnp.float32:  # float64 products of 8-bit codes need no cut
        return scale
    bits = jax.lax.bitcast_convert_type(scale, jnp.uint32) & jnp.uint32(0xFFFFFF00)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def steady(mean: jax.Array) -> jax.Array:
    """Rounds a mean to 16 significant bits, so that the mean of equal values is that value."""
    if mean.dtype != jnp.float32:
        return mean
    bits = jax.lax.bitcast_convert_type(mean, jnp.uint32) + jnp.uint32(0x80)
    found = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFFF00), jnp.float32)
    return bounded(found)


def bounded(x: jax.Array) -> jax.Array:
    """Returns a positive number, the largest with 16 significant bits for what is beyond it."""
    top = 0x7F7FFF00 if x.dtype == jnp.float32 else None
    most = np.uint32(top).view(np.float32) if top else jnp.finfo(x.dtype).max
    return jnp.minimum(x, jnp.array(most, x.dtype))


def mean(size: jax.Array, count: jax.Array, block: int) -> jax.Array:
    """Returns means of magnitudes along runs, also where the sums are beyond finite numbers.

    Args:
      size: magnitudes `[groups, run, columns]`, zero where they do not count.
      count: how many do, `[groups, columns]`.
      block: of how many columns a run was made. The mean of more than one is the largest number
        where the sum is beyond it: XLA would add them up in another order if there were two sums.

    Returns:
      `[groups, columns]`.
    """
    plain = jnp.sum(size, axis=-2) / count
    if block > 1:
        return bounded(plain)
    unit = large(size.dtype)
    return jnp.where(jnp.isfinite(plain), plain, jnp.sum(size / unit, axis=-2) / count * unit)


def large(dtype: Any) -> jax.Array:
    """Returns a power of two beyond which sums and squares may not be finite."""
    return jnp.array(2.0 ** (jnp.finfo(dtype).maxexp // 2), dtype)


def power_of_two(scale: jax.Array, *, up: bool) -> jax.Array:
    """Rounds a positive scale to a power of two between 2^-126 and 2^127, up or down."""
    mantissa, exponent = jnp.frexp(scale)  # mantissa in [0.5, 1)
    exponent = exponent - 1 if not up else jnp.where(mantissa == 0.5, exponent - 1, exponent)
    return jnp.ldexp(jnp.ones((), scale.dtype), jnp.clip(exponent, -126, 127))
