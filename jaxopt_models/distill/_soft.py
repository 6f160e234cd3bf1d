"""Soft targets: the student's distribution over classes is drawn to the teacher's."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._options import flag
from ._divergence import relative_entropy, soften, to_middle
from ._reduce import mean, only, pair, positive


def kd(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    temperature: ArrayLike = 4.0,
    divergence: Literal["forward", "reverse", "js"] = "forward",
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    r"""Distance of softened distributions, the knowledge distillation of Hinton et al.

    With :math:`p = \mathrm{softmax}(z / T)` over the last axis, the mean over the others of

    .. math:: T^2 D_{KL}(p_t \| p_s), \quad T^2 D_{KL}(p_s \| p_t) \quad\text{or}\quad
        \tfrac{T^2}{2} \bigl(D_{KL}(p_t \| m) + D_{KL}(p_s \| m)\bigr),
        \; m = \tfrac{p_s + p_t}{2}.

    As `T` grows the first two tend to :math:`\frac{1}{2C} \sum_c (d_c - \bar d)^2`,
    :math:`d = z_s - z_t`, half of ``logit_mse(student, teacher, centred=True)``, and the third
    to a quarter of them. Logarithms of probabilities are never subtracted from one another:
    the value and its gradient keep their digits there, and are zero for equal logits.

    Args:
      student: logits `[..., C]`: of images `[B, C]`, of tokens or frames `[B, T, C]`.
      teacher: logits `[..., C]`. Nothing stops a derivative with respect to them.
      temperature: `T`, positive.
      divergence: ``"forward"``, which covers all that the teacher finds likely;
        ``"reverse"``, which keeps to it; ``"js"``, Jensen-Shannon, which is bounded.
      where: mask of leading axes, what counts.
      weights: non-negative weights of leading axes.

    Returns:
      A number, `float32` or wider.

    Raises:
      ValueError: if the shapes differ, or for options out of range.
      TypeError: for arrays that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[3.0, 0.0]])
      >>> print(f"{distill.kd(student, teacher, temperature=2.0):.3f}")
      0.361
      >>> print(f"{distill.kd(student, teacher, temperature=1e3):.3f}")
      0.500
      >>> float(distill.logit_mse(student, teacher, centred=True)) / 2
      0.5

    References:
      Hinton, Vinyals and Dean, `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015
    """
    check_divergence(divergence, "kd")
    temperature = positive(temperature, "kd", "temperature")
    student, teacher = pair(student, teacher, "kd")
    student, teacher = only(student, where, "kd"), only(teacher, where, "kd")
    p, q, ratio = soften(student, teacher, temperature)
    if divergence == "forward":
        values = relative_entropy(p, q, ratio)
    elif divergence == "reverse":
        values = relative_entropy(q, p, -ratio)
    else:
        middle = (p + q) / 2
        values = relative_entropy(p, middle, to_middle(ratio)) / 2
        values += relative_entropy(q, middle, to_middle(-ratio)) / 2
    return temperature**2 * mean(values, "kd", where=where, weights=weights)


def check_divergence(divergence: str, who: str) -> None:
    """Raises a `ValueError` for a divergence that :func:`kd` has not."""
    if divergence not in ("forward", "reverse", "js"):
        raise ValueError(f"{who}: divergence={divergence!r} is none of 'forward', 'reverse', 'js'")


def logit_mse(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    centred: bool = False,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    r"""Mean square of the differences of logits, :math:`\frac1C \sum_c (z_s - z_t)_c^2`.

    Args:
      student: logits `[..., C]`.
      teacher: logits `[..., C]`.
      centred: whether the mean of each row of differences is taken off first: what is added
        to all logits of a row then does not count, as in a softmax. Twice the limit of
        :func:`kd` at high temperatures.
      where: mask of leading axes, what counts.
      weights: non-negative weights of leading axes.

    Returns:
      A number, `float32` or wider.

    Raises:
      ValueError: if the shapes differ.
      TypeError: for arrays that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student, teacher = jnp.array([[1.0, 0.0]]), jnp.array([[4.0, 1.0]])
      >>> float(distill.logit_mse(student, teacher))
      5.0
      >>> float(distill.logit_mse(student, teacher, centred=True))
      1.0

    References:
      Ba and Caruana, `Do Deep Nets Really Need to be Deep?
      <https://arxiv.org/abs/1312.6184>`_, 2014
    """
    student, teacher = pair(student, teacher, "logit_mse")
    difference = only(student, where, "logit_mse") - only(teacher, where, "logit_mse")
    if flag(centred, "logit_mse: centred"):
        difference -= jnp.mean(difference, axis=-1, keepdims=True)
    values = jnp.mean(difference**2, axis=-1)
    return mean(values, "logit_mse", where=where, weights=weights)
