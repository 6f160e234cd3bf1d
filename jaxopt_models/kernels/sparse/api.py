"""Products of rows with what a mask keeps."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ..._encoded import is_encoded
from .._calls import axis_of, by_rows, either, placed
from .._load import Loaded
from . import reference
from .layout import PackedBlocks, PackedPairs


def matmul(
    x: jax.Array, w: Any, *, implementation: Literal["cpu", "xla"] | None = None
) -> jax.Array:
    r"""Multiplies rows with a matrix of which only what is kept is stored.

    .. math:: y = x \, \mathrm{materialize}(w)

    Sums are of `float32` products, in another order than that of a dense product. What is dropped
    counts as zero: a row that holds NaN or Inf gives NaN, and other rows do not notice.

    Derivatives are those of the definition in plain JAX.

    Args:
      x: rows `[..., k]`, `float32` or `bfloat16`; `k` are all *in* axes of ``w`` in order.
      w: a :class:`PackedBlocks` or :class:`PackedPairs` leaf.
      implementation: ``"cpu"``, the compiled kernel; ``"xla"``, plain JAX; ``None``, the kernel
        where the program is compiled for a CPU and there is one.

    Returns:
      `[..., n]`, the type of ``x``; `n` are all *out* axes of ``w`` in order.

    Raises:
      TypeError: for operands of another type.
      ValueError: for shapes or names that do not fit, or ``implementation="cpu"`` without kernels.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> from jaxopt_models.kernels import sparse
      >>> half = jom.prune.Magnitude(sparsity=0.5, structure=jom.prune.Block(4))
      >>> w = jom.pack(half(jnp.repeat(jnp.array([[1.0], [2.0]]), 4, axis=0)), target="cpu")
      >>> sparse.matmul(jnp.arange(8.0)[None], w)                        # 2 (4 + 5 + 6 + 7)
      Array([[44.]], dtype=float32)
    """
    if not isinstance(w, (PackedBlocks, PackedPairs)):
        kind = w.kind() if is_encoded(w) else type(w).__name__
        raise TypeError(f"matmul: w is {kind}; lay it out with jaxopt_models.pack(tree)")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"matmul: x is {x.dtype}; give float32 or bfloat16")
    if w.stack:
        raise ValueError(f"matmul: w has stack axes {w.stack}; map over them with jax.vmap")
    m = w.matrix
    if x.ndim < 1 or x.shape[-1] != m.rows:
        raise ValueError(f"matmul: x has shape {x.shape}, its last axis must be {m.rows}")

    def compiled(found: Loaded, x: Any, w: Any) -> jax.Array:
        if isinstance(w, PackedPairs):
            return _operation(found, "sparse_pairs", m.columns)(x, w.values, w.places)
        scale = jnp.zeros((0,), jnp.float32) if w.scale is None else w.scale
        operation = _operation(found, "sparse_blocks", m.columns)
        return operation(x, w.values, w.index, w.starts, scale)

    given = (x.reshape(-1, m.rows), w)
    y = either(reference.matmul, compiled, given, implementation=implementation, who="matmul")
    return y.reshape(*x.shape[:-1], m.columns)


#: How dimensions correspond: only rows are divided, as columns are not of equal length.
_RULES = {
    "sparse_blocks": "m k, u t, v, s, c -> m n",
    "sparse_pairs": "m k, p c r i q, d e f -> m n",
}


@functools.lru_cache(maxsize=4096)
def _operation(found: Loaded, kernel: str, columns: int) -> Any:
    """Returns a kernel as an operation on arrays."""

    def run(x: Any, *rest: Any) -> jax.Array:
        shape = jax.ShapeDtypeStruct((x.shape[0], columns), x.dtype)
        return jax.ffi.ffi_call(found.target(kernel), shape)(x, *rest)

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        x, *rest = operands
        rows = axis_of(x, 0)
        whole = (placed(mesh, a, *[None] * a.ndim) for a in rest)
        places = (placed(mesh, x, rows, None), *whole)
        return mesh, run, NamedSharding(mesh, PartitionSpec(rows, None)), places

    return by_rows(run, rule=_RULES[kernel], partition=partition)
