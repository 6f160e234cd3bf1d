"""A small generator of inputs for data-free distillation, as a dictionary of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from .._options import whole
from ._dense import layer, leaky, lookup
from ._reduce import floats, indices


def generator(
    key: jax.Array,
    noise: int,
    shape: Sequence[int],
    *,
    hidden: Sequence[int] = (),
    channels: Sequence[int] = (),
    classes: int | None = None,
) -> dict[str, Any]:
    """Returns the parameters of a generator, for :func:`generated`.

    Dense layers with leaky rectifiers make an input of any shape. With ``channels`` they end in a
    grid of as many channels as the first of them, and for each a nearest-neighbour doubling and a
    3x3 convolution follow, and one last convolution: images `[28, 28, 1]` with ``(128, 64)`` come
    from a grid of 7 x 7, as in DAFL.

    Args:
      key: a random key.
      noise: number of random values for an example.
      shape: that of one input.
      hidden: widths of the dense layers.
      channels: channels of the doubled grids, for a ``shape`` of `[H, W, C]`.
      classes: number of classes, if inputs of given labels are wanted.

    Returns:
      A dictionary of `dense_0`, `dense_1` ..., `grid` and `conv_0`, `conv_1` ... where there are
      channels, and `output`, each with `kernel` and `bias`, and all but the last with `scale`;
      and `classes`, for each the products with its one-hot vector in the first layer.

    Raises:
      TypeError: for widths that are no whole numbers.
      ValueError: for widths below 1, or an image that cannot be halved as often as asked.

    Example:
      >>> import jax
      >>> from jaxopt_models import distill
      >>> params = distill.generator(jax.random.key(0), 16, (28, 28, 1), channels=(8, 4))
      >>> sorted(params), params["grid"]["kernel"].shape
      (['conv_0', 'conv_1', 'grid', 'output'], (16, 7, 7, 8))
      >>> distill.generated(params, jax.random.normal(jax.random.key(1), (5, 16))).shape
      (5, 28, 28, 1)

    References:
      Chen et al., `Data-Free Learning of Student Networks <https://arxiv.org/abs/1904.01186>`_,
      2019; Mirza and Osindero, `Conditional Generative Adversarial Nets
      <https://arxiv.org/abs/1411.1784>`_, 2014
    """
    who = "generator"
    noise = whole(noise, f"{who}: noise", least=1)
    width = noise + (0 if classes is None else whole(classes, f"{who}: classes", least=1))
    shape = tuple(whole(n, f"{who}: shape", least=1) for n in shape)
    channels = tuple(whole(n, f"{who}: channels", least=1) for n in channels)
    halvings = 2 ** len(channels)
    if channels and (len(shape) != 3 or shape[0] % halvings or shape[1] % halvings):
        raise ValueError(
            f"{who}: shape={shape} with channels={channels}; give [H, W, C] with H and W "
            f"divisible by {halvings}, or leave out channels="
        )
    keys = iter(jax.random.split(key, len(hidden) + len(channels) + 2))
    params: dict[str, Any] = {}
    for i, after in enumerate(hidden):
        after = whole(after, f"{who}: hidden", least=1)
        params[f"dense_{i}"] = _scaled(next(keys), (width,), (after,))
        width = after
    if channels:
        grid = (shape[0] // halvings, shape[1] // halvings, channels[0])
        params["grid"] = _scaled(next(keys), (width,), grid)
        for i, (before, after) in enumerate(zip(channels[:1] + channels, channels, strict=False)):
            params[f"conv_{i}"] = _scaled(next(keys), (3, 3, before), (after,))
        params["output"] = layer(next(keys), (3, 3, channels[-1]), shape[2:])
    else:
        params["output"] = layer(next(keys), (width,), shape)
    if classes is not None:
        # What a label joined to the noise as one-hot would add to the first products.
        first = params[_first(params)]
        first["kernel"], params["classes"] = jnp.split(first["kernel"], [noise])
    return params


def generated(
    params: dict[str, Any],
    noise: jax.Array,
    labels: Any = None,
    *,
    norm: Literal["batch", "layer"] | None = "batch",
    output: Callable[[jax.Array], jax.Array] = jnp.tanh,
) -> jax.Array:
    """Returns inputs made from noise.

    Args:
      params: those of :func:`generator`.
      noise: shape `[B, N]`.
      labels: whole numbers, shape `[B]`, for a generator with ``classes``.
      norm: what is brought to mean 0 and variance 1 before each rectifier: ``"batch"``, each
        channel by the statistics of this batch, always; ``"layer"``, each example; or nothing.
      output: brings the last values into the range of inputs, for instance ``jax.nn.sigmoid``.

    Returns:
      Shape `[B, *shape]`; NaN for a label of no class.

    Raises:
      TypeError: for labels that are no whole numbers.
      ValueError: for labels that are missing or too much, another width of the noise, or another
        ``norm``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> params = distill.generator(jax.random.key(0), 4, (10,), hidden=(8,), classes=3)
      >>> noise = jax.random.normal(jax.random.key(1), (2, 4))
      >>> distill.generated(params, noise, jnp.array([0, 2]), output=jax.nn.sigmoid).shape
      (2, 10)
    """
    who = "generated"
    if norm not in ("batch", "layer", None):
        raise ValueError(f"{who}: norm={norm!r} is none of 'batch', 'layer', None")
    x = floats(noise, who, "noise", least=2)
    first = _first(params)
    width = params[first]["kernel"].shape[0]
    if x.shape[1:] != (width,):
        raise ValueError(f"{who}: noise has shape {x.shape}; give (B, {width})")
    if (labels is None) != ("classes" not in params):
        what = "has classes; give" if labels is None else "has no classes; leave out"
        raise ValueError(f"{who}: the generator {what} labels")
    if labels is not None:
        labels = indices(labels, x.shape[:1], who)

    def products(name: str, x: jax.Array) -> jax.Array:
        y = jnp.tensordot(x, params[name]["kernel"], 1)
        return y if labels is None or name != first else y + lookup(params["classes"], labels)

    for i in range(sum(name.startswith("dense_") for name in params)):
        x = _rectified(params[f"dense_{i}"], products(f"dense_{i}", x), norm)
    if "grid" not in params:
        return output(products("output", x) + params["output"]["bias"][None])
    x = _rectified(params["grid"], products("grid", x), norm)
    for i in range(sum(name.startswith("conv_") for name in params)):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        x = _rectified(params[f"conv_{i}"], _convolve(x, params[f"conv_{i}"]["kernel"]), norm)
    x = _convolve(x, params["output"]["kernel"])
    return output(x + _last(params["output"]["bias"], x))


def _first(params: dict[str, Any]) -> str:
    """Returns the name of the layer that reads the noise."""
    return next(name for name in ("dense_0", "grid", "output") if name in params)


def _scaled(key: jax.Array, inputs: tuple[int, ...], outputs: tuple[int, ...]) -> dict[str, Any]:
    """Returns a layer that is normalised: scale and bias are those of its channels."""
    kernel = layer(key, inputs, outputs)["kernel"]
    return {"kernel": kernel, "scale": jnp.ones(outputs[-1]), "bias": jnp.zeros(outputs[-1])}


def _rectified(params: dict[str, Any], x: jax.Array, norm: str | None) -> jax.Array:
    if norm is not None:
        axes = tuple(range(x.ndim - 1)) if norm == "batch" else tuple(range(1, x.ndim))
        x = x - jnp.mean(x, axes, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axes, keepdims=True) + 1e-5)
    return leaky(x * _last(params["scale"], x) + _last(params["bias"], x))


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=layout)


def _last(values: jax.Array, x: jax.Array) -> jax.Array:
    """Returns values of channels with the axes of ``x`` before them."""
    return jnp.expand_dims(values, tuple(range(x.ndim - 1)))
