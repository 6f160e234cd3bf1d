"""Products and convolutions of signs with packed signs."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ..._encoded import is_encoded
from ...quant._xnor import WithSign
from .._calls import axis_of, by_rows, count_of, either, names_of, placed
from .._load import Loaded
from . import reference
from .layout import PANEL, PackedSigns


def matmul(
    x: jax.Array, w: Any, *, implementation: Literal["cpu", "xla"] | None = None
) -> jax.Array:
    r"""Multiplies the signs of rows with packed signs.

    .. math:: y = K \odot (\mathrm{sign}(x) \, \mathrm{materialize}(w)),
              \qquad K = \mathrm{mean}_k |x|

    Sums of signs are integers and exact. A row that holds NaN gives NaN, and other rows do not
    notice; one with Inf has an infinite `K`.

    Derivatives are those of the definition in plain JAX: by `x` they pass where
    :math:`|x| \le 1`, and `K` counts as a constant.

    Args:
      x: rows `[..., k]`, `float32` or `bfloat16`; `k` are all *in* axes of ``w`` in order.
      w: a `WithSign` of a :class:`PackedSigns` leaf; without ``scaled`` there is no `K`.
      implementation: ``"cpu"``, the compiled kernel; ``"xla"``, plain JAX; ``None``, the kernel
        where the program is compiled for a CPU and there is one.

    Returns:
      `[..., n]`, the type of ``x``; `n` are all *out* axes of ``w`` in order.

    Raises:
      TypeError: for operands of another type.
      ValueError: for shapes or names that do not fit, or ``implementation="cpu"`` without kernels.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> from jaxopt_models.kernels import binary
      >>> w = jom.pack(jom.quant.XNOR(scaled=False)(jnp.array([[2.0], [2.0], [-2.0]])))
      >>> binary.matmul(jnp.array([[0.5, -3.0, -1.0]]), w)                # 2 (1 - 1 + 1)
      Array([[2.]], dtype=float32)
    """
    m = _checked(x, w, "matmul").matrix
    if x.ndim < 1 or x.shape[-1] != m.rows:
        raise ValueError(f"matmul: x has shape {x.shape}, its last axis must be {m.rows}")

    def compiled(found: Loaded, x: Any, w: Any) -> jax.Array:
        runs, length = w.values.runs
        attributes = (("runs", runs), ("length", length), ("scaled", int(w.scaled)))
        operation = _operation(found, "binary_matmul", m.columns, (), attributes)
        return operation(x, w.values.signs, w.values.scale)

    given = (x.reshape(-1, m.rows), w)
    y = either(reference.matmul, compiled, given, implementation=implementation, who="matmul")
    return y.reshape(*x.shape[:-1], m.columns)


def conv(
    x: jax.Array,
    w: Any,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    dilation: tuple[int, int] = (1, 1),
    implementation: Literal["cpu", "xla"] | None = None,
) -> jax.Array:
    r"""Convolves the signs of images with packed signs.

    .. math:: y = K \odot (\mathrm{sign}(x) * \mathrm{materialize}(w)), \qquad
              K = \mathrm{mean}_c |x| * \frac{1}{k_h k_w} \mathbf{1}

    What is padded counts as zero, neither plus nor minus one. For all else see :func:`matmul`.

    Args:
      x: images `[batch, height, width, channels]`, `float32` or `bfloat16`.
      w: a `WithSign` of a :class:`PackedSigns` leaf of `[window height, window width, channels,
        outputs]` with the last axis for outputs.
      strides: steps of the window.
      padding: ``"SAME"``, ``"VALID"``, or zeros before and after each axis.
      dilation: distance of the entries of the window.
      implementation: ``"cpu"``, ``"xla"`` or ``None``, as there.

    Returns:
      `[batch, height, width, outputs]`, the type of ``x``.

    Raises:
      TypeError: for operands of another type.
      ValueError: for shapes or names that do not fit, or ``implementation="cpu"`` without kernels.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> from jaxopt_models.kernels import binary
      >>> w = jom.pack(jom.quant.XNOR(scaled=False)(jnp.ones((3, 3, 8, 1))))
      >>> binary.conv(jnp.ones((1, 2, 2, 8)), w).ravel()                  # 4 of 9 are no padding
      Array([32., 32., 32., 32.], dtype=float32)
    """
    packed = _checked(x, w, "conv")
    core = packed.core
    if len(core) != 4 or packed.out != (3,):
        raise ValueError(
            f"conv: w stands for a tensor {core} with outputs {packed.out}, not for [height, "
            "width, channels, outputs] with the last"
        )
    if x.ndim != 4 or x.shape[3] != core[2]:
        raise ValueError(f"conv: x has shape {x.shape}, not [batch, height, width, {core[2]}]")
    window = core[:2]
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
        padding = jax.lax.padtype_to_pads(x.shape[1:3], reach, strides, padding)
    pads = tuple((int(a), int(b)) for a, b in padding)
    sizes = tuple(
        max(0, (n + sum(p) - (k - 1) * d - 1) // s + 1)
        for n, p, k, d, s in zip(x.shape[1:3], pads, window, dilation, strides, strict=True)
    )

    def plain(x: Any, w: Any) -> jax.Array:
        return reference.conv(x, w, strides=strides, padding=pads, dilation=dilation)

    def compiled(found: Loaded, x: Any, w: Any) -> jax.Array:
        geometry = (*window, *strides, *(p[0] for p in pads), *dilation)
        attributes = (("geometry", geometry), ("scaled", int(w.scaled)))
        operation = _operation(found, "binary_conv", core[3], sizes, attributes)
        return operation(x, w.values.signs, w.values.scale)

    return either(plain, compiled, (x, w), implementation=implementation, who="conv")


def _checked(x: jax.Array, w: Any, who: str) -> PackedSigns:
    """Raises unless the operands are of the right kind; returns the signs."""
    if not isinstance(w, WithSign) or not isinstance(w.values, PackedSigns):
        kind = w.kind() if is_encoded(w) else type(w).__name__
        raise TypeError(f"{who}: w is {kind}; pack what quant.XNOR made with jaxopt_models.pack")
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"{who}: x is {x.dtype}; give float32 or bfloat16")
    if w.stack:
        raise ValueError(f"{who}: w has stack axes {w.stack}; map over them with jax.vmap")
    return w.values


@functools.lru_cache(maxsize=4096)
def _operation(
    found: Loaded,
    kernel: str,
    columns: int,
    sizes: tuple[int, ...],
    attributes: tuple[tuple[str, Any], ...],
) -> Any:
    """Returns a kernel with its options as an operation on arrays."""
    even, inner = columns % PANEL == 0, len(sizes)
    given = {name: np.array(v, np.int64)[()] for name, v in attributes}

    def run(x: Any, signs: Any, scale: Any) -> jax.Array:
        n = signs.shape[0] * PANEL if even else columns
        shape = jax.ShapeDtypeStruct((x.shape[0], *sizes, n), x.dtype)
        return jax.ffi.ffi_call(found.target(kernel), shape)(x, signs, scale, **given)

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        x, signs, scale = operands
        rows, last = axis_of(x, 0), axis_of(signs, 0)
        if not even or signs.shape[0] % count_of(mesh, last) or names_of(last) & names_of(rows):
            last = None
        whole = (None,) * (x.ndim - 1)
        places = (
            placed(mesh, x, rows, *whole),
            placed(mesh, signs, last, None, None),
            placed(mesh, scale, last, None),
        )
        return mesh, run, NamedSharding(mesh, PartitionSpec(rows, *whole[:inner], last)), places

    before, after = ("y x ", "v u ") if sizes else ("", "")
    rule = f"m {before}k, p w c, p q -> m {after}{'(p q)' if even else 'n'}"
    return by_rows(run, rule=rule, partition=partition)
