"""What convolutions with packed codes are, in plain JAX: the definition, and the derivative."""

from __future__ import annotations

from typing import Any

import jax

from ..._activations import ACTIVATIONS


def conv(
    x: jax.Array,
    w: Any,
    bias: jax.Array | None,
    *,
    strides: tuple[int, int],
    padding: tuple[tuple[int, int], tuple[int, int]],
    dilation: tuple[int, int],
    groups: int,
    activation: str,
) -> jax.Array:
    """Rebuilds the weight and convolves; an input is rounded as the leaf says.

    Args:
      x: images `[batch, height, width, channels]`.
      w: a leaf of one core tensor.
      bias: `[outputs]` or ``None``.
      strides: steps of the window.
      padding: zeros before and after each axis.
      dilation: distance of the entries of the window.
      groups: number of groups of channels.
      activation: ``"none"``, ``"relu"`` and so on.

    Returns:
      `[batch, height, width, outputs]`, the type of ``x``.
    """
    y = jax.lax.conv_general_dilated(
        w.read(x, (1, 2, 3), ()),
        w.materialize().astype(x.dtype),
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    if bias is not None:
        y = y + bias.astype(y.dtype).reshape(1, 1, 1, -1)
    return ACTIVATIONS[activation](y)
