"""Products of rows with packed codes."""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..._encoded import is_encoded
from ...quant import WithInput
from ...quant._with_input import grid
from .._calls import by_rows, is_number, with_tangent
from .._load import Loaded, status
from . import reference
from .layout import CHUNK, PANEL, Packed

Implementation = Literal["cpu", "xla"] | None
_MODES = {"float": 0, "row": 1, "pair": 2, "static": 3}


def matmul(
    x: jax.Array,
    w: Any,
    *,
    bias: jax.Array | None = None,
    activation: str = "none",
    index: jax.Array | int | None = None,
    implementation: Implementation = None,
) -> jax.Array:
    r"""Multiplies rows with a packed matrix.

    .. math:: y = \mathrm{act}(\hat x \, \mathrm{materialize}(w) + b)

    With a leaf that rounds its input (:class:`jaxopt_models.quant.WithInput` of up to 8 bits) both
    operands are integers and sums are exact. Otherwise inputs are taken as two bytes, 16 bits of
    the largest of up to 256 neighbours along a group: results differ from those in `float32` by
    less than `3e-4` of the largest magnitude among them, usually by `2e-5`. A row that holds NaN
    or Inf gives NaN, and other rows do not notice.

    Derivatives are those of the definition in plain JAX.

    Args:
      x: rows `[..., k]`, `float32` or `bfloat16`; `k` are all *in* axes of ``w`` in order.
      w: a :class:`Packed` leaf, or a `WithInput` of one.
      bias: `[n]`, or ``None``.
      activation: ``"none"``, ``"relu"``, ``"gelu"``, ``"gelu_tanh"``, ``"silu"``, ``"sigmoid"`` or
        ``"tanh"``, applied last.
      index: which tensor of a stack, where ``w`` has a stack axis.
      implementation: ``"cpu"``, the compiled kernel; ``"xla"``, plain JAX; ``None``, the kernel
        where the program is compiled for a CPU and there is one.

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
    packed = w.values if isinstance(w, WithInput) else w
    if not isinstance(packed, Packed):
        raise TypeError(f"matmul: w is {_kind(w)}; lay it out with jaxopt_models.pack(tree)")
    m = packed.matrix
    if x.ndim < 1 or x.shape[-1] != m.rows:
        raise ValueError(f"matmul: x has shape {x.shape}, its last axis must be {m.rows}")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"matmul: x is {x.dtype}; give float32 or bfloat16")
    if bias is not None and bias.shape != (m.columns,):
        raise ValueError(f"matmul: bias has shape {bias.shape}, not ({m.columns},)")
    if activation not in reference.ACTIVATIONS:
        names = ", ".join(reference.ACTIVATIONS)
        raise ValueError(f"matmul: activation={activation!r} is none of {names}")
    if implementation not in (None, "cpu", "xla"):
        raise ValueError(f"matmul: implementation={implementation!r} is not 'cpu', 'xla' or None")
    if len(packed.stack) != (index is not None):
        raise ValueError(f"matmul: w has stack axes {packed.stack}; give index= for just one")
    found = status() if implementation != "xla" else None
    if implementation == "cpu" and not found.path:  # type: ignore[union-attr]
        raise ValueError(f"matmul: there are no kernels: {found.why}")  # type: ignore[union-attr]

    rows = x.reshape(-1, m.rows)
    leaves, treedef = jax.tree.flatten((rows, w, bias, 0 if index is None else index))
    leaves = [jnp.asarray(a) for a in leaves]
    of_numbers = [is_number(a) for a in leaves]

    def joined(numbers: list[Any], codes: list[Any]) -> Any:
        given = iter(numbers), iter(codes)
        return jax.tree.unflatten(treedef, [next(given[not n]) for n in of_numbers])

    def plain(numbers: list[Any], codes: list[Any]) -> jax.Array:
        x, w, bias, i = joined(numbers, codes)
        one = w if index is None else jax.tree.map(lambda a: _at(a, i), w)
        return reference.matmul(x, one, bias, activation)

    def compiled(numbers: list[Any], codes: list[Any]) -> jax.Array:
        x, w, bias, i = joined(numbers, codes)
        return _call(found, x, w, bias, i, activation)

    def chosen(numbers: list[Any], codes: list[Any]) -> jax.Array:
        if found is None or not found.path:
            return plain(numbers, codes)
        if implementation == "cpu":
            return compiled(numbers, codes)
        return jax.lax.platform_dependent(numbers, codes, cpu=compiled, default=plain)

    numbers = [a for a, n in zip(leaves, of_numbers, strict=True) if n]
    codes = [a for a, n in zip(leaves, of_numbers, strict=True) if not n]
    y = with_tangent(chosen, plain)(numbers, codes)
    return y.reshape(*x.shape[:-1], m.columns)


def _kind(w: Any) -> str:
    return w.kind() if is_encoded(w) else type(w).__name__


def _at(a: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(a, i, keepdims=False)


def _call(found: Loaded, x: Any, w: Any, bias: Any, index: Any, activation: str) -> jax.Array:
    """Hands operands to the kernel in its order, those that are left out without entries."""
    packed = w.values if isinstance(w, WithInput) else w
    stacked = bool(packed.stack)

    def layers(a: jax.Array) -> jax.Array:
        return a if stacked else a[None]

    none = jnp.zeros((0, 0, 0, 0), jnp.float32)
    codes, scale = layers(packed.codes), layers(packed.scale)
    zero = none if packed.zero is None else layers(packed.zero)
    mode, bits, symmetric, limits, sums = "float", 8, True, jnp.zeros((0, 2), jnp.float32), none
    if isinstance(w, WithInput):
        bits, symmetric = w.bits, w.symmetric
        mode = ("row" if symmetric else "pair") if w.per == "row" else "static"
        if mode == "static":
            scales, zeros = (w.scale, w.zero_point) if w.scale is not None else _whole(x, w)
            given = (scales, jnp.zeros_like(scales) if zeros is None else zeros)
            limits = jnp.stack([jnp.reshape(a, -1) for a in given], axis=1).astype(jnp.float32)
            limits = jnp.broadcast_to(limits, (codes.shape[0], 2))
        if not symmetric:
            sums = layers(packed.sums)
    bias = jnp.zeros((0,), jnp.float32) if bias is None else bias.astype(jnp.float32)
    operation = _operation(
        found, packed.bits, mode, bits, symmetric, activation, packed.matrix.columns, str(x.dtype)
    )
    index = jnp.asarray(index, jnp.int32)
    return operation(x, codes, scale, zero, sums, bias, limits, index)


def _whole(x: jax.Array, w: WithInput) -> tuple[jax.Array, jax.Array | None]:
    """Returns the grid of a whole input."""
    wide = x.astype(jnp.float32)
    return grid(jnp.min(wide, initial=0), jnp.max(wide, initial=0), w.bits, w.symmetric)


@functools.lru_cache(maxsize=4096)
def _operation(
    found: Loaded,
    bits: int,
    mode: str,
    input_bits: int,
    symmetric: bool,
    activation: str,
    columns: int,
    dtype: str,
) -> Any:
    """Returns the kernel with these options as an operation on arrays."""
    even = columns % PANEL == 0

    def run(x: Any, codes: Any, *rest: Any, activation: str = activation) -> jax.Array:
        n = codes.shape[1] * PANEL if even else columns
        call = jax.ffi.ffi_call(
            found.target("matmul"), jax.ShapeDtypeStruct((x.shape[0], n), x.dtype)
        )
        return call(
            x,
            codes,
            *rest,
            bits=np.int64(bits),
            inputs=np.int64(_MODES[mode]),
            input_bits=np.int64(input_bits),
            symmetric=np.int64(symmetric),
            activation=np.int64(list(reference.ACTIVATIONS).index(activation)),
        )

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        x, codes, scale, zero, sums, bias, limits, index = operands
        rows = _axis(x, 0)
        last = (
            _axis(codes, 1)
            if even and codes.shape[1] % _count(mesh, _axis(codes, 1)) == 0
            else None
        )
        first = _axis(codes, 2)
        count, groups = _count(mesh, first), scale.shape[2]
        # Rows are rounded whole, and what is filled up is at the end: both keep inputs together.
        whole = mode in ("row", "pair") or not symmetric or x.shape[1] % CHUNK
        if whole or codes.shape[2] % count or (groups > 1 and groups % count):
            first = None
        used = _names(rows)
        last = None if _names(last) & used else last
        first = None if _names(first) & (used | _names(last)) else first

        def spec(a: Any, *axes: Any) -> Any:
            given = axes if all(a.shape) else (None,) * len(a.shape)
            return NamedSharding(mesh, PartitionSpec(*given))

        side = (None, last, first if groups > 1 else None, None)
        places = (
            spec(x, rows, first),
            spec(codes, None, last, first, None),
            spec(scale, *side),
            spec(zero, *side),
            spec(sums, *side),
            spec(bias, last),
            spec(limits, None, None),
            spec(index),
        )

        def local(
            x: Any, codes: Any, scale: Any, zero: Any, sums: Any, bias: Any, *rest: Any
        ) -> Any:
            if first is None:
                return run(x, codes, scale, zero, sums, bias, *rest)
            part = run(x, codes, scale, zero, sums, bias[:0], *rest, activation="none")
            y = jax.lax.psum(part, first)
            y = y + bias.astype(y.dtype).reshape(1, -1) if bias.size else y
            return reference.ACTIVATIONS[activation](y)

        return mesh, local, NamedSharding(mesh, PartitionSpec(rows, last)), places

    result = "(p q)" if even else "n"
    rule = f"m k, l p c b, l p g q, d0 d1 d2 d3, e0 e1 e2 e3, h, i0 i1, -> m {result}"
    return by_rows(run, rule=rule, partition=partition)


def _axis(a: Any, i: int) -> Any:
    spec = getattr(a.sharding, "spec", PartitionSpec())
    return spec[i] if i < len(spec) else None


def _names(axis: Any) -> set[str]:
    return set() if axis is None else {axis} if isinstance(axis, str) else set(axis)


def _count(mesh: Any, axis: Any) -> int:
    return int(np.prod([mesh.shape[n] for n in _names(axis)], dtype=int))
