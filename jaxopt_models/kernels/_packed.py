"""What products and convolutions with packed codes hand to their kernels."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._activations import ACTIVATIONS
from .._encoded import is_encoded
from ..quant import WithInput
from ..quant._with_input import grid
from ._layout import Layer, Packed

_MODES = ("float", "row", "pair", "static")


@dataclasses.dataclass(frozen=True)
class Options:
    """What of a call is no array.

    Args:
      columns: number of outputs.
      bits: width of a code.
      mode: how inputs are rounded: not, symmetric or not by each row, or by a grid that is given.
      input_bits: width of an input.
      symmetric: whether its grid is.
      activation: a key of :data:`ACTIVATIONS`.
      dtype: type of the inputs and the result.
    """

    columns: int
    bits: int
    mode: str
    input_bits: int
    symmetric: bool
    activation: str
    dtype: str

    @property
    def whole(self) -> bool:
        """Whether an input cannot be rounded in parts, or its parts not be put together."""
        return self.mode in ("row", "pair") or not self.symmetric

    def attributes(self) -> dict[str, np.int64]:
        """Returns them as the kernels take them."""
        return {
            "bits": np.int64(self.bits),
            "inputs": np.int64(_MODES.index(self.mode)),
            "input_bits": np.int64(self.input_bits),
            "symmetric": np.int64(self.symmetric),
            "activation": np.int64(list(ACTIVATIONS).index(self.activation)),
        }


def codes_of(w: Any) -> Any:
    """Returns the leaf of the codes, without what is around it."""
    return w.values if isinstance(w, WithInput) else w


def check_operands(
    x: jax.Array, w: Any, bias: Any, activation: str, index: Any, who: str
) -> Packed:
    """Raises unless the operands of a kernel are of the right kind; returns the codes."""
    packed = codes_of(w)
    if not isinstance(packed, Packed):
        kind = w.kind() if is_encoded(w) else type(w).__name__
        raise TypeError(f"{who}: w is {kind}; lay it out with jaxopt_models.pack(tree)")
    check_call(x, packed.matrix.columns, bias, activation, who)
    if len(packed.stack) != (index is not None):
        raise ValueError(f"{who}: w has stack axes {packed.stack}; give index= for just one")
    return packed


def check_call(x: jax.Array, columns: int, bias: Any, activation: str, who: str) -> None:
    """Raises unless what goes with a weight of so many outputs is of the right kind."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise TypeError(f"{who}: x is {x.dtype}; give float32 or bfloat16")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"{who}: bias has shape {bias.shape}, not ({columns},)")
    if activation not in ACTIVATIONS:
        raise ValueError(f"{who}: activation={activation!r} is none of {', '.join(ACTIVATIONS)}")


def one_of(w: Any, index: Any) -> Any:
    """Returns one tensor of a stack, or the leaf where there is none."""
    if index is None:
        return w
    return jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, index, keepdims=False), w)


def prepared(
    x: jax.Array, w: Any, bias: Any, index: Any, activation: str
) -> tuple[Options, list[jax.Array]]:
    """Returns the options of a call, and the operands after the input in the kernels' order.

    Those that are left out have no entries.
    """
    packed = codes_of(w)

    def layers(a: jax.Array) -> jax.Array:
        return a if packed.stack else a[None]

    none = jnp.zeros((0, 0, 0, 0), jnp.float32)
    one = isinstance(packed, Layer)
    codes = packed.codes if one else layers(packed.codes)
    scale = layers(packed.scale)
    zero = none if packed.zero is None else layers(packed.zero)
    mode, bits, symmetric, limits, sums = "float", 8, True, jnp.zeros((0, 2), jnp.float32), none
    if isinstance(w, WithInput):
        bits, symmetric = w.bits, w.symmetric
        mode = ("row" if symmetric else "pair") if w.per == "row" else "static"
        if mode == "static":
            scales, zeros = (w.scale, w.zero_point) if w.scale is not None else _whole(x, w)
            given = (scales, jnp.zeros_like(scales) if zeros is None else zeros)
            limits = jnp.stack([jnp.reshape(a, -1) for a in given], axis=1).astype(jnp.float32)
        if not symmetric:
            sums = layers(packed.sums)
    table = jnp.zeros((0, 16), jnp.float32) if packed.table is None else layers(packed.table)
    bias = jnp.zeros((0,), jnp.float32) if bias is None else bias.astype(jnp.float32)
    options = Options(
        packed.matrix.columns, packed.bits, mode, bits, symmetric, activation, str(x.dtype)
    )
    index = packed.index if one else 0 if index is None else index
    return options, [codes, scale, zero, sums, table, bias, limits, jnp.asarray(index, jnp.int32)]


def _whole(x: jax.Array, w: WithInput) -> tuple[jax.Array, jax.Array | None]:
    """Returns the grid of a whole input."""
    wide = x.astype(jnp.float32)
    return grid(jnp.min(wide, initial=0), jnp.max(wide, initial=0), w.bits, w.symmetric)
