"""Features: what is inside the student is drawn to what is inside the teacher."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from ._reduce import blank, mean, pair


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
    difference = blank(student, where, "hint") - blank(teacher, where, "hint")
    return mean(difference**2, "hint", where=where, weights=weights)
