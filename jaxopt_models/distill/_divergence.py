"""Divergence of distributions that are given by logits, accurate where both are nearly equal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .._options import number

#: What masked and infinite logits become: far below all others, and finite when subtracted.
FLOOR = -1e30


def log_probabilities(logits: jax.Array, where: Any = None) -> jax.Array:
    """Returns `log softmax` over the last axis, finite also for logits of minus infinity.

    Args:
      logits: shape `[..., V]`.
      where: mask of the classes there are, shape `[..., V]`; the others get about ``FLOOR``.
    """
    logits = jnp.maximum(logits, FLOOR)
    return jax.nn.log_softmax(logits if where is None else jnp.where(where, logits, FLOOR))


def kl(teacher: jax.Array, student: jax.Array, *, where: Any = None) -> jax.Array:
    r"""Returns `KL(softmax(teacher) || softmax(student))` over the last axis.

    With :math:`d = \log q - \log p`, and because both sum to one,

    .. math:: \sum_v p_v \log\frac{p_v}{q_v} = \sum_v p_v \left(e^{d_v} - 1 - d_v\right),

    whose terms are never negative: equal logits give zero and a derivative of zero, exactly, and
    nearly equal ones lose nothing to cancellation.

    Args:
      teacher: logits of `p`, shape `[..., V]`, in `float32` or wider.
      student: logits of `q`, of the same shape.
      where: mask of the classes there are, shape `[..., V]`; zero where there are none.

    Returns:
      Shape `[...]`.
    """
    p, q = log_probabilities(teacher, where), log_probabilities(student, where)
    d = q - p
    near = jnp.abs(d) < 1
    small = jnp.where(near, d, 0)
    # Far apart, the exponential of d overflows where p is 0 and q is not.
    terms = jnp.where(
        near,
        jnp.exp(p) * (jnp.expm1(small) - small),
        jnp.exp(q) - jnp.exp(p) - jnp.exp(p) * d,
    )
    return jnp.sum(terms if where is None else jnp.where(where, terms, 0), axis=-1)


def pick(log_p: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the entries of `[..., V]` that labels `[...]` name; NaN for labels outside."""
    count = log_p.shape[-1]
    known = jnp.where((labels >= 0) & (labels < count), labels, count)
    picked = jnp.take_along_axis(log_p, known[..., None], axis=-1, mode="fill", fill_value=jnp.nan)
    return picked[..., 0]


def temperature_of(value: Any, who: str, name: str = "temperature") -> Any:
    """Returns a temperature: a number above 0, or an array, which may be one that is learned.

    Raises:
      TypeError: if it is neither.
      ValueError: if it is a number of 0 or less.
    """
    if isinstance(value, jax.Array):
        return value
    found = number(value, f"{who}: {name}")
    if found <= 0:
        raise ValueError(f"{who}: {name}={found!r} must be above 0")
    return found
