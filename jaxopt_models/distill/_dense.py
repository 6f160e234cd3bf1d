"""Layers of heads, judges and generators, as functions of plain dictionaries."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_SLOPE = 0.2


def layer(key: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> dict[str, Any]:
    """Returns a kernel from ``inputs`` to ``outputs`` and a bias, for leaky units (He et al.)."""
    scale = math.sqrt(2 / ((1 + _SLOPE**2) * math.prod(inputs)))
    kernel = scale * jax.random.normal(key, inputs + outputs)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def take(params: Any, name: str, who: str, maker: str) -> Any:
    """Returns a part of parameters.

    Raises:
      ValueError: if they have none of that name; it names what makes them.
    """
    if not isinstance(params, Mapping) or name not in params:
        found = sorted(params) if isinstance(params, Mapping) else type(params).__name__
        raise ValueError(
            f"{who}: parameters should have {name!r}, given is {found}; distill.{maker} makes them"
        )
    return params[name]


def products(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Returns those of the last axis, or of a window around each place, with zeros around.

    Args:
      x: `[..., inputs]`, with a window `[B, spatial..., inputs]`.
      kernel: `[*window, inputs, outputs]`.
    """
    kernel, spatial = kernel.astype(x.dtype), kernel.ndim - 2
    if not spatial:
        return x @ kernel
    # Channels last, whatever the number of spatial axes.
    last, axes = spatial + 1, tuple(range(1, spatial + 1))
    numbers = jax.lax.ConvDimensionNumbers(
        (0, last, *axes), (last, spatial, *range(spatial)), (0, last, *axes)
    )
    return jax.lax.conv_general_dilated(
        x, kernel, (1,) * spatial, "SAME", dimension_numbers=numbers
    )


def across(values: jax.Array, x: jax.Array) -> jax.Array:
    """Returns values of channels with the axes of ``x`` before them."""
    return jnp.expand_dims(values.astype(x.dtype), tuple(range(x.ndim - values.ndim)))


def affine(params: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    """Returns products with the kernel, and the bias added."""
    x = products(x, params["kernel"])
    return x + across(params["bias"], x)


def lookup(table: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the rows that labels name; NaN for labels outside."""
    labels = jnp.where(labels >= 0, labels, table.shape[0])
    return jnp.take(table, labels, axis=0, mode="fill", fill_value=jnp.nan)


def leaky(x: jax.Array) -> jax.Array:
    """The nonlinearity of both, with a slope of 0.2 below zero."""
    return jnp.where(x >= 0, x, _SLOPE * x)
