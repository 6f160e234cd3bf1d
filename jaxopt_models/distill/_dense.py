"""Layers of the reference judges and generators, as functions of plain dictionaries."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

_SLOPE = 0.2


def layer(key: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> dict[str, Any]:
    """Returns a kernel from ``inputs`` to ``outputs`` and a bias, for leaky units (He et al.)."""
    scale = math.sqrt(2 / ((1 + _SLOPE**2) * math.prod(inputs)))
    kernel = scale * jax.random.normal(key, inputs + outputs)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def lookup(table: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the rows that labels name; NaN for labels outside."""
    labels = jnp.where(labels >= 0, labels, table.shape[0])
    return jnp.take(table, labels, axis=0, mode="fill", fill_value=jnp.nan)


def leaky(x: jax.Array) -> jax.Array:
    """The nonlinearity of both, with a slope of 0.2 below zero."""
    return jnp.where(x >= 0, x, _SLOPE * x)
