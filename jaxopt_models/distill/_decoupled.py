"""Distances of distributions over classes that weigh apart what KL ties together."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._divergence import finite, pick, relative_entropy, soften
from ._reduce import counts, indices, mean, only, pair, positive, unit


def decoupled(
    student: ArrayLike,
    teacher: ArrayLike,
    labels: ArrayLike,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: ArrayLike = 4.0,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    r"""Decoupled knowledge distillation (DKD): the label's class apart from the others.

    With :math:`p = \mathrm{softmax}(z / T)`, the label `y`, :math:`b = (p_y, 1 - p_y)` and
    :math:`\hat p` the distribution over the other classes alone, the mean of

    .. math:: T^2 \bigl(\alpha D_{KL}(b_t \| b_s) + \beta D_{KL}(\hat p_t \| \hat p_s)\bigr).

    Plain distillation is :math:`\alpha = 1, \beta = 1 - p_{t,y}`: where the teacher is sure, it
    hardly teaches how the others compare. Computed on logarithms throughout.

    Args:
      student: logits `[..., C]`.
      teacher: logits `[..., C]`.
      labels: whole numbers `[...]`; one outside `[0, C)` makes the loss NaN, unless ``where``
        leaves it out.
      alpha: weight of the label's class against all others.
      beta: weight of the others among themselves. The authors raise it from 0 over the first
        epochs.
      temperature: `T`, positive.
      where: mask of leading axes, what counts.
      weights: non-negative weights of leading axes.

    Returns:
      A number, `float32` or wider.

    Raises:
      ValueError: if shapes differ, for a single class, or for options out of range.
      TypeError: for logits that are not floating, or labels that are no whole numbers.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student, teacher = jnp.array([[2.0, 1.0, 0.0]]), jnp.array([[4.0, 0.0, 2.0]])
      >>> loss = distill.decoupled(student, teacher, jnp.array([0]), temperature=1.0)
      >>> print(f"{loss:.3f}")
      6.736

    References:
      Zhao et al., `Decoupled Knowledge Distillation <https://arxiv.org/abs/2203.08679>`_, 2022
    """
    temperature = positive(temperature, "decoupled", "temperature")
    alpha = positive(alpha, "decoupled", "alpha", zero=True)
    beta = positive(beta, "decoupled", "beta", zero=True)
    student, teacher = pair(student, teacher, "decoupled")
    labels = indices(labels, student.shape[:-1], "decoupled")
    classes = student.shape[-1]
    if classes < 2:
        raise ValueError(f"decoupled: student has shape {student.shape}; give two classes or more")
    student, teacher = only(student, where, "decoupled"), only(teacher, where, "decoupled")
    labels = only(labels, where, "decoupled")
    place = jnp.arange(classes - 1).reshape((1,) * labels.ndim + (-1,))
    others = place + (place >= labels[..., None])

    def split(z: jax.Array) -> tuple[jax.Array, jax.Array]:
        rest = jnp.take_along_axis(finite(z), others, axis=-1)
        apart = jax.nn.logsumexp(rest / temperature, axis=-1) * temperature
        return jnp.stack([pick(z, labels), apart], axis=-1), rest

    (target_s, rest_s), (target_t, rest_t) = split(student), split(teacher)
    target = relative_entropy(*soften(target_s, target_t, temperature))
    rest = relative_entropy(*soften(rest_s, rest_t, temperature))
    values = alpha * target + beta * rest
    return temperature**2 * mean(values, "decoupled", where=where, weights=weights)


def dist(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    r"""Correlation in the place of KL (DIST), for teachers much stronger than the student.

    With :math:`p = \mathrm{softmax}(z / T)` and Pearson's correlation :math:`\rho`,

    .. math:: T^2 \Bigl(\beta \, \mathrm{mean}_i \bigl(1 - \rho(p_s[i, :], p_t[i, :])\bigr)
        + \gamma \, \mathrm{mean}_c \bigl(1 - \rho(p_s[:, c], p_t[:, c])\bigr)\Bigr).

    Of unit vectors it is half of the square of their distance, and so it is computed: zero for
    equal inputs. A row or column that is constant has no correlation; it counts 1/2, and 0
    where student and teacher are both constant, as columns of a batch of one are.

    Args:
      student: logits `[..., C]`; a column holds all that the leading axes hold.
      teacher: logits `[..., C]`.
      beta: weight of relations between classes, in a row.
      gamma: weight of relations between examples, in a column.
      temperature: `T`, positive.
      where: mask of leading axes, what counts, in columns as well.
      weights: non-negative weights of leading axes, in columns as well.

    Returns:
      A number, `float32` or wider.

    Raises:
      ValueError: if the shapes differ, or for options out of range.
      TypeError: for arrays that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student = jnp.array([[2.0, 1.0], [0.0, 1.0]])
      >>> teacher = jnp.array([[4.0, 0.0], [2.0, 0.0]])
      >>> print(f"{distill.dist(student, teacher, gamma=0.0):.3f}")
      1.000
      >>> print(f"{abs(distill.dist(student, teacher, beta=0.0)):.3f}")
      0.000

    References:
      Huang et al., `Knowledge Distillation from A Stronger Teacher
      <https://arxiv.org/abs/2205.10536>`_, 2022
    """
    temperature = positive(temperature, "dist", "temperature")
    beta = positive(beta, "dist", "beta", zero=True)
    gamma = positive(gamma, "dist", "gamma", zero=True)
    student, teacher = pair(student, teacher, "dist")
    student, teacher = only(student, where, "dist"), only(teacher, where, "dist")
    p, q = jax.nn.softmax(teacher / temperature), jax.nn.softmax(student / temperature)

    def apart(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
        return jnp.sum((unit(a, axis) - unit(b, axis)) ** 2, axis=axis) / 2

    def centred(x: jax.Array, share: jax.Array, axis: int) -> jax.Array:
        # From the largest that counts: what is constant leaves its rounding at most.
        counted = jnp.where(share > 0, x, 0)
        top = jax.lax.stop_gradient(jnp.max(counted, axis=axis, keepdims=True, initial=0))
        x = x - top
        x = x - jnp.sum(share * x, axis=axis, keepdims=True)
        # XLA may compute a value twice and round it differently, and unit would make much of it.
        counted = jnp.where(share > 0, jnp.abs(x), 0)
        largest = jnp.max(counted, axis=axis, keepdims=True, initial=0)
        return jnp.where(largest <= 8 * jnp.finfo(x.dtype).eps * top, 0, x)

    even = jnp.full_like(p, 1 / p.shape[-1])
    rows = apart(centred(q, even, -1), centred(p, even, -1), -1)
    rows = mean(rows, "dist", where=where, weights=weights)
    share = counts(p[..., 0], "dist", where=where, weights=weights).reshape(-1, 1)
    total = jnp.sum(share)
    share = share / jnp.where(total > 0, total, 1)

    def spread(x: jax.Array) -> jax.Array:
        x = x.reshape(-1, x.shape[-1])
        return jnp.sqrt(share * len(x)) * centred(x, share, 0)

    columns = jnp.mean(apart(spread(q), spread(p), 0))
    return temperature**2 * (beta * rows + gamma * columns)
