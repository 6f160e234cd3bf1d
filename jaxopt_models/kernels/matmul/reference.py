"""What products with packed codes are, in plain JAX: the definition, and the derivative."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..._activations import ACTIVATIONS
from ..._axes import Matrix
from .._layout import Packed, spread
from .._packed import codes_of


def matmul(x: jax.Array, w: Any, bias: jax.Array | None, activation: str) -> jax.Array:
    """Rebuilds the weight and multiplies; an input is rounded as the leaf says.

    Args:
      x: rows `[m, k]`.
      w: a leaf of one core tensor.
      bias: `[n]` or ``None``.
      activation: ``"none"``, ``"relu"`` and so on.

    Returns:
      `[m, n]`, the type of ``x``.
    """
    y = w.read(x, (1,), ()) @ codes_of(w).matrix.view(w.materialize()).astype(x.dtype)
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape(1, -1)
    return ACTIVATIONS[activation](y)


def product(
    x: jax.Array, w: Any, out: tuple[int, ...], *, precision: Any = None, dtype: Any = None
) -> jax.Array:
    """Rebuilds a weight that is not laid out and multiplies.

    Args:
      x: rows `[m, k]`.
      w: a leaf of one core tensor.
      out: its output axes.
      precision: as `jax.lax.dot_general` takes it.
      dtype: of the result; by default that of ``x``.

    Returns:
      `[m, n]`.
    """
    dense = Matrix(w.core, out).view(w.materialize()).astype(x.dtype)
    dtype = x.dtype if dtype is None else dtype
    x = w.read(x, (1,), ())
    return jnp.matmul(x, dense, precision=precision, preferred_element_type=dtype)


def integer_matmul(
    a: jax.Array, scale: jax.Array, zero: jax.Array, w: Packed, bias: jax.Array | None
) -> jax.Array:
    r"""The arithmetic of a product with rounded inputs, step by step, to the bit.

    .. math:: y_{ij} = b_j + \sum_g s_{gj} \left( u_i
              (\textstyle\sum_k a_{ik} q_{kj} - z_{gj} \sum_k a_{ik} - z'_i \sigma_{gj}) \right)

    Sums over `k` are of integers, those over `g` are taken in order. Call it outside of `jax.jit`,
    which would contract products and sums.

    Args:
      a: codes of the inputs, signed, `[m, k]`.
      scale: `u`, `float32` `[m]`.
      zero: `z'`, zero points of the inputs as signed codes, `float32` `[m]`.
      w: packed codes of one core tensor.
      bias: `[n]` or ``None``.

    Returns:
      `float32` `[m, n]`.
    """
    m = w.matrix
    q, groups = w.integers(), w.scale.shape[-2]
    scales = spread(w.scale, groups, m.columns)
    y = None
    for g in range(groups):
        run = slice(g * m.rows // groups, (g + 1) * m.rows // groups)
        part = jnp.dot(a[:, run].astype(jnp.int32), q[run]).astype(jnp.float32)
        if w.zero is not None:
            total = jnp.sum(a[:, run].astype(jnp.int32), axis=1).astype(jnp.float32)
            part = part - spread(w.zero, groups, m.columns)[g][None] * total[:, None]
        if w.sums is not None:
            part = part - zero[:, None] * spread(w.sums, groups, m.columns)[g][None]
        part = part * scale[:, None] * scales[g][None]
        y = part if y is None else y + part
    return y if bias is None else y + bias[None]
