"""What all losses share: checks of their arrays, and means over what counts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._options import number


def floats(x: Any, who: str, name: str, *, least: int = 1) -> jax.Array:
    """Returns an array in `float32` or wider.

    Raises:
      TypeError: if it is not floating.
      ValueError: if it has fewer axes than ``least``.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{who}: {name} is {x.dtype}; give an array of floats")
    if x.ndim < least:
        raise ValueError(
            f"{who}: {name} has shape {x.shape}; give at least {least} axes, the batch first"
        )
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def pair(
    student: Any,
    teacher: Any,
    who: str,
    *,
    least: int = 1,
    names: tuple[str, str] = ("student", "teacher"),
) -> tuple[jax.Array, jax.Array]:
    """Returns two arrays of one shape in `float32` or wider.

    Raises:
      TypeError: if one of them is not floating.
      ValueError: if their shapes differ, or they have fewer axes than ``least``.
    """
    a = floats(student, who, names[0], least=least)
    b = floats(teacher, who, names[1], least=least)
    if a.shape != b.shape:
        raise ValueError(
            f"{who}: {names[0]} has shape {a.shape}, {names[1]} {b.shape}; they must be equal "
            "(of other widths, project one of them first: distill.project)"
        )
    return a, b


def indices(labels: Any, shape: Sequence[int], who: str, name: str = "labels") -> jax.Array:
    """Returns whole numbers of a given shape.

    Raises:
      TypeError: if they are no whole numbers.
      ValueError: if their shape is another.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"{who}: {name} is {labels.dtype}; give whole numbers")
    if labels.shape != tuple(shape):
        raise ValueError(f"{who}: {name} has shape {labels.shape}; give {tuple(shape)}")
    return labels


def mask(where: Any, shape: Sequence[int], who: str, name: str = "where") -> jax.Array:
    """Returns booleans of a given shape; all true for `None`.

    Raises:
      TypeError: if a mask is neither boolean nor of whole numbers.
      ValueError: if its shape is another.
    """
    if where is None:
        return jnp.ones(tuple(shape), bool)
    where = _truths(where, who, name)
    if where.shape != tuple(shape):
        raise ValueError(f"{who}: {name}= has shape {where.shape}; give {tuple(shape)}")
    return where


def only(x: jax.Array, where: Any, who: str) -> jax.Array:
    """Returns an array with zeros where a mask of its leading axes is false, if there is one.

    What a loss computes from NaN of padding hands NaN to derivatives, masked later or not.
    """
    if where is None:
        return x
    return jnp.where(_leading(_truths(where, who, "where"), x, who, "where"), x, 0)


def mean(values: jax.Array, who: str, *, where: Any = None, weights: Any = None) -> jax.Array:
    r"""Returns `sum(m w v) / sum(m w)` over all entries; 0 where nothing counts.

    Args:
      values: an array of losses, the batch first.
      who: the function that asks, for messages.
      where: the mask `m` of what counts, of the leading axes of ``values``: one entry an
        example is enough for losses of tokens. Values outside have no derivative, NaN included.
      weights: non-negative weights `w`, of leading axes as well; those outside of the mask do
        not matter. Values of weight zero do not either, but only a mask, by :func:`only`,
        protects derivatives from the NaN that values were computed from.

    Raises:
      ValueError: if a mask or weights are not of leading axes, or known weights negative.
      TypeError: if a mask is neither boolean nor of whole numbers.
    """
    if where is None and weights is None:
        return jnp.mean(values) if values.size else jnp.zeros((), values.dtype)
    scale = counts(values, who, where=where, weights=weights)
    # A product with zero would keep NaN, and hand it to the derivative.
    values = jnp.where(scale > 0, values, 0)
    total = jnp.sum(scale)
    return jnp.sum(scale * values) / jnp.where(total > 0, total, 1)


def counts(values: jax.Array, who: str, *, where: Any = None, weights: Any = None) -> jax.Array:
    """Returns how much each entry counts: `m w` of :func:`mean`, in the shape of ``values``."""
    scale = jnp.ones(values.shape, values.dtype)
    if weights is not None:
        not_negative(weights, who, "weights=")
        scale = scale * _leading(jnp.asarray(weights, values.dtype), values, who, "weights")
    return only(scale, where, who)


def channel_means(x: jax.Array, who: str, *, where: Any = None, weights: Any = None) -> jax.Array:
    """Returns the means of `[..., C]` over all axes but the last, as :func:`mean` takes them."""
    return jax.vmap(lambda v: mean(v, who, where=where, weights=weights), in_axes=-1)(x)


def _truths(where: Any, who: str, name: str) -> jax.Array:
    where = jnp.asarray(where)
    if where.dtype != bool and not jnp.issubdtype(where.dtype, jnp.integer):
        raise TypeError(f"{who}: {name}= is {where.dtype}; give booleans, or 0 and 1")
    return where != 0


def _leading(x: jax.Array, values: jax.Array, who: str, name: str) -> jax.Array:
    if x.shape != values.shape[: x.ndim]:
        raise ValueError(
            f"{who}: {name}= has shape {x.shape}; give one of the leading axes of {values.shape}"
        )
    return jnp.broadcast_to(x.reshape(x.shape + (1,) * (values.ndim - x.ndim)), values.shape)


def rows(x: jax.Array) -> jax.Array:
    """Returns `[B, ...]` as `[B, D]`."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def magnitude(x: jax.Array) -> jax.Array:
    """Returns `|x|` with a derivative of zero at zero, where that of `jnp.abs` is one."""
    return x * jnp.sign(x)


def unit(x: jax.Array, axis: int = -1) -> jax.Array:
    """Returns vectors of length one; zero ones stay zero and have derivative zero."""
    x = scaled(x, axis)
    square = jnp.sum(x * x, axis=axis, keepdims=True)
    # Of all that is not zero the largest entry is one now.
    zero = square < 0.5
    return jnp.where(zero, 0, x * jax.lax.rsqrt(jnp.where(zero, 1, square)))


def scaled(x: jax.Array, axis: int | Sequence[int] | None = None) -> jax.Array:
    """Returns `x` over its largest magnitude, a constant to derivatives.

    For what does not depend on the scale of `x`: powers of small entries do not vanish then.
    Below 1e-30 derivatives would soon be infinite, and it stays as it is.
    """
    top = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=axis, keepdims=True, initial=0))
    return x / jnp.where(top > 1e-30, top, 1)


def inside(labels: jax.Array, classes: int) -> tuple[jax.Array, jax.Array]:
    """Says which labels name a class, and returns them with 0 in the place of others."""
    valid = (labels >= 0) & (labels < classes)
    return valid, jnp.where(valid, labels, 0)


def known(x: Any) -> np.ndarray | None:
    """Returns the numbers of an array, or `None` where they are not known while tracing."""
    for leaf in jax.tree.leaves(x):
        if isinstance(leaf, jax.core.Tracer) or not getattr(leaf, "is_fully_addressable", True):
            return None
    # In NumPy: under a transformation what JAX makes of known numbers is not known.
    return np.asarray(x)


def not_negative(x: Any, who: str, name: str) -> None:
    """Checks weights, where they are known.

    Raises:
      ValueError: if one is negative.
    """
    found = known(x)
    if found is not None and np.any(found < 0):
        raise ValueError(f"{who}: {name} has entries down to {np.min(found):g}; give none below 0")


def positive(value: Any, who: str, name: str, *, zero: bool = False) -> Any:
    """Returns a positive number, or array without axes: scheduled or learned.

    Args:
      value: the number; an array is checked where it is known.
      who: the function that asks, for messages.
      name: the option.
      zero: whether it may be zero.

    Raises:
      TypeError: if it is no number.
      ValueError: if it is not positive, or has axes.
    """
    if getattr(value, "ndim", 0):
        raise ValueError(f"{who}: {name} has shape {value.shape}; give one number")
    if isinstance(value, jax.Array):
        found = known(value)
        if found is None:
            return value
    else:
        value = found = number(value, f"{who}: {name}")
    if not (found > 0 or (zero and found == 0)):
        what = "must not be negative" if zero else "must be positive"
        raise ValueError(f"{who}: {name}={float(found)!r} {what}")
    return value
