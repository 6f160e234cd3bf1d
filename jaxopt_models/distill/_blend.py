"""Several teachers as one: their mean, or weighted by confidence, by a gate, by presence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._divergence import log_probabilities
from ._labels import cross_entropy
from ._reduce import floats, indices, mask, not_negative, positive


def blend(
    logits: Sequence[Any], *, weights: Any = None, present: Any = None, temperature: Any = 4.0
) -> jax.Array:
    r"""Returns logits whose softmax is the weighted mean of several.

    .. math:: z = T \log \sum_j \frac{w_j}{\sum_i w_i} \mathrm{softmax}(z_j / T)

    To be given to :func:`kd` at the same temperature. Weights are those of :func:`confidence`,
    a softmax of heads that are learned, or of a gate on features; ``present`` leaves out
    teachers whose modality an example lacks.

    Args:
      logits: of `n` teachers, each `[B, ..., C]`.
      weights: non-negative, `[n]` or `[B, n]`; default: equal. Where they are zero for all who
        are there, these count alike.
      present: mask `[B, n]`; nothing of the others matters. At least one teacher should be there
        for each example, otherwise all are.
      temperature: `T`, positive.

    Returns:
      `[B, ..., C]`.

    Raises:
      ValueError: for no teachers, logits, weights or a mask of other shapes, known weights below
        zero, or a temperature that is not positive.
      TypeError: for logits or weights that are not floating, or a mask that is.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> sure, unsure = jnp.array([[20.0, 0.0]]), jnp.array([[0.0, 0.0]])
      >>> z = distill.blend([sure, unsure], temperature=1.0)
      >>> [f"{p:.2f}" for p in jax.nn.softmax(z)[0]]
      ['0.75', '0.25']
    """
    if not len(logits):
        raise ValueError("blend: no logits; give those of at least one teacher")
    parts = _alike(logits, "blend")
    temperature = positive(temperature, "blend", "temperature")
    size, n = parts[0].shape[0], len(parts)
    w = jnp.ones((size, n), parts[0].dtype)
    if weights is not None:
        not_negative(weights, "blend", "weights=")
        weights = floats(weights, "blend", "weights")
        if weights.shape not in ((n,), (size, n)):
            raise ValueError(
                f"blend: weights have shape {weights.shape}; give {(n,)} or {(size, n)}"
            )
        w = jnp.broadcast_to(weights if weights.ndim == 2 else weights[None], (size, n))
    there = mask(present, (size, n), "blend", "present")
    there = there | ~jnp.any(there, axis=1, keepdims=True)
    w = jnp.where(there, w, 0)
    w = jnp.where(jnp.sum(w, axis=1, keepdims=True) == 0, there.astype(w.dtype), w)
    # A teacher of weight zero is far below all others, and still has a derivative of zero.
    least = jnp.finfo(w.dtype).tiny
    log_w = jnp.log(jnp.maximum(w, least)) - jnp.log(
        jnp.maximum(jnp.sum(w, axis=1, keepdims=True), least)
    )

    def rows(x: jax.Array) -> jax.Array:
        return x.reshape(size, *(1,) * (parts[0].ndim - 1))

    mixed = [
        log_probabilities(jnp.where(rows(there[:, j]), z, 0) / temperature) + rows(log_w[:, j])
        for j, z in enumerate(parts)
    ]
    return temperature * jax.nn.logsumexp(jnp.stack(mixed), axis=0)


def confidence(logits: Sequence[Any], labels: Any) -> jax.Array:
    r"""Returns weights of teachers by how well they know each example.

    .. math:: w_j = \frac{1}{n - 1} \Big( 1 - \frac{e^{c_j}}{\sum_i e^{c_i}} \Big), \qquad
       c_j = \mathrm{CE}(y, z_j)

    so that the weights of an example sum to one, and the teacher with the largest cross entropy
    has least.

    Args:
      logits: of `n` teachers, each `[B, C]`.
      labels: whole numbers `[B]`; one that names no class makes the weights of its example NaN.

    Returns:
      `[B, n]`, for :func:`blend`.

    Raises:
      ValueError: for fewer than two teachers, or logits or labels of other shapes.
      TypeError: for logits that are not floating, or labels that are no whole numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> right, wrong = jnp.array([[9.0, 0.0]]), jnp.array([[0.0, 9.0]])
      >>> [f"{w:.2f}" for w in distill.confidence([right, wrong], jnp.array([0]))[0]]
      ['1.00', '0.00']

    References:
      Zhang, Chen and Wang, `Confidence-Aware Multi-Teacher Knowledge Distillation
      <https://arxiv.org/abs/2201.00007>`_, 2022
    """
    if len(logits) < 2:
        raise ValueError(f"confidence: {len(logits)} teachers; give at least two")
    parts = _alike(logits, "confidence")
    if parts[0].ndim != 2:
        raise ValueError(f"confidence: logits have shape {parts[0].shape}; give [B, C]")
    labels = indices(labels, parts[0].shape[:1], "confidence")
    costs = jnp.stack(
        [jax.vmap(lambda z, y: cross_entropy(z[None], y[None]))(z, labels) for z in parts], axis=1
    )
    return (1 - jax.nn.softmax(costs, axis=1)) / (len(parts) - 1)


def _alike(logits: Sequence[Any], who: str) -> list[jax.Array]:
    """Returns the logits of teachers, `[B, ..., C]`, all of one shape."""
    parts = [floats(z, who, f"logits {j}", least=2) for j, z in enumerate(logits)]
    if len({z.shape for z in parts}) > 1:
        raise ValueError(f"{who}: logits have shapes {[z.shape for z in parts]}; give equal ones")
    return parts
