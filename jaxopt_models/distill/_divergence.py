"""Divergence of distributions that are given by logits, accurate where both are nearly equal."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

#: What masked and infinite logits become: far below all others, and finite when subtracted.
FLOOR = -1e30


def finite(logits: jax.Array) -> jax.Array:
    """Returns logits with ``FLOOR`` in the place of minus infinity."""
    return jnp.maximum(logits, FLOOR)


def log_probabilities(logits: jax.Array, where: Any = None) -> jax.Array:
    """Returns `log softmax` over the last axis, finite also for logits of minus infinity.

    Args:
      logits: shape `[..., V]`.
      where: mask of the classes there are, shape `[..., V]`; the others get about ``FLOOR``.
    """
    logits = finite(logits)
    return jax.nn.log_softmax(logits if where is None else jnp.where(where, logits, FLOOR))


def kl(teacher: jax.Array, student: jax.Array, *, where: Any = None) -> jax.Array:
    """Returns `KL(softmax(teacher) || softmax(student))` over the last axis.

    Args:
      teacher: logits, shape `[..., V]`, in `float32` or wider; minus infinity is allowed.
      student: logits, of the same shape.
      where: mask of the classes there are, shape `[..., V]`; zero where there are none.

    Returns:
      Shape `[...]`.
    """
    if where is not None:
        teacher, student = (jnp.where(where, z, FLOOR) for z in (teacher, student))
    return relative_entropy(*soften(student, teacher))


def pick(log_p: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the entries of `[..., V]` that labels `[...]` name; NaN for labels outside."""
    count = log_p.shape[-1]
    known = jnp.where((labels >= 0) & (labels < count), labels, count)
    picked = jnp.take_along_axis(log_p, known[..., None], axis=-1, mode="fill", fill_value=jnp.nan)
    return picked[..., 0]


def soften(
    student: jax.Array, teacher: jax.Array, temperature: ArrayLike = 1.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns `p_t`, `p_s` and `log p_s - log p_t`, which is exact where both are alike.

    Logits of minus infinity are allowed: probabilities are zero there, and the ratio is finite.
    """
    student, teacher = finite(student), finite(teacher)

    def normalised(z: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        top = jax.lax.stop_gradient(jnp.max(z, axis=-1, keepdims=True, initial=FLOOR))
        e = jnp.exp((z - top) / temperature)
        total = jnp.sum(e, axis=-1, keepdims=True)
        return e / total, top, jnp.log(total)

    p, top_t, log_t = normalised(teacher)
    q, top_s, log_s = normalised(student)
    ratio = ((student - teacher) - (top_s - top_t)) / temperature - (log_s - log_t)
    # At high temperatures the ratios are smaller than the rounding of the two logarithms, which
    # is the same for a whole row: sum(q) - sum(p), zero by definition, shows how much it is.
    near = jnp.abs(ratio) < 1
    excess = jnp.where(near, p * jnp.expm1(jnp.where(near, ratio, 0)), q - p)
    return p, q, ratio - jax.lax.stop_gradient(jnp.sum(excess, axis=-1, keepdims=True))


def relative_entropy(p: jax.Array, q: jax.Array, ratio: jax.Array) -> jax.Array:
    r"""Returns the divergence of `p` from `q` over the last axis, given :math:`\log(q/p)`.

    Since both sum to one it is :math:`\sum_c p_c (e^{r_c} - 1 - r_c)`, whose terms are not
    negative: nothing cancels.
    """
    near = jnp.abs(ratio) < 1
    terms = jnp.where(near, p * _excess(jnp.where(near, ratio, 0)), q - p - p * ratio)
    return jnp.sum(terms, axis=-1)


@jax.custom_jvp
def _excess(x: jax.Array) -> jax.Array:
    """Returns `exp(x) - 1 - x`, with all digits near 0."""
    series = jnp.ones_like(x)
    for k in range(11, 2, -1):
        series = 1 + x / k * series
    return jnp.where(jnp.abs(x) < 0.1, x * x / 2 * series, jnp.expm1(x) - x)


@_excess.defjvp
def _excess_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    (x,), (dx,) = primals, tangents
    return _excess(x), jnp.expm1(x) * dx


@jax.custom_jvp
def to_middle(ratio: jax.Array) -> jax.Array:
    """Returns `log((1 + exp(ratio)) / 2)`, with all digits near 0."""
    return jnp.maximum(ratio, 0) + jnp.log1p(jnp.expm1(-jnp.abs(ratio)) / 2)


@to_middle.defjvp
def _to_middle_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    # Of the maximum and the magnitude the second derivative would be lost at 0.
    (ratio,), (d_ratio,) = primals, tangents
    return to_middle(ratio), jax.nn.sigmoid(ratio) * d_ratio
