"""Labels: cross-entropy, teachers made of labels alone, and classes that labels lack."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._options import portion, whole
from ._reduce import counts, floats, indices, inside, mean, only


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
    logits = only(floats(logits, "cross_entropy", "logits"), where, "cross_entropy")
    labels = jnp.asarray(labels)
    chances = jax.nn.log_softmax(logits)
    numbers = jnp.issubdtype(labels.dtype, jnp.integer)
    if not numbers and not jnp.issubdtype(labels.dtype, jnp.floating):
        raise TypeError(
            f"cross_entropy: labels is {labels.dtype}; give whole numbers [...], or floats [..., C]"
        )
    if labels.shape != (logits.shape[:-1] if numbers else logits.shape):
        raise ValueError(
            f"cross_entropy: logits has shape {logits.shape}, labels {labels.shape} and is "
            f"{labels.dtype}; give whole numbers {logits.shape[:-1]}, or floats {logits.shape}"
        )
    if numbers:
        values = -_picked(chances, labels)
    else:
        values = -jnp.sum(only(labels, where, "cross_entropy") * chances, axis=-1)
    if smoothing:
        values = (1 - smoothing) * values - smoothing * jnp.mean(chances, axis=-1)
    return mean(values, "cross_entropy", where=where, weights=weights)


def _picked(x: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the entries of the last axis that labels name; NaN for labels outside."""
    valid, labels = inside(labels, x.shape[-1])
    found = jnp.take_along_axis(x, labels[..., None], axis=-1)[..., 0]
    return jnp.where(valid, found, jnp.nan)


def virtual_teacher(labels: ArrayLike, classes: int, *, confidence: float = 0.99) -> jax.Array:
    r"""Logits of a teacher made by hand, which is right with a fixed confidence.

    .. math:: z_y = \log a, \qquad z_c = \log \frac{1 - a}{C - 1} \; (c \ne y)

    Given to :func:`kd`, at a high temperature, it is the teacher-free distillation of
    Yuan et al.: a regulariser close to smoothed labels, which needs no network. (Their code
    softens the probabilities themselves; here, as for any teacher, it is their logarithms.)

    Args:
      labels: whole numbers `[...]`; one outside `[0, C)` gives NaN.
      classes: `C`, at least 2.
      confidence: `a`, the probability of the label, in (0, 1).

    Returns:
      Logits `float32` `[..., C]`.

    Raises:
      ValueError: for options out of range.
      TypeError: for labels that are no whole numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> teacher = distill.virtual_teacher(jnp.array([1]), 3, confidence=0.9)
      >>> [f"{p:.2f}" for p in jax.nn.softmax(teacher)[0]]
      ['0.05', '0.90', '0.05']
      >>> print(f"{distill.kd(jnp.zeros((1, 3)), teacher, temperature=20.0):.3f}")
      0.956

    References:
      Yuan et al., `Revisiting Knowledge Distillation via Label Smoothing Regularization
      <https://arxiv.org/abs/1909.11723>`_, 2020
    """
    labels = jnp.asarray(labels)
    labels = indices(labels, labels.shape, "virtual_teacher")
    classes = whole(classes, "virtual_teacher: classes", least=2)
    confidence = portion(confidence, "virtual_teacher: confidence")
    if not confidence:
        raise ValueError("virtual_teacher: confidence=0.0 must be positive")
    valid, labels = inside(labels, classes)
    right = jax.nn.one_hot(labels, classes, dtype=bool)
    logits = jnp.where(right, math.log(confidence), math.log((1 - confidence) / (classes - 1)))
    return jnp.where(valid[..., None], logits, jnp.nan).astype(jnp.float32)


def bias_correction(
    logits: ArrayLike,
    prior: ArrayLike,
    *,
    where: ArrayLike | None = None,
    steps: int = 300,
) -> jax.Array:
    r"""Offsets of classes that give the mean prediction a wanted distribution.

    A student that was taught on data without some class finds it too rarely afterwards. As
    Hinton et al. saw, it knows the class nevertheless; only its bias is too small. From unlabelled
    data and the frequencies :math:`\pi` that classes should have there, this returns the `b` with

    .. math:: \mathrm{mean}_i \, \mathrm{softmax}(z_i + b) = \pi, \qquad
        \textstyle\sum_c b_c = 0.

    Add it to the logits, ``student + b``, or to the bias of the last layer.

    It is the maximum of the concave :math:`\pi^\top b - \mathrm{mean}_i \log \sum_c e^{z_{ic} +
    b_c}`, found by Newton's method with steps :math:`\log(1 + r) / r` times as long, `r` the range
    of the entries of a step, which rise from any start. No derivative passes.

    Args:
      logits: `[..., C]`, of examples like those of later use.
      prior: :math:`\pi`, a distribution `[C]`. A class of probability 0 is pushed down until its
        mean is below `1e-6`.
      where: mask of leading axes, what counts.
      steps: most steps. It stops as soon as means differ from the prior by at most `1e-6`, which
        takes 5 to 30 for ordinary logits. Each costs `[C, C]` memory and a solve.

    Returns:
      Offsets `[C]`, with mean zero. Where they are not found, within `1e-5`, it raises, or gives
      NaN under a transformation.

    Raises:
      ValueError: if the prior is no distribution over the classes, or it is not reached.
      TypeError: for arrays that are not floating.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> logits = jnp.array([[3.0, 0.0], [2.0, -1.0], [1.0, 0.0], [1.0, 2.0]])
      >>> b = distill.bias_correction(logits, jnp.array([0.5, 0.5]))
      >>> [f"{x:.2f}" for x in b]
      ['-0.82', '0.82']
      >>> [f"{x:.3f}" for x in jnp.mean(jax.nn.softmax(logits + b), axis=0)]
      ['0.500', '0.500']

    References:
      Hinton, Vinyals and Dean, `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015

      Sun and Tran-Dinh, `Generalized Self-Concordant Functions: A Recipe for Newton-Type Methods
      <https://arxiv.org/abs/1703.04599>`_, 2019 (the length of steps)
    """
    logits = floats(logits, "bias_correction", "logits", least=2)
    prior = floats(prior, "bias_correction", "prior")
    steps = whole(steps, "bias_correction: steps", least=1)
    classes = logits.shape[-1]
    if prior.shape != (classes,):
        raise ValueError(
            f"bias_correction: prior has shape {prior.shape}, logits {logits.shape}; give one "
            f"probability a class, ({classes},)"
        )
    if not isinstance(prior, jax.core.Tracer):
        # In NumPy: under a transformation what JAX makes of known numbers is not known.
        known = np.asarray(prior)
        if np.any(known < 0) or abs(np.sum(known) - 1) > 1e-5:
            raise ValueError(
                f"bias_correction: prior sums to {np.sum(known):g}, its least entry is "
                f"{np.min(known):g}; give probabilities"
            )
    logits = jax.lax.stop_gradient(only(logits, where, "bias_correction"))
    prior = jax.lax.stop_gradient(prior / jnp.sum(prior))
    share = counts(logits[..., 0], "bias_correction", where=where).reshape(-1, 1)
    share = share / jnp.sum(share)
    offsets, error = _balance(logits.reshape(-1, classes), share, prior, steps)
    reached = error <= 1e-5
    if not isinstance(error, jax.core.Tracer) and not reached:
        raise ValueError(
            f"bias_correction: after {steps} steps a mean is {float(error):.1e} off its prior; "
            "raise steps=, or check the logits and where="
        )
    return jnp.where(reached, offsets, jnp.nan)


def _balance(
    logits: jax.Array, share: jax.Array, prior: jax.Array, steps: int
) -> tuple[jax.Array, jax.Array]:
    """Returns offsets and by how much the mean is still off."""
    eye = jnp.eye(len(prior), dtype=logits.dtype)

    def predict(offsets: jax.Array) -> tuple[jax.Array, jax.Array]:
        p = jax.nn.softmax(logits + offsets[None])
        return p, prior - jnp.sum(share * p, axis=0)

    def step(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        offsets, p, off, count = carry
        # p (1 - p) from the products with others: where p is 1 the difference has no digits.
        ties = ((share * p).T @ p) * (1 - eye)
        curvature = jnp.diag(jnp.sum(ties, axis=1)) - ties
        # Flat along equal offsets, which change nothing.
        size = jnp.max(jnp.diag(curvature))
        move = jnp.linalg.solve(curvature + size * (1e-6 * eye + 1 / len(prior)), off)
        span = jnp.max(move) - jnp.min(move)
        offsets = offsets + move * jnp.where(span > 0, jnp.log1p(span) / span, 1)
        offsets = offsets - jnp.mean(offsets)
        return offsets, *predict(offsets), count + 1

    def unfinished(carry: tuple[jax.Array, ...]) -> jax.Array:
        return (jnp.max(jnp.abs(carry[2])) > 1e-6) & (carry[3] < steps)

    start = jnp.zeros_like(prior)
    offsets, _, off, _ = jax.lax.while_loop(unfinished, step, (start, *predict(start), 0))
    return offsets, jnp.max(jnp.abs(off))
