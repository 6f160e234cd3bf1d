"""Labels: cross-entropy, teachers made of labels alone, and classes that labels lack."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._options import portion
from ._reduce import blank, floats, mean


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    smoothing: float = 0.0,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    r"""Cross-entropy of logits and labels, classes or distributions.

    .. math:: -\sum_c \bigl((1 - \varepsilon) y_c + \tfrac{\varepsilon}{C}\bigr)
        \log \mathrm{softmax}(z)_c

    Args:
      logits: `[..., C]`.
      labels: whole numbers `[...]`, or distributions `[..., C]`. A number outside `[0, C)` makes
        the loss NaN, unless ``where`` leaves it out.
      smoothing: share :math:`\varepsilon` of the uniform distribution in the labels.
      where: mask of leading axes, what counts.
      weights: non-negative weights of leading axes.

    Returns:
      A number, `float32` or wider.

    Raises:
      ValueError: if the shape of the labels does not fit, or for options out of range.
      TypeError: for logits that are not floating, or labels that are neither.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> logits = jnp.array([[2.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
      >>> print(f"{distill.cross_entropy(logits, jnp.array([0, 1])):.3f}")
      0.895
      >>> print(f"{distill.cross_entropy(logits, jnp.array([0, 1]), smoothing=0.1):.3f}")
      0.945

    References:
      Szegedy et al., `Rethinking the Inception Architecture for Computer Vision
      <https://arxiv.org/abs/1512.00567>`_, 2016
    """
    smoothing = portion(smoothing, "cross_entropy: smoothing")
    logits = blank(floats(logits, "cross_entropy", "logits"), where, "cross_entropy")
    labels = jnp.asarray(labels)
    chances = jax.nn.log_softmax(logits)
    whole = jnp.issubdtype(labels.dtype, jnp.integer)
    if not whole and not jnp.issubdtype(labels.dtype, jnp.floating):
        raise TypeError(
            f"cross_entropy: labels is {labels.dtype}; give whole numbers [...], or floats [..., C]"
        )
    if labels.shape != (logits.shape[:-1] if whole else logits.shape):
        raise ValueError(
            f"cross_entropy: logits has shape {logits.shape}, labels {labels.shape} and is "
            f"{labels.dtype}; give whole numbers {logits.shape[:-1]}, or floats {logits.shape}"
        )
    if whole:
        values = -picked(chances, labels)
    else:
        values = -jnp.sum(blank(labels, where, "cross_entropy") * chances, axis=-1)
    if smoothing:
        values = (1 - smoothing) * values - smoothing * jnp.mean(chances, axis=-1)
    return mean(values, "cross_entropy", where=where, weights=weights)


def picked(x: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the entries of the last axis that labels name; NaN for labels outside."""
    inside = (labels >= 0) & (labels < x.shape[-1])
    found = jnp.take_along_axis(x, jnp.where(inside, labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(inside, found, jnp.nan)
