"""Products of integers that XLA itself computes fast."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ..._axes import Matrix
from ...quant import Quantized, WithInput
from ...quant._grid import quotient
from .._calls import derived
from . import reference
from .stored import codes_of, operands

#: Inputs up to which a sum of products of 8-bit codes fits 32 bits.
MOST_INPUTS = 2**31 // (127 * 128)


def why_not(w: Any) -> str:
    """Says why a product with a leaf is none of integers, ``""`` if it is one."""
    codes = codes_of(w)
    if not isinstance(w, WithInput):
        return "its input is not rounded"
    if not w.symmetric:
        return "its input has a zero point"
    if not isinstance(codes, Quantized) or not codes.signed:
        return "its values are no symmetric integers"
    if codes.scale.shape[-1] > 1:
        return "its scales are of groups of inputs"
    return ""


def product(x: jax.Array, w: WithInput, *, out: tuple[int, ...]) -> jax.Array:
    r"""Multiplies rows, rounded to integers, with integers; sums are exact.

    .. math:: y_{ij} = u_i \, s_j \sum_k a_{ik} q_{kj}

    Derivatives are those of the definition.

    Args:
      x: rows `[m, k]`.
      w: a leaf of one core tensor, of which :func:`why_not` says nothing.
      out: its output axes.

    Returns:
      `[m, n]`, the type of ``x``.
    """

    def plain(x: jax.Array, w: Any) -> jax.Array:
        return reference.product(x, w, out)

    def run(x: jax.Array, w: Any) -> jax.Array:
        codes, wide = codes_of(w), x.astype(jnp.float32)
        m, top = Matrix(codes.core, out), 2 ** (w.bits - 1) - 1
        unit, _ = w.grid(wide, (1,), ())
        unit = unit.reshape(-1, 1)
        a = jnp.round(quotient(wide, unit))
        lost = jnp.any(jnp.isnan(a), axis=1, keepdims=True) | ~jnp.isfinite(unit)
        a = jnp.clip(a, -top, top).astype(jnp.int8)
        # For a single row XLA on a CPU has a loop that takes several times as long as two.
        y = jax.lax.dot(
            jnp.pad(a, ((0, 1), (0, 0))) if len(a) == 1 else a,
            m.view(codes.integers().astype(jnp.int8)),
            preferred_element_type=jnp.int32,
        )[: len(a)]
        form, [_, scale, *_] = operands(codes, out)
        scales = jnp.repeat(scale.astype(jnp.float32), form.block, axis=0).reshape(1, m.columns)
        return jnp.where(lost, jnp.nan, y.astype(jnp.float32) * unit * scales).astype(x.dtype)

    return derived(plain, run, (x, w))
