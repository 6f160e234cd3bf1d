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


def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Applies a layer to `[B, N]`; its outputs may have several axes."""
    kernel, bias = params["kernel"], params["bias"]
    return jnp.tensordot(x, kernel, 1) + bias[None]


def leaky(x: jax.Array) -> jax.Array:
    """The nonlinearity of both, with a slope of 0.2 below zero."""
    return jnp.where(x >= 0, x, _SLOPE * x)
