"""Arithmetic of grids that is exact wherever it runs."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


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
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFFF00), jnp.float32)


def power_of_two(scale: jax.Array, *, up: bool) -> jax.Array:
    """Rounds a positive scale to a power of two between 2^-126 and 2^127, up or down."""
    mantissa, exponent = jnp.frexp(scale)  # mantissa in [0.5, 1)
    exponent = exponent - 1 if not up else jnp.where(mantissa == 0.5, exponent - 1, exponent)
    return jnp.ldexp(jnp.ones((), scale.dtype), jnp.clip(exponent, -126, 127))
