"""The table of what a recipe did."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._bits import array_bits
from ._encoded import Encoded, innermost, is_encoded, rebuilt
from ._kernels import names_for
from ._pack import why_not
from ._paths import flatten, match_paths
from ._table import Table
from .kernels._load import missing


def report(params: Any, small: Any, *, types: Sequence[type[Encoded]] = ()) -> Table:
    r"""Says what became of each parameter: kind, bytes by part, error, kernel.

    Args:
      params: the dense tree, or ``None`` where it is gone (no errors then).
      small: the compressed tree, or the path of an artifact.
      types: your own leaf classes that a file may name.

    Returns:
      For a tree: path, kind, shape, bytes in memory by part, bits an entry, the relative error
      :math:`\|w - \hat w\|_2 / \|w\|_2`, and which compiled kernels compute with the leaf on a
      CPU, ``"pack it"`` where :func:`pack` would lay it out for one, or why there is none; a note
      says why none can be compiled here. For a file: what it holds by section, in bytes that add
      up to its length.

    Raises:
      ValueError: if the trees differ in paths or shapes.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> params = {"kernel": jnp.arange(16.0).reshape(4, 4)}
      >>> small = jom.compress(params, [jom.Rule("kernel", jom.quant.Int(bits=8))])
      >>> jom.report(params, small)[0]["parts"]
      'codes 16, scale 16'
      >>> [jom.report(params, tree)[0]["kernel"] for tree in (small, jom.pack(small, target="cpu"))]
      ['pack it', 'packed matmul']
    """
    if isinstance(small, (str, os.PathLike)):
        from . import artifact

        table = artifact.inspect(small, types=types)
        if params is None:
            return table
        small = artifact.load(small, types=types)
    leaves, _ = flatten(small)
    dense = {} if params is None else match_paths(params, leaves, who="report")
    rows = []
    before = after = 0
    for p in leaves:
        x = p.value
        if not hasattr(x, "dtype"):
            continue
        bits = x.bits_by_part() if is_encoded(x) else {"dense": array_bits(x)}
        total = sum(bits.values())
        before, after = before + dense_bits(x), after + total
        rows.append(
            (
                p.path,
                x.kind() if is_encoded(x) else "dense",
                list(x.shape),
                ", ".join(f"{k} {-(-v // 8):,}" for k, v in bits.items()),
                total / max(1, math.prod(x.shape)),
                None if params is None else _error(dense[p.path], x),
                _kernel(x),
                p.reason and f"not a parameter: {p.reason}",
            )
        )
    columns = ("path", "kind", "shape", "parts", "bits", "error", "kernel", "note")
    notes = [in_memory(before, after)]
    wanted = any(row[6] and not row[6].startswith("none") for row in rows)
    if wanted and (why := missing()):
        notes.append(f"there are no compiled kernels, everything runs on XLA: {why}")
    return Table(columns, rows, title="report", notes=notes)


def _kernel(x: Any) -> str:
    """Says which kernels a leaf is for, or why it is for none."""
    if not is_encoded(x):
        return ""
    if innermost(x).laid_out:
        return ", ".join(names_for(x))
    if jax.default_backend() != "cpu":
        return "none to pack for: it is read as it is stored"
    why = why_not(x)
    return f"none: {why}" if why else "pack it"


def in_memory(before: int, after: int) -> str:
    """Says what bits became of how many."""
    ratio = f" ({before / after:.2f}x)" if after else ""
    return f"in memory: {before / 8:,.0f} -> {after / 8:,.0f} bytes{ratio}"


def dense_bits(x: Any) -> int:
    """Returns the bits of the tensor that a leaf, or an array, stands for; 0 for what is none."""
    if is_encoded(x):
        return x.size * array_bits(jax.ShapeDtypeStruct((), x.dtype))
    return array_bits(x) if hasattr(x, "dtype") else 0


def _error(w: Any, x: Any) -> float | None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return None
    got = jnp.asarray(rebuilt(x)).astype(jnp.float32)
    want = jnp.asarray(rebuilt(w)).astype(jnp.float32)
    norm = jnp.linalg.norm(want.reshape(-1))
    miss = jnp.linalg.norm((want - got).reshape(-1))
    return float(jnp.where(norm > 0, miss / jnp.where(norm > 0, norm, 1), miss))
