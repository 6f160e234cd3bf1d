"""Convolutions with packed codes."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from .._calls import axis_of, by_rows, count_of, either, names_of, placed
from .._layout import PANEL
from .._load import Loaded
from .._packed import Options, check_operands, one_of, prepared
from . import reference

Pairs = tuple[tuple[int, int], tuple[int, int]]


def conv(
    x: jax.Array,
    w: Any,
    *,
    strides: tuple[int, int] = (1, 1),
    padding: str | Sequence[tuple[int, int]] = "SAME",
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
    bias: jax.Array | None = None,
    activation: str = "none",
    index: jax.Array | int | None = None,
    implementation: Literal["cpu", "xla"] | None = None,
) -> jax.Array:
    r"""Convolves images with a packed kernel.

    .. math:: y = \mathrm{act}(\hat x * \mathrm{materialize}(w) + b)

    With a leaf that rounds its input (:class:`jaxopt_models.quant.WithInput`) both operands are
    integers and sums are exact. Otherwise inputs are taken as 16 bits of the largest of an example
    (those of depthwise convolutions as they are). An example that holds NaN or Inf gives NaN
    wherever it is seen, and other examples do not notice.

    Derivatives are those of the definition in plain JAX.

    Args:
      x: images `[batch, height, width, channels]`, `float32` or `bfloat16`.
      w: a :class:`jaxopt_models.kernels.matmul.Packed` leaf of `[window height, window width,
        channels / groups, outputs]` with the last axis for outputs, or a `WithInput` of one.
      strides: steps of the window.
      padding: ``"SAME"``, ``"VALID"``, or zeros before and after each axis.
      dilation: distance of the entries of the window.
      groups: number of groups of channels; as many as channels for a depthwise convolution.
      bias: `[outputs]`, or ``None``.
      activation: as for :func:`jaxopt_models.kernels.matmul.matmul`.
      index: which kernel of a stack, where ``w`` has a stack axis.
      implementation: ``"cpu"``, ``"xla"`` or ``None``, as there.

    Returns:
      `[batch, height, width, outputs]`, the type of ``x``.

    Raises:
      TypeError: for operands of another type.
      ValueError: for shapes or names that do not fit, or ``implementation="cpu"`` without kernels.

    Example:
      >>> import jax.numpy as jnp, jaxopt_models as jom
      >>> from jaxopt_models.kernels import conv
      >>> w = jom.pack(jom.quant.Int(bits=8)(jnp.ones((2, 2, 1, 1))), target="cpu")
      >>> conv.conv(jnp.ones((1, 3, 3, 1)), w, padding="VALID", implementation="xla").ravel()
      Array([4., 4., 4., 4.], dtype=float32)
    """
    packed = check_operands(x, w, bias, activation, index, "conv")
    core = packed.core
    if x.ndim != 4:
        raise ValueError(f"conv: x has shape {x.shape}, not [batch, height, width, channels]")
    if len(core) != 4 or packed.out != (3,):
        raise ValueError(
            f"conv: w stands for a tensor {core} with outputs {packed.out}, not for [height, "
            "width, channels, outputs] with the last"
        )
    if groups < 1 or x.shape[3] != core[2] * groups or core[3] % groups:
        raise ValueError(f"conv: {x.shape[3]} channels and groups={groups} for a kernel {core}")
    window = (core[0], core[1])
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(window, dilation, strict=True)]
        padding = jax.lax.padtype_to_pads(x.shape[1:3], reach, strides, padding)
    pads: Pairs = tuple((int(a), int(b)) for a, b in padding)  # type: ignore[assignment]
    sizes = [
        max(0, (n + sum(p) - (k - 1) * d - 1) // s + 1)
        for n, p, k, d, s in zip(x.shape[1:3], pads, window, dilation, strides, strict=True)
    ]
    before = tuple(p[0] for p in pads)
    geometry = (*window, *strides, *before, *dilation, groups)

    def plain(x: Any, w: Any, bias: Any, index: Any) -> jax.Array:
        return reference.conv(
            x,
            one_of(w, index),
            bias,
            strides=strides,
            padding=pads,
            dilation=dilation,
            groups=groups,
            activation=activation,
        )

    def compiled(found: Loaded, x: Any, w: Any, bias: Any, index: Any) -> jax.Array:
        options, operands = prepared(x, w, bias, index, activation)
        return _operation(found, options, geometry, tuple(sizes))(x, *operands)

    return either(plain, compiled, (x, w, bias, index), implementation=implementation, who="conv")


@functools.lru_cache(maxsize=4096)
def _operation(
    found: Loaded, options: Options, geometry: tuple[int, ...], sizes: tuple[int, ...]
) -> Any:
    """Returns the kernel with these options as an operation on arrays."""
    even = options.columns % PANEL == 0 and geometry[-1] == 1

    def run(x: Any, codes: Any, *rest: Any) -> jax.Array:
        n = codes.shape[1] * PANEL if even else options.columns
        shape = jax.ShapeDtypeStruct((x.shape[0], *sizes, n), x.dtype)
        call = jax.ffi.ffi_call(found.target("conv"), shape)
        return call(x, codes, *rest, **options.attributes(), geometry=np.array(geometry, np.int64))

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        x, codes, scale, zero, sums, table, bias, limits, index = operands
        batch, last = axis_of(x, 0), axis_of(codes, 1)
        if not even or codes.shape[1] % count_of(mesh, last) or names_of(last) & names_of(batch):
            last = None
        places = (
            placed(mesh, x, batch, None, None, None),
            placed(mesh, codes, None, last, None, None),
            *(placed(mesh, a, None, last, None, None) for a in (scale, zero, sums)),
            placed(mesh, table, None, None),
            placed(mesh, bias, last),
            placed(mesh, limits, None, None),
            placed(mesh, index),
        )
        return mesh, run, NamedSharding(mesh, PartitionSpec(batch, None, None, last)), places

    result = "(p q)" if even else "n"
    rule = (
        f"m y x k, l p c b, l p g q, d0 d1 d2 d3, e0 e1 e2 e3, f0 f1, h, i0 i1, -> m v u {result}"
    )
    return by_rows(run, rule=rule, partition=partition)
