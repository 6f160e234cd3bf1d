"""Convolutions with quantized weights as we and JAX compute them, made where they are timed."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

import jaxopt_models as jom
from jaxopt_models import quant
from jaxopt_models.kernels.conv.shapes import Shape

from ._contest import Run


def _operands(shape: Shape, batch: int) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, shape.size, shape.size, shape.channels), np.float32)
    kernel = (shape.window, shape.window, shape.channels // shape.groups, shape.outputs)
    return jnp.asarray(x), jnp.asarray(rng.standard_normal(kernel, np.float32))


def _conv(shape: Shape, w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x,
        w,
        (shape.stride, shape.stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=shape.groups,
    )


def dense(shape: Shape, batch: int) -> Run:
    """JAX on float32."""
    x, w = _operands(shape, batch)
    run = jax.jit(lambda w, x: _conv(shape, w, x))
    return lambda: run(w, x).block_until_ready()


def _compressed(shape: Shape, batch: int, encoder: jom.Encoder) -> Run:
    x, w = _operands(shape, batch)
    small = jom.pack(encoder(w), target="cpu")
    run = jax.jit(jom.accelerate(lambda w, x: _conv(shape, w, x)))
    return lambda: run(small, x).block_until_ready()


def ours(shape: Shape, batch: int) -> Run:
    """The kernels on integers, inputs rounded by their whole."""
    return _compressed(shape, batch, jom.chain(quant.Int(bits=8), quant.Input(bits=8)))


def ours_binary(shape: Shape, batch: int) -> Run:
    """The kernels on signs, packing those of the input included."""
    return _compressed(shape, batch, quant.XNOR())
