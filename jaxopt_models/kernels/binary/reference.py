"""What products of signs are, in plain JAX: the definition, and the derivative."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def matmul(x: jax.Array, w: Any) -> jax.Array:
    """Multiplies the signs of rows with a rebuilt weight, and by their mean magnitude.

    Args:
      x: rows `[m, k]`.
      w: a `WithSign` of :class:`PackedSigns`, one core tensor.

    Returns:
      `[m, n]`, the type of ``x``.
    """
    y = w.read(x, (1,), ()) @ w.values.matrix.view(w.materialize()).astype(x.dtype)
    if not w.scaled:
        return y
    return y * jnp.mean(jnp.abs(jax.lax.stop_gradient(x)), axis=1, keepdims=True)


def conv(
    x: jax.Array,
    w: Any,
    *,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int],
) -> jax.Array:
    """Convolves the signs of images with a rebuilt kernel; what is padded stays zero.

    Args:
      x: images `[batch, height, width, channels]`.
      w: a `WithSign` of :class:`PackedSigns`, one core tensor.
      strides: steps of the window.
      padding: zeros before and after each axis.
      dilation: distance of the entries of the window.

    Returns:
      `[batch, height, width, outputs]`, the type of ``x``.
    """

    def convolved(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            window_strides=strides,
            padding=padding,
            rhs_dilation=dilation,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )

    y = convolved(w.read(x, (1, 2, 3), ()), w.materialize())
    if not w.scaled:
        return y
    size = jnp.mean(jnp.abs(jax.lax.stop_gradient(x)), axis=3, keepdims=True)
    height, width = w.core[:2]
    window = jnp.full((height, width, 1, 1), 1 / (height * width), x.dtype)
    return y * convolved(size, window)
