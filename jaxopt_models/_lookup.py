"""Single rows of compressed parameters, rebuilt without the others."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ._coded import Coded
from ._encoded import Encoded, Masked, is_encoded, rebuilt
from .kernels._layout import CHUNK, PANEL, unpack
from .kernels.matmul import Packed
from .quant._with_input import Reader


def rows_of(leaf: Encoded, at: jax.Array | None) -> Any:
    """Rebuilds rows along the first axis.

    Args:
      leaf: a parameter.
      at: which rows, `int32` `[n]`, all of them there; or ``None`` to ask whether it can be done.

    Returns:
      `[n, *core[1:]]`; without ``at`` the reason why it cannot be done, ``""`` if it can.
    """
    why = _why_not(leaf)
    if at is None:
        return why
    if isinstance(leaf, Packed):
        return _of_packed(leaf, at)
    return rebuilt(_picked(leaf, at))


def _why_not(leaf: Any) -> str:
    if not is_encoded(leaf):
        return ""
    if isinstance(leaf, (Reader, Masked)):
        if leaf.stack:
            return "it is stacked"
        if isinstance(leaf, Masked) and len(leaf.core) < 2:
            return "the bits of its mask are not rows"
        if isinstance(leaf.values, Packed):
            return "the values of what is around it are packed"
        return _why_not(leaf.values)
    if leaf.stack or not leaf.core:
        return "it is stacked"
    if isinstance(leaf, Packed):
        return (
            ""
            if leaf.out == tuple(range(1, len(leaf.core))) and leaf.core[1:]
            else "rows are outputs"
        )
    if not isinstance(leaf, Coded):
        return f"rows of {type(leaf).__name__} are not stored one by one"
    if len(leaf.core) < 2:
        return "codes of a vector are not rows"
    if 0 not in leaf.out and getattr(leaf, "scale", None) is not None and leaf.scale.shape[-1] > 1:
        return "groups run over several rows"
    if 0 in leaf.out and (leaf.shared > 1 or is_encoded(leaf.meaning)):
        return "rows share scales"
    return ""


def _picked(leaf: Any, at: jax.Array) -> Any:
    """Returns the leaf of some rows."""
    if not is_encoded(leaf):
        return jnp.take(leaf, at, axis=0, mode="clip")
    core = (at.shape[0], *leaf.core[1:])

    def part(x: Any) -> Any:
        return None if x is None else jnp.take(x, at, axis=0, mode="clip")

    if isinstance(leaf, Reader):
        return _picked(leaf.values, at)
    if isinstance(leaf, Masked):
        values = _picked(leaf.values, at)
        return dataclasses.replace(leaf, mask=part(leaf.mask), values=values, core=core)
    found = {"codes": part(leaf.codes)}
    if 0 in leaf.out:
        found |= {k: part(v) for k, v in leaf.parts().items() if k != "codes"}
    return dataclasses.replace(leaf, core=core, **found)


def _of_packed(leaf: Packed, at: jax.Array) -> jax.Array:
    """Rebuilds the chunk around each row, of which it is one of 32."""
    m = leaf.matrix
    panels = leaf.codes.shape[0]
    chunk = jnp.take(leaf.codes, at // CHUNK, axis=1, mode="clip")
    q = unpack(chunk, chunk.shape[1] * CHUNK, panels * PANEL, leaf.bits)
    q = q.reshape(at.shape[0], CHUNK, panels * PANEL)
    q = jnp.take_along_axis(q, (at % CHUNK)[:, None, None], axis=1)[:, 0]
    q = leaf.meaning(q - leaf.offset)
    each = m.rows // leaf.scale.shape[1]

    def side(x: jax.Array) -> jax.Array:
        return jnp.take(x, at // each, axis=1).swapaxes(0, 1).reshape(at.shape[0], -1)

    if leaf.zero is not None:
        q = q - side(leaf.zero)
    rows = (q * side(leaf.scale))[:, : m.columns]
    return rows.reshape(at.shape[0], *leaf.core[1:]).astype(leaf.dtype)
