"""Heads: small layers, trained beside the student, that bring its features to the teacher's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._options import whole
from ._reduce import floats


def projection(
    key: jax.Array, inputs: int, outputs: int, *, window: Sequence[int] = ()
) -> dict[str, jax.Array]:
    """Makes an affine map of the last axis, for :func:`project`.

    Args:
      key: random key.
      inputs: width of the student's features.
      outputs: width of the teacher's.
      window: size of a convolution along each spatial axis, ``(3, 3)`` for images; default: none,
        a dense layer, which is a convolution of size 1.

    Returns:
      ``{"kernel": [*window, inputs, outputs], "bias": [outputs]}``, `float32`, normal with
      variance one over the number of inputs.

    Raises:
      TypeError: for sizes that are no whole numbers.
      ValueError: for sizes below 1.

    Example:
      >>> import jax
      >>> from jaxopt_models import distill
      >>> head = distill.projection(jax.random.key(0), 16, 64)
      >>> {name: x.shape for name, x in head.items()}
      {'kernel': (16, 64), 'bias': (64,)}
    """
    inputs = whole(inputs, "projection: inputs", least=1)
    outputs = whole(outputs, "projection: outputs", least=1)
    window = tuple(whole(size, "projection: window", least=1) for size in window)
    kernel = jax.random.normal(key, (*window, inputs, outputs))
    return {
        "kernel": kernel / math.sqrt(math.prod(window) * inputs),
        "bias": jnp.zeros(outputs),
    }


def translator(
    key: jax.Array, inputs: int, outputs: int, *, window: Sequence[int] = ()
) -> tuple[dict[str, jax.Array], ...]:
    """Makes the head of :func:`factor_transfer`: three layers, each with a leaky ReLU.

    The same from ``factors`` back to features is the second half of the autoencoder that
    makes the teacher's factors.

    Args:
      key: random key.
      inputs: width of the features.
      outputs: number of factors.
      window: as in :func:`projection`; the authors' is ``(3, 3)``.

    Returns:
      Three of :func:`projection`, `inputs -> inputs -> outputs -> outputs`.

    Raises:
      TypeError: for sizes that are no whole numbers.
      ValueError: for sizes below 1.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> head = distill.translator(jax.random.key(0), 16, 8, window=(3, 3))
      >>> distill.project(head, jnp.ones((2, 5, 5, 16))).shape
      (2, 5, 5, 8)
    """
    widths = (inputs, inputs, outputs, outputs)
    keys = jax.random.split(key, 3)
    return tuple(projection(k, widths[i], widths[i + 1], window=window) for i, k in enumerate(keys))


def project(head: Any, x: ArrayLike, *, like: ArrayLike | None = None) -> jax.Array:
    """Applies a head to features: to the last axis, or as a convolution with zeros around.

    Args:
      head: of :func:`projection`, or of :func:`translator`: then a ReLU of slope 0.1 below
        zero follows each layer.
      x: features `[..., inputs]`, with a window `[B, spatial..., inputs]`.
      like: features `[B, spatial..., C]` of the teacher, whose spatial sizes the result is given:
        by averages over areas, which repeat entries where there are too few.

    Returns:
      `[..., outputs]`, `float32` or wider.

    Raises:
      ValueError: if widths or numbers of axes do not fit.
      TypeError: for features that are not floating.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> head = distill.projection(jax.random.key(0), 16, 64)
      >>> distill.project(head, jnp.ones((2, 7, 7, 16))).shape
      (2, 7, 7, 64)
      >>> distill.project(head, jnp.ones((2, 7, 7, 16)), like=jnp.ones((2, 4, 4, 64))).shape
      (2, 4, 4, 64)
    """
    x = floats(x, "project", "x")
    if isinstance(head, Mapping):
        x = _layer(head, x)
    else:
        for layer in head:
            x = jax.nn.leaky_relu(_layer(layer, x), 0.1)
    if like is None:
        return x
    shape = jnp.shape(like)
    if len(shape) != x.ndim:
        raise ValueError(
            f"project: like has shape {shape}, the projection {x.shape}; give as many axes"
        )
    return resize(x, shape[1:-1])


def _layer(layer: Mapping[str, jax.Array], x: jax.Array) -> jax.Array:
    kernel, bias = layer["kernel"], layer["bias"]
    spatial = kernel.ndim - 2
    if x.shape[-1] != kernel.shape[-2] or (spatial and x.ndim != spatial + 2):
        raise ValueError(
            f"project: x has shape {x.shape}, the kernel {kernel.shape}; give "
            f"[B{', spatial' * spatial}, {kernel.shape[-2]}]"
        )
    if spatial:
        # Channels last, whatever the number of spatial axes.
        last, axes = spatial + 1, tuple(range(1, spatial + 1))
        numbers = jax.lax.ConvDimensionNumbers(
            (0, last, *axes), (last, spatial, *range(spatial)), (0, last, *axes)
        )
        x = jax.lax.conv_general_dilated(
            x, kernel.astype(x.dtype), (1,) * spatial, "SAME", dimension_numbers=numbers
        )
    else:
        x = x @ kernel.astype(x.dtype)
    return x + bias.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def resize(x: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """Returns `x` with new sizes of the axes after the first, by averages over areas."""
    for axis, size in enumerate(sizes, 1):
        old = x.shape[axis]
        if size == old:
            continue
        ends = np.arange(size + 1)[:, None] * (old / size)
        cells = np.arange(old)[None]
        shared = np.minimum(ends[1:], cells + 1) - np.maximum(ends[:-1], cells)
        shares = jnp.asarray(np.maximum(shared, 0) * (size / old), x.dtype)
        x = jnp.moveaxis(jnp.tensordot(shares, x, (1, axis)), 0, axis)
    return x
