"""Products of rows with packed codes."""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..._activations import ACTIVATIONS
from ..._axes import Matrix
from .._calls import axis_of, by_rows, can_sum, count_of, either, names_of, placed
from .._layout import CHUNK, PANEL
from .._load import Loaded
from .._packed import Options, check_call, check_operands, one_of, prepared
from . import pallas_gpu, reference, stored


def matmul(
    x: jax.Array,
    w: Any,
    *,
    bias: jax.Array | None = None,
    activation: str = "none",
    index: jax.Array | int | None = None,
    implementation: Literal["cpu", "xla", "pallas_gpu"] | None = None,
) -> jax.Array:
    r"""Multiplies rows with a compressed matrix.

    .. math:: y = \mathrm{act}(\hat x \, \mathrm{materialize}(w) + b)

    On a CPU, with a leaf that rounds its input (:class:`jaxopt_models.quant.WithInput` of up to 8
    bits), both operands are integers and sums are exact. Otherwise inputs are taken as two bytes,
    16 bits of the largest of up to 256 neighbours along a group: results differ from those in
    `float32` by less than `3e-4` of the largest magnitude among them, usually by `2e-5`. A row that
    holds NaN or Inf gives NaN, and other rows do not notice.

    A CPU wants codes laid out (:func:`jaxopt_models.pack`), a GPU reads them where they lie: the
    leaf as :func:`jaxopt_models.compress` made it, integers, tables or codebooks of up to 8 bits,
    with groups of any size. There inputs, rounded as the leaf says, stay floats, those in `float32`
    cut to TF32 as XLA does by default; sums are in `float32`.

    Derivatives are those of the definition in plain JAX.

    Args:
      x: rows `[..., k]`, `float32` or `bfloat16`; `k` are all *in* axes of ``w`` in order.
      w: a :class:`Packed` leaf, or one of codes as they are stored; or a `WithInput` of one.
      bias: `[n]`, or ``None``.
      activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"sigmoid"`` or
        ``"tanh"``, applied last.
      index: which tensor of a stack, where ``w`` has a stack axis.
      implementation: ``"cpu"``, the compiled kernel of packed leaves; ``"pallas_gpu"``, the Triton
        kernel of others, for CUDA; ``"xla"``, plain JAX; ``None``, the kernel of the leaf where the
        program is compiled for its platform and there is one.

    Returns:
      `[..., n]`, the type of ``x``; `n` are all *out* axes of ``w`` in order.

    Raises:
      TypeError: for operands of another type.
      ValueError: for shapes or names that do not fit, or ``implementation="cpu"`` without kernels.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> from jaxopt_models.kernels import matmul
      >>> w = jom.pack(jom.quant.Int(bits=8)(jnp.eye(3)))
      >>> matmul.matmul(jnp.array([[1.0, 2.0, -3.0]]), w, activation="relu", implementation="xla")
      Array([[1., 2., 0.]], dtype=float32)
    """
    if implementation not in (None, "cpu", "xla", "pallas_gpu"):
        raise ValueError(
            f"matmul: implementation={implementation!r} is not 'cpu', 'xla', 'pallas_gpu' or None"
        )
    if implementation != "cpu" and isinstance(stored.codes_of(w), stored.Stored):
        return _in_place(x, w, bias, activation, index, implementation)
    m = check_operands(x, w, bias, activation, index, "matmul").matrix
    if implementation == "pallas_gpu":
        raise TypeError(
            "matmul: w is laid out for a CPU; for 'pallas_gpu' give the leaf that "
            "jaxopt_models.pack was given"
        )
    if x.ndim < 1 or x.shape[-1] != m.rows:
        raise ValueError(f"matmul: x has shape {x.shape}, its last axis must be {m.rows}")

    def plain(x: Any, w: Any, bias: Any, index: Any) -> jax.Array:
        return reference.matmul(x, one_of(w, index), bias, activation)

    def compiled(found: Loaded, x: Any, w: Any, bias: Any, index: Any) -> jax.Array:
        options, operands = prepared(x, w, bias, index, activation)
        return _operation(found, options)(x, *operands)

    given = (x.reshape(math.prod(x.shape[:-1]), m.rows), w, bias, index)
    y = either(plain, compiled, given, implementation=implementation, who="matmul")
    return y.reshape(*x.shape[:-1], m.columns)


def _in_place(
    x: jax.Array, w: Any, bias: Any, activation: str, index: Any, implementation: str | None
) -> jax.Array:
    """Multiplies with codes as they are stored."""
    if len(w.stack) != (index is not None):
        raise ValueError(f"matmul: w has stack axes {w.stack}; give index= for just one")
    w = one_of(w, index)
    codes = stored.codes_of(w)
    out = stored.outputs(codes)
    if why := stored.why_not(codes, out):
        raise TypeError(f"matmul: {why}; materialize it")
    m = Matrix(codes.core, out)
    check_call(x, m.columns, bias, activation, "matmul")
    if x.ndim < 1 or x.shape[-1] != m.rows:
        raise ValueError(f"matmul: x has shape {x.shape}, its last axis must be {m.rows}")
    rows = x.reshape(math.prod(x.shape[:-1]), m.rows)

    def kernel(rows: jax.Array, w: Any) -> jax.Array:
        return pallas_gpu.product(rows, w, out=out)

    def plain(rows: jax.Array, w: Any) -> jax.Array:
        return reference.product(rows, w, out)

    if implementation is None:
        y = jax.lax.platform_dependent(rows, w, cuda=kernel, default=plain)
    else:
        y = (kernel if implementation == "pallas_gpu" else plain)(rows, w)
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape(1, -1)
    return ACTIVATIONS[activation](y).reshape(*x.shape[:-1], m.columns)


@functools.lru_cache(maxsize=4096)
def _operation(found: Loaded, options: Options) -> Any:
    """Returns the kernel with these options as an operation on arrays."""
    even = options.columns % PANEL == 0

    def run(x: Any, codes: Any, *rest: Any, **changed: Any) -> jax.Array:
        n = codes.shape[1] * PANEL if even else options.columns
        shape = jax.ShapeDtypeStruct((x.shape[0], n), x.dtype)
        call = jax.ffi.ffi_call(found.target("matmul"), shape)
        return call(x, codes, *rest, **{**options.attributes(), **changed})

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        x, codes, scale, zero, sums, table, bias, limits, index = operands
        rows, last, first = axis_of(x, 0), axis_of(codes, 1), axis_of(codes, 2)
        groups = scale.shape[2]
        # What is filled up is at the end, and rows that are rounded whole stay together.
        if not even or codes.shape[1] % count_of(mesh, last) or names_of(last) & names_of(rows):
            last = None
        parts = count_of(mesh, first)
        together = not can_sum() or options.whole or x.shape[1] % CHUNK or codes.shape[2] % parts
        if (
            together
            or (groups > 1 and groups % parts)
            or names_of(first) & (names_of(rows) | names_of(last))
        ):
            first = None
        side = (None, last, first if groups > 1 else None, None)
        places = (
            placed(mesh, x, rows, first),
            placed(mesh, codes, None, last, first, None),
            *(placed(mesh, a, *side) for a in (scale, zero, sums)),
            placed(mesh, table, None, None),
            placed(mesh, bias, last),
            placed(mesh, limits, None, None),
            placed(mesh, index),
        )

        def local(x: Any, codes: Any, *rest: Any) -> Any:
            if first is None:
                return run(x, codes, *rest)
            scale, zero, sums, table, bias, *others = rest
            y = run(x, codes, scale, zero, sums, table, bias[:0], *others, activation=np.int64(0))
            y = jax.lax.psum(y, first)
            y = y + bias.astype(y.dtype).reshape(1, -1) if bias.size else y
            return ACTIVATIONS[options.activation](y)

        return mesh, local, NamedSharding(mesh, PartitionSpec(rows, last)), places

    result = "(p q)" if even else "n"
    rule = f"m k, l p c b, l p g q, d0 d1 d2 d3, e0 e1 e2 e3, f0 f1, h, i0 i1, -> m {result}"
    return by_rows(run, rule=rule, partition=partition)
