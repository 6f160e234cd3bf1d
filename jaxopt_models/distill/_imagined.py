"""Data-free distillation: what a teacher and a student should give for inputs that are made.

A generator, or the inputs themselves, minimise a weighted sum of these and of the losses of
`_inversion.py`. That an input is of a wanted class is the cross entropy of the teacher's logits
with it, as of any label.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from ._divergence import kl, log_probabilities, pick
from ._reduce import channel_means, floats, magnitude, mean, only, pair, positive


def one_hot(logits: jax.Array, *, where: Any = None, weights: Any = None) -> jax.Array:
    r"""The teacher is sure of each input: cross entropy with its own most likely class.

    .. math:: -\mathrm{mean}\, \max_v \log \mathrm{softmax}(z)_v

    Args:
      logits: the teacher's, shape `[..., V]`.
      where: mask of leading axes.
      weights: of leading axes.

    Returns:
      A scalar, from 0 to `log V`.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for a mask or weights of other axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> logits = jnp.log(jnp.array([[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]))
      >>> round(float(distill.one_hot(logits)), 3)
      0.693

    References:
      Chen et al., `Data-Free Learning of Student Networks <https://arxiv.org/abs/1904.01186>`_,
      2019
    """
    who = "one_hot"
    log_p = log_probabilities(only(floats(logits, who, "logits", least=2), where, who))
    losses = -pick(log_p, jnp.argmax(log_p, axis=-1))
    return mean(losses, who, where=where, weights=weights)


def information_entropy(logits: jax.Array, *, where: Any = None, weights: Any = None) -> jax.Array:
    r"""The inputs are of all classes alike: minus the entropy of the mean distribution.

    .. math:: \sum_v \bar p_v \log \bar p_v, \qquad \bar p = \mathrm{mean}\, \mathrm{softmax}(z),

    with natural logarithms; weights found for decimal ones are to be divided by 2.3.

    Args:
      logits: the teacher's, shape `[..., V]`.
      where: mask of leading axes.
      weights: of leading axes.

    Returns:
      A scalar, from `-log V` to 0.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for a mask or weights of other axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> same = jnp.log(jnp.array([[3.0, 1.0], [3.0, 1.0]]))
      >>> other = jnp.log(jnp.array([[3.0, 1.0], [1.0, 3.0]]))
      >>> [round(float(distill.information_entropy(x)), 3) for x in (same, other)]
      [-0.562, -0.693]

    References:
      Chen et al., `Data-Free Learning of Student Networks <https://arxiv.org/abs/1904.01186>`_,
      2019
    """
    who = "information_entropy"
    log_p = log_probabilities(only(floats(logits, who, "logits", least=2), where, who))
    p = channel_means(jnp.exp(log_p), who, where=where, weights=weights)
    return jnp.sum(p * jnp.log(jnp.maximum(p, jnp.finfo(p.dtype).tiny)))


def activation(features: jax.Array, *, where: Any = None, weights: Any = None) -> jax.Array:
    r"""The inputs excite the teacher: minus the mean magnitude of its features.

    .. math:: -\mathrm{mean}\, |f|

    Args:
      features: the teacher's before its classifier, shape `[B, ...]`.
      where: mask of leading axes.
      weights: of leading axes.

    Returns:
      A scalar, 0 or less.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for a mask or weights of other axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> float(distill.activation(jnp.array([[1.0, -2.0], [0.0, 5.0]])))
      -2.0

    References:
      Chen et al., `Data-Free Learning of Student Networks <https://arxiv.org/abs/1904.01186>`_,
      2019
    """
    who = "activation"
    features = only(floats(features, who, "features"), where, who)
    return -mean(magnitude(features), who, where=where, weights=weights)


def disagreement(
    student: jax.Array, teacher: jax.Array, *, where: Any = None, weights: Any = None
) -> jax.Array:
    r"""How far apart two models are: the student minimises it, and a generator its negative.

    .. math:: \mathrm{mean}\, |z^S - z^T|

    Unlike divergences of probabilities it has a derivative wherever the two differ, however sure
    they are.

    Args:
      student: logits, shape `[B, ...]`.
      teacher: logits, shape `[B, ...]`.
      where: mask of leading axes.
      weights: of leading axes.

    Returns:
      A scalar; 0 for equal logits.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> float(distill.disagreement(jnp.array([[1.0, 2.0]]), jnp.array([[4.0, 1.0]])))
      2.0

    References:
      Fang et al., `Data-Free Adversarial Distillation <https://arxiv.org/abs/1912.11006>`_, 2019
    """
    who = "disagreement"
    student, teacher = (only(x, where, who) for x in pair(student, teacher, who))
    return mean(magnitude(student - teacher), who, where=where, weights=weights)


def adversarial_js(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: float = 1.0,
    where: Any = None,
    weights: Any = None,
) -> jax.Array:
    r"""Inputs on which student and teacher differ: one minus the Jensen-Shannon divergence.

    .. math:: 1 - \tfrac12 \mathrm{KL}(p \| m) - \tfrac12 \mathrm{KL}(q \| m), \qquad
        m = \tfrac12 (p + q),

    in bits, so that it is 1 where both agree and 0 where they exclude each other.

    Args:
      student: logits, shape `[..., V]`.
      teacher: logits, shape `[..., V]`.
      temperature: what the logits are divided by, above 0; the authors' code takes 3.
      where: mask of leading axes.
      weights: of leading axes.

    Returns:
      A scalar, from 0 to 1.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: if the shapes differ, or the temperature is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> sure = jnp.array([[100.0, 0.0]])
      >>> losses = [distill.adversarial_js(sure, x) for x in (sure, 0 * sure, sure[:, ::-1])]
      >>> [round(float(loss), 3) for loss in losses]
      [1.0, 0.689, 0.0]

    References:
      Yin et al., `Dreaming to Distill: Data-free Knowledge Transfer via DeepInversion
      <https://arxiv.org/abs/1912.08795>`_, 2020
    """
    who = "adversarial_js"
    temperature = positive(temperature, who, "temperature")
    student, teacher = pair(student, teacher, who, least=2)
    p, q = (log_probabilities(only(x, where, who) / temperature) for x in (teacher, student))
    middle = jnp.logaddexp(p, q) - math.log(2)
    losses = 1 - (kl(p, middle) + kl(q, middle)) / (2 * math.log(2))
    return mean(losses, who, where=where, weights=weights)
