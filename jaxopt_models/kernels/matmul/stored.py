"""Leaves as they are stored, as operands of a kernel that reads their codes in place."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..._axes import Axes, Matrix
from ..._bits import has_planes
from ..._encoded import Masked, is_encoded
from ...codebook import Clustered
from ...quant import Quantized, Tabulated, WithInput
from ...quant._tables import table_of

Stored = Quantized | Tabulated | Clustered


@dataclasses.dataclass(frozen=True)
class Format:
    """What of a stored matrix is no array.

    Args:
      columns: number of outputs.
      bits: width of a code.
      signed: whether codes are two's complement.
      planes: whether they are bit planes along the last axis.
      inner: whether the last axis is that of the inputs, else that of the outputs.
      block: number of neighbouring outputs that share a scale.
    """

    columns: int
    bits: int
    signed: bool
    planes: bool
    inner: bool
    block: int


def codes_of(leaf: Any) -> Any:
    """Returns the leaf of the codes, without what is around it."""
    leaf = leaf.values if isinstance(leaf, WithInput) else leaf
    # Codes are 0 where the mask hides them, and of symmetric ones that is what they mean.
    return leaf.values if isinstance(leaf, Masked) and _symmetric(leaf.values) else leaf


def _symmetric(leaf: Any) -> bool:
    return isinstance(leaf, Quantized) and leaf.signed


def anywhere(leaf: Any) -> bool:
    """Says whether all entries mean the same, so that any axes may be summed over."""
    if isinstance(leaf, Clustered):
        return not leaf.out
    return isinstance(leaf, Stored) and not leaf.out and leaf.scale.shape[-1] == 1


def outputs(leaf: Any) -> tuple[int, ...]:
    """Returns the output axes of a leaf: where it does not say, the default."""
    return Axes().resolve(len(leaf.core)).out if anywhere(leaf) else leaf.out  # type: ignore[return-value]


def why_not(leaf: Any, out: tuple[int, ...]) -> str:
    """Says why a kernel cannot read a leaf of the codes in place, ``""`` if it can.

    Args:
      leaf: what :func:`codes_of` returned.
      out: its output axes.
    """
    if isinstance(leaf, Masked):
        return "there is no kernel for a mask around it; symmetric quant.Int has one"
    if not isinstance(leaf, Stored):
        return f"there is no kernel for {type(leaf).__name__}"
    if leaf.dtype not in (jnp.float32, jnp.bfloat16):
        return f"there is no kernel for tensors of {leaf.dtype}"
    if is_encoded(leaf.meaning) and leaf.meaning.stack != leaf.stack:
        return "its scales are stacked otherwise"
    m = Matrix(leaf.core, out)
    if not m.rows or not m.columns:
        return "it has no entry"
    if m.rows * m.columns >= 2**31:
        return "it has 2^31 entries or more"
    ordered = tuple(range(len(leaf.core)))
    if m.inner + m.out != ordered and m.out + m.inner != ordered:
        return "its inputs are stored on both sides of its outputs"
    last = m.rows if _is_inner(m) else m.columns
    if has_planes(leaf.bits) and leaf.core[-1:] != (last,):
        return f"planes of {leaf.bits} bits along one of several axes"
    return ""


def _is_inner(m: Matrix) -> bool:
    """Says whether inputs follow outputs."""
    return bool(m.inner) and m.inner[-1] == len(m.core) - 1


def operands(leaf: Any, out: tuple[int, ...]) -> tuple[Format, list[jax.Array]]:
    """Returns the format of one core tensor, and its arrays as they are.

    Args:
      leaf: what :func:`codes_of` returned, of which :func:`why_not` says nothing.
      out: its output axes.

    Returns:
      The format and `codes`, `[k, n]` or `[n, k]`, planes between; `scale` and `zero`,
      `[n / block, groups]`; `table`, `[n, t]` or `[1, t]`. What there is none of has no entries.
    """
    m, planes = Matrix(leaf.core, out), has_planes(leaf.bits)
    inner = _is_inner(m)
    none = jnp.zeros((0, 0), jnp.float32)
    scale, zero, table, block = none, none, none, 1
    if isinstance(leaf, Clustered):
        table = leaf.codebook.reshape(-1, leaf.codebook.shape[-1])
    else:
        plain = not is_encoded(leaf.scale) and leaf.scale.dtype in (jnp.float32, jnp.bfloat16)
        scale = leaf.scale if plain else leaf.scales()
        scale, block = scale.reshape(-1, scale.shape[-1]), leaf.block
        if anywhere(leaf):
            block = m.columns
        if isinstance(leaf, Quantized) and leaf.zero_point is not None:
            zero = leaf.zero_point.reshape(scale.shape)
        if isinstance(leaf, Tabulated):
            table = jnp.asarray(np.asarray(table_of(leaf.table).values))[None]
    codes = leaf.codes
    slow, fast = (m.columns, m.rows) if inner else (m.rows, m.columns)
    codes = codes.reshape(slow, *codes.shape[-2:]) if planes else codes.reshape(slow, fast)
    form = Format(m.columns, leaf.bits, leaf.signed, planes, inner, block)
    return form, [codes, scale, zero, table]
