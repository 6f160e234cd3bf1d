r"""Products with values of which a scale or a rotation of their inputs is kept.

What a leaf undoes to its values is done to the input instead: :math:`x \, \mathrm{diag}(s) \, v`
is the product of a scaled input with the values, and :math:`x R^\top v` that of a rotated one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ._axes import Matrix
from ._bits import unpack_bits
from .kernels import matmul
from .quant import Rotated, Scaled, WithInput
from .quant._rotated import rotate

#: What keeps inputs apart, unlike a mask, and has values of its own.
MOVED = (Scaled, Rotated)


def is_moved(leaf: Any) -> bool:
    """Says whether a scale or rotation lies between an input and the values."""
    return isinstance(leaf.values if isinstance(leaf, WithInput) else leaf, MOVED)


def product(x: jax.Array, leaf: Any, **options: Any) -> jax.Array:
    """Multiplies rows with a leaf around packed codes.

    Args:
      x: `[rows, in]`.
      leaf: of one core tensor.
      **options: of :func:`jaxopt_models.kernels.matmul.matmul`.

    Returns:
      `[rows, out]`, the type of ``x``.
    """
    if not is_moved(leaf):
        return matmul.matmul(x, leaf, **options)
    if isinstance(leaf, WithInput):
        return product(leaf.read(x, (1,), ()), leaf.values, **options)
    wide = x.astype(jnp.float32)
    if isinstance(leaf, Scaled):
        wide = wide * leaf.scale.astype(jnp.float32).reshape(1, -1)
    else:
        flips = unpack_bits(leaf.signs, Matrix(leaf.core, leaf.out).rows)
        wide = rotate(wide.T, flips).T
    return product(wide, leaf.values, **options).astype(x.dtype)


def pointwise(
    x: jax.Array,
    leaf: Any,
    *,
    strides: tuple[int, int],
    padding: Any,
    dilation: tuple[int, int],
    **options: Any,
) -> jax.Array:
    """Convolves images with a leaf of `[1, 1, channels, outputs]`, without padding."""
    x = x[:, :: strides[0], :: strides[1]]
    y = product(x.reshape(-1, x.shape[-1]), leaf, **options)
    return y.reshape(*x.shape[:-1], y.shape[-1])
