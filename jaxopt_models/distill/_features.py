"""Features: what is inside the student is drawn to what is inside the teacher."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .._options import number
from ._heads import resize
from ._reduce import floats, mean, only, pair, rows, scaled, unit


def hint(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    r"""Mean square of the differences of features, the hints of FitNets.

    Args:
      student: features `[B, ...]`, of another width brought to the teacher's by
        :func:`project`.
      teacher: features `[B, ...]`.
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
      >>> float(distill.hint(jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])))
      2.0

    References:
      Romero et al., `FitNets: Hints for Thin Deep Nets
      <https://arxiv.org/abs/1412.6550>`_, 2015
    """
    student, teacher = pair(student, teacher, "hint")
    difference = only(student, where, "hint") - only(teacher, where, "hint")
    return mean(difference**2, "hint", where=where, weights=weights)


def attention(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    power: float = 2,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    r"""Attention transfer: where features are large, whatever their number.

    .. math:: \mathrm{mean} \left(\frac{Q_s}{\|Q_s\|_2} - \frac{Q_t}{\|Q_t\|_2}\right)^2,
        \qquad Q = \mathrm{mean}_c |A_c|^p,

    the mean over places and examples, as in the authors' code (their paper has the norm of the
    difference); they weigh it by 1000. Maps of different sizes are averaged over areas down to
    the smaller size, axis by axis. A map of zeros stays zero.

    Args:
      student: features `[B, spatial..., C]`.
      teacher: features `[B, spatial..., C']`, with as many spatial axes.
      power: `p`, at least 1.
      where: mask of examples `[B]`, what counts.
      weights: non-negative weights of examples `[B]`.

    Returns:
      A number, `float32` or wider.

    Raises:
      ValueError: if the number of examples or axes differ, or for a power below 1.
      TypeError: for arrays that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student = jnp.array([[[1.0], [0.0]]])  # One example, two places, one channel.
      >>> teacher = jnp.array([[[0.0, 0.0], [3.0, 3.0]]])
      >>> print(f"{distill.attention(student, teacher):.3f}")
      1.000

    References:
      Zagoruyko and Komodakis, `Paying More Attention to Attention
      <https://arxiv.org/abs/1612.03928>`_, 2017
    """
    if number(power, "attention: power") < 1:
        raise ValueError(f"attention: power={power!r} must be at least 1")
    student = only(floats(student, "attention", "student", least=3), where, "attention")
    teacher = only(floats(teacher, "attention", "teacher", least=3), where, "attention")
    if student.ndim != teacher.ndim or len(student) != len(teacher):
        raise ValueError(
            f"attention: student has shape {student.shape}, teacher {teacher.shape}; give "
            "[B, spatial..., C] with the same B and number of axes"
        )
    sizes = tuple(map(min, student.shape[1:-1], teacher.shape[1:-1]))

    def place(x: jax.Array) -> jax.Array:
        sizable = scaled(x, tuple(range(1, x.ndim)))
        return unit(rows(resize(jnp.mean(jnp.abs(sizable) ** power, axis=-1), sizes)))

    values = jnp.mean((place(student) - place(teacher)) ** 2, axis=-1)
    return mean(values, "attention", where=where, weights=weights)


def factor_transfer(
    student: ArrayLike,
    teacher: ArrayLike,
    *,
    order: float = 1,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    r"""Factor transfer: distance of normalised factors of features.

    .. math:: \mathrm{mean} \left|\frac{F_s}{\|F_s\|_2} - \frac{F_t}{\|F_t\|_2}\right|^p

    over entries and examples, as in the authors' code. The factors are made by heads. That of the
    teacher, the paraphraser, is trained first, as the first half of an autoencoder of its features;
    then that of the student, the translator, together with the student::

        encoder, decoder = translator(a, wide, factors), translator(b, factors, wide)
        hint(project(decoder, project(encoder, features)), features)          # first
        factor_transfer(project(head, inside), project(encoder, features))    # then

    Args:
      student: factors `[B, ...]`.
      teacher: factors `[B, ...]`.
      order: `p`, at least 1; for 1, rounding may give equal factors a derivative.
      where: mask of examples `[B]`, what counts.
      weights: non-negative weights of examples `[B]`.

    Returns:
      A number, `float32` or wider.

    Raises:
      ValueError: if the shapes differ, or for an order below 1.
      TypeError: for arrays that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student, teacher = jnp.array([[3.0, 4.0]]), jnp.array([[0.0, 2.0]])
      >>> print(f"{distill.factor_transfer(student, teacher):.3f}")
      0.400

    References:
      Kim, Park and Kwak, `Paraphrasing Complex Network: Network Compression via Factor Transfer
      <https://arxiv.org/abs/1802.04977>`_, 2018
    """
    if number(order, "factor_transfer: order") < 1:
        raise ValueError(f"factor_transfer: order={order!r} must be at least 1")
    student, teacher = pair(student, teacher, "factor_transfer", least=2)
    student = only(student, where, "factor_transfer")
    teacher = only(teacher, where, "factor_transfer")
    difference = unit(rows(student)) - unit(rows(teacher))
    values = jnp.mean(jnp.abs(difference) ** order, axis=-1)
    return mean(values, "factor_transfer", where=where, weights=weights)


def variational(
    student: ArrayLike,
    teacher: ArrayLike,
    scale: ArrayLike,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    r"""Variational information distillation (VID): features under a learned Gaussian.

    .. math:: \frac12 \, \mathrm{mean} \left(\frac{(t - s)^2}{\sigma_c^2} + \log \sigma_c^2\right),
        \qquad \sigma_c^2 = \log(1 + e^{a_c}) + 10^{-5},

    a bound on the mutual information without its constant, so it may be negative. Channels of the
    teacher that the student cannot predict get a large variance and cost little.

    Args:
      student: predicted means `[B, ..., C]`, of the student's features through a head.
      teacher: features `[B, ..., C]`.
      scale: `a` `[C]`, trained beside the student; ``jnp.full(C, 5.0)`` is the authors' start.
      where: mask of leading axes, what counts.
      weights: non-negative weights of leading axes.

    Returns:
      A number, `float32` or wider.

    Raises:
      ValueError: if shapes differ.
      TypeError: for arrays that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student, teacher = jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])
      >>> print(f"{distill.variational(student, teacher, jnp.zeros(2)):.3f}")
      1.259

    References:
      Ahn et al., `Variational Information Distillation for Knowledge Transfer
      <https://arxiv.org/abs/1904.05835>`_, 2019
    """
    student, teacher = pair(student, teacher, "variational")
    scale = floats(scale, "variational", "scale")
    if scale.shape != student.shape[-1:]:
        raise ValueError(
            f"variational: scale has shape {scale.shape}, student {student.shape}; give one entry "
            f"a channel, {student.shape[-1:]}"
        )
    difference = only(student, where, "variational") - only(teacher, where, "variational")
    variance = jax.nn.softplus(scale).reshape((1,) * (student.ndim - 1) + (-1,)) + 1e-5
    values = (difference**2 / variance + jnp.log(variance)) / 2
    return mean(values, "variational", where=where, weights=weights)


def reconstruction(
    student: Any,
    teacher: Any,
    *,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> jax.Array:
    r"""Relative error of outputs of layers, for layer-wise reconstruction.

    .. math:: \mathrm{mean}_l \frac{\sum (s_l - t_l)^2}{\sum t_l^2}

    Each layer counts the same, whatever its size and scale. A teacher of zeros divides by one.

    Args:
      student: an array `[B, ...]`, or a tree (dict, tuple ...) of arrays, one an output.
      teacher: the same of the teacher.
      where: mask of leading axes of each output, what counts.
      weights: non-negative weights of leading axes.

    Returns:
      A number, `float32` or wider.

    Raises:
      ValueError: if the trees or shapes differ, or hold nothing.
      TypeError: for arrays that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student = {"a": jnp.array([[1.0, 1.0]]), "b": jnp.array([[0.0]])}
      >>> teacher = {"a": jnp.array([[1.0, 2.0]]), "b": jnp.array([[10.0]])}
      >>> print(f"{distill.reconstruction(student, teacher):.2f}")
      0.60
    """
    outputs, structure = jax.tree_util.tree_flatten_with_path(student)
    targets, other = jax.tree_util.tree_flatten_with_path(teacher)
    if structure != other or not outputs:
        mine, its = (
            ", ".join(jax.tree_util.keystr(path) or "an array" for path, _ in leaves) or "nothing"
            for leaves in (outputs, targets)
        )
        raise ValueError(
            f"reconstruction: student holds {mine}; teacher holds {its}; give the same outputs of "
            "both"
        )
    errors = []
    for (path, s), (_, t) in zip(outputs, targets, strict=True):
        at = jax.tree_util.keystr(path)
        s, t = pair(s, t, "reconstruction", names=(f"student{at}", f"teacher{at}"))
        s, t = only(s, where, "reconstruction"), only(t, where, "reconstruction")
        error = mean((s - t) ** 2, "reconstruction", where=where, weights=weights)
        size = mean(t**2, "reconstruction", where=where, weights=weights)
        errors.append(error / jnp.where(size > 0, size, 1))
    return sum(errors) / len(errors)
