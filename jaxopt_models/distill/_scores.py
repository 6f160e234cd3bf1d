"""Adversarial distillation: a judge tells what teacher and student give for the same inputs.

The judge learns by :func:`judge_loss`, the student by :func:`fool_loss` beside its other losses,
in turns. Scores are real numbers, high for what is taken for the teacher's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from ._reduce import floats, mean, only, rows

Kind = Literal["logistic", "hinge", "squares"]


def judge_loss(
    real: jax.Array,
    fake: jax.Array,
    *,
    kind: Kind = "logistic",
    where: Any = None,
    weights: Any = None,
) -> jax.Array:
    r"""What a judge minimises, of its scores `r` for the teacher's and `f` for the student's.

    ============  ==================================================================
    kind          loss
    ============  ==================================================================
    `logistic`    :math:`\mathrm{mean}\log(1 + e^{-r}) + \mathrm{mean}\log(1 + e^f)`
    `hinge`       :math:`\mathrm{mean}\max(0, 1 - r) + \mathrm{mean}\max(0, 1 + f)`
    `squares`     :math:`\tfrac12 \mathrm{mean}(r - 1)^2 + \tfrac12 \mathrm{mean} f^2`
    ============  ==================================================================

    Args:
      real: scores of the teacher's, shape `[B, ...]`.
      fake: scores of the student's, shape `[B', ...]`; of the same shape if there is a mask.
      kind: the loss, as above.
      where: mask of leading axes, of both.
      weights: of leading axes, of both.

    Returns:
      A scalar; it is least when the judge is always right.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for another kind.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> real, fake = jnp.array([2.0, 0.5]), jnp.array([-3.0, 1.0])
      >>> [float(distill.judge_loss(real, fake, kind=k)) for k in ("hinge", "squares")]
      [1.25, 2.8125]

    References:
      Goodfellow et al., `Generative Adversarial Networks <https://arxiv.org/abs/1406.2661>`_,
      2014; Lim and Ye, `Geometric GAN <https://arxiv.org/abs/1705.02894>`_, 2017; Mao et al.,
      `Least Squares Generative Adversarial Networks <https://arxiv.org/abs/1611.04076>`_, 2016
    """
    who = "judge_loss"
    real, fake = floats(real, who, "real"), floats(fake, who, "fake")
    real, fake = only(real, where, who), only(fake, where, who)
    if _kind(kind, who) == "logistic":
        losses = jax.nn.softplus(-real), jax.nn.softplus(fake)
    elif kind == "hinge":
        losses = jax.nn.relu(1 - real), jax.nn.relu(1 + fake)
    else:
        losses = jnp.square(real - 1) / 2, jnp.square(fake) / 2
    return sum(mean(x, who, where=where, weights=weights) for x in losses)


def fool_loss(
    fake: jax.Array, *, kind: Kind = "logistic", where: Any = None, weights: Any = None
) -> jax.Array:
    r"""What a student or a generator minimises, of the scores `f` that the judge gives it.

    ============  =============================================
    kind          loss
    ============  =============================================
    `logistic`    :math:`\mathrm{mean}\log(1 + e^{-f})`
    `hinge`       :math:`-\mathrm{mean} f`
    `squares`     :math:`\tfrac12 \mathrm{mean}(f - 1)^2`
    ============  =============================================

    The first is the form that does not saturate: a student that is always found out still learns.

    Args:
      fake: scores of the student's, shape `[B, ...]`.
      kind: that of :func:`judge_loss`.
      where: mask of leading axes.
      weights: of leading axes.

    Returns:
      A scalar.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for another kind.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> fake = jnp.array([-3.0, 1.0])
      >>> [float(distill.fool_loss(fake, kind=k)) for k in ("hinge", "squares")]
      [1.0, 4.0]

    References:
      Goodfellow et al., `Generative Adversarial Networks <https://arxiv.org/abs/1406.2661>`_,
      2014; Lim and Ye, `Geometric GAN <https://arxiv.org/abs/1705.02894>`_, 2017; Mao et al.,
      `Least Squares Generative Adversarial Networks <https://arxiv.org/abs/1611.04076>`_, 2016
    """
    who = "fool_loss"
    fake = only(floats(fake, who, "fake"), where, who)
    if _kind(kind, who) == "logistic":
        losses = jax.nn.softplus(-fake)
    elif kind == "hinge":
        losses = -fake
    else:
        losses = jnp.square(fake - 1) / 2
    return mean(losses, who, where=where, weights=weights)


def judge_accuracy(
    real: jax.Array, fake: jax.Array, *, kind: Kind = "logistic", where: Any = None
) -> jax.Array:
    """Returns how often a judge is right: one half when it cannot tell the student's any more.

    Args:
      real: scores of the teacher's, shape `[B, ...]`.
      fake: scores of the student's, shape `[B', ...]`; of the same shape if there is a mask.
      kind: that of :func:`judge_loss`; the scores are parted at 0, for `squares` at one half.
      where: mask of leading axes, of both.

    Returns:
      A scalar: the mean of its shares of both.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for another kind.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> float(distill.judge_accuracy(jnp.array([2.0, 0.5]), jnp.array([-3.0, 1.0])))
      0.75
    """
    who = "judge_accuracy"
    real, fake = floats(real, who, "real"), floats(fake, who, "fake")
    middle = 0.5 if _kind(kind, who) == "squares" else 0.0
    right = [(x > middle) == teachers for x, teachers in ((real, True), (fake, False))]
    return sum(mean(x.astype(jnp.float32), who, where=where) for x in right) / 2


def gradient_penalty(
    score: Callable[[jax.Array], jax.Array],
    real: jax.Array,
    *,
    where: Any = None,
    weights: Any = None,
) -> jax.Array:
    r"""R1, which keeps a judge from becoming steep around the teacher's.

    .. math:: \tfrac12\, \mathrm{mean}_b \left\| \nabla_{x_b} D(x_b) \right\|^2

    It is added to the judge's loss, about ten times of it.

    Args:
      score: the judge of a batch, `[B, ...]` -> `[B]`, for instance
        ``lambda x: judged(params, x, labels)``. An example's score must not depend on others.
      real: the teacher's, shape `[B, ...]`.
      where: mask of examples, shape `[B]`.
      weights: of examples, shape `[B]`.

    Returns:
      A scalar; differentiable by what ``score`` closes over.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: if ``score`` does not give one number for each example.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> x = jnp.array([[1.0, 0.0], [3.0, 4.0]])
      >>> float(distill.gradient_penalty(lambda x: jnp.sum(x**2, axis=1), x))  # (2 + 50) / 2
      26.0

    References:
      Mescheder et al., `Which Training Methods for GANs do actually Converge?
      <https://arxiv.org/abs/1801.04406>`_, 2018
    """
    who = "gradient_penalty"
    real = only(floats(real, who, "real"), where, who)

    def total(x: jax.Array) -> jax.Array:
        scores = jnp.asarray(score(x))
        if scores.shape != x.shape[:1]:
            raise ValueError(f"{who}: score gave {scores.shape}; give {x.shape[:1]}")
        return jnp.sum(scores.astype(x.dtype))

    slopes = rows(jax.grad(total)(real))
    losses = jnp.sum(jnp.square(slopes), axis=1) / 2
    return mean(losses, who, where=where, weights=weights)


def _kind(kind: str, who: str) -> str:
    if kind not in ("logistic", "hinge", "squares"):
        raise ValueError(f"{who}: kind={kind!r} is none of 'logistic', 'hinge', 'squares'")
    return kind
