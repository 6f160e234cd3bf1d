"""What products with what is kept are, in plain JAX: the definition, and the derivative."""

from __future__ import annotations

from typing import Any

import jax


def matmul(x: jax.Array, w: Any) -> jax.Array:
    """Multiplies rows with a rebuilt weight.

    Args:
      x: rows `[m, k]`.
      w: a :class:`PackedBlocks` or :class:`PackedPairs`, one core tensor.

    Returns:
      `[m, n]`, the type of ``x``.
    """
    return x @ w.matrix.view(w.materialize()).astype(x.dtype)
