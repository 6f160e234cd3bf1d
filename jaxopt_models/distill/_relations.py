"""Relations: how examples of a batch lie to each other, whatever the widths of features."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ._divergence import relative_entropy, soften
from ._reduce import counts, floats, mean, only, rows, scaled, unit


def similarity(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    r"""Similarity-preserving distillation (SP): Gram matrices of the batch.

    .. math:: \frac{1}{B^2} \|G_s - G_t\|_F^2, \qquad G = X X^\top
        \text{ with each row divided by its length}

    Args:
      student: features `[B, ...]`, one row of `X` an example.
      teacher: features `[B, ...]`, of any width.
      where: mask of examples `[B]`, what counts.

    Returns:
      A number, `float32` or wider.

    Raises:
      ValueError: if the numbers of examples differ.
      TypeError: for arrays that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student, teacher = jnp.array([[1.0], [1.0]]), jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> print(f"{distill.similarity(student, teacher):.3f}")
      0.293

    References:
      Tung and Mori, `Similarity-Preserving Knowledge Distillation
      <https://arxiv.org/abs/1907.09682>`_, 2019
    """
    student, teacher, use = _examples(student, teacher, where, "similarity")

    def gram(x: jax.Array) -> jax.Array:
        x = scaled(x)
        return unit(x @ x.T)

    values = (gram(student) - gram(teacher)) ** 2
    return mean(values, "similarity", weights=use[:, None] * use[None])


def relational_distance(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    r"""Distances between examples (RKD-D), relative to their mean.

    .. math:: \mathrm{mean}_{i \ne j} \, h\left(\frac{d^s_{ij}}{\bar d^s} -
        \frac{d^t_{ij}}{\bar d^t}\right), \quad d_{ij} = \|x_i - x_j\|_2, \quad
        h(a) = \begin{cases} a^2 / 2 & |a| \le 1 \\ |a| - 1/2 & \text{else} \end{cases}

    Equal examples have distance zero and no derivative. The authors' code also averages over the
    zeros of `i = j`, and weighs the loss by 25.

    Args:
      student: features `[B, ...]`.
      teacher: features `[B, ...]`, of any width.
      where: mask of examples `[B]`, what counts, in mean distances as well.

    Returns:
      A number, `float32` or wider; 0 for less than two examples.

    Raises:
      ValueError: if the numbers of examples differ.
      TypeError: for arrays that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student, teacher = jnp.array([[0.0], [1.0], [2.0]]), jnp.array([[0.0], [1.0], [1.0]])
      >>> print(f"{distill.relational_distance(student, teacher):.4f}")
      0.1875
      >>> print(f"{distill.relational_distance(student, 5 * student):.4f}")
      0.0000

    References:
      Park et al., `Relational Knowledge Distillation <https://arxiv.org/abs/1904.05068>`_, 2019
    """
    student, teacher, use = _examples(student, teacher, where, "relational_distance")
    pairs = _pairs(use)

    def distances(x: jax.Array) -> jax.Array:
        # Of differences: a Gram matrix would leave noise in place of small distances.
        square = jnp.sum(_differences(x) ** 2, axis=-1)
        same = square <= jnp.finfo(square.dtype).tiny
        distance = jnp.where(same, 0, jnp.sqrt(jnp.where(same, 1, square)))
        middle = mean(distance, "relational_distance", weights=pairs)
        return distance / jnp.where(middle > 0, middle, 1)

    values = _huber(distances(student) - distances(teacher))
    return mean(values, "relational_distance", weights=pairs)


def relational_angle(
    student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None
) -> jax.Array:
    r"""Angles between triplets of examples (RKD-A).

    .. math:: \mathrm{mean}_{i \ne j \ne k \ne i} \, h(c^s_{ijk} - c^t_{ijk}), \quad
        c_{ijk} = \left\langle \frac{x_i - x_j}{\|x_i - x_j\|}, \frac{x_k - x_j}{\|x_k - x_j\|}
        \right\rangle

    with `h` of :func:`relational_distance`. Directions between equal examples are zero and have
    no derivative. The authors' code also averages over triplets that name an example twice, and
    weighs the loss by 50. Memory is `B^3` for the angles and `B^2 D` for the directions: for 256
    examples the angles alone are 64 MiB, twice, and again for the derivative.

    Args:
      student: features `[B, ...]`.
      teacher: features `[B, ...]`, of any width.
      where: mask of examples `[B]`, what counts.

    Returns:
      A number, `float32` or wider; 0 for less than three examples.

    Raises:
      ValueError: if the numbers of examples differ.
      TypeError: for arrays that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> teacher = jnp.array([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
      >>> print(f"{distill.relational_angle(student, teacher):.4f}")
      0.5833

    References:
      Park et al., `Relational Knowledge Distillation <https://arxiv.org/abs/1904.05068>`_, 2019
    """
    student, teacher, use = _examples(student, teacher, where, "relational_angle")
    pairs = _pairs(use)

    def angles(x: jax.Array) -> jax.Array:
        direction = unit(_differences(x))
        return jnp.einsum("jid,jkd->jik", direction, direction)

    triplets = pairs[:, :, None] * pairs[:, None, :] * pairs[None, :, :]
    return mean(_huber(angles(student) - angles(teacher)), "relational_angle", weights=triplets)


def pkt(student: ArrayLike, teacher: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    r"""Probabilistic knowledge transfer (PKT): which examples are likely neighbours.

    .. math:: \mathrm{mean}_i \sum_{j \ne i} p^t_{j|i} \log \frac{p^t_{j|i}}{p^s_{j|i}}, \qquad
        p_{j|i} = \frac{k_{ij}}{\sum_{l \ne i} k_{il}}, \qquad
        k_{ij} = \frac{\cos(x_i, x_j) + 1}{2} + 10^{-7}

    As in the paper; the authors' code counts each example among its neighbours, and takes the
    mean over all pairs, which is smaller by `B`.

    Args:
      student: features `[B, ...]`.
      teacher: features `[B, ...]`, of any width.
      where: mask of examples `[B]`, what counts, as neighbours too.

    Returns:
      A number, `float32` or wider; 0 for less than three examples.

    Raises:
      ValueError: if the numbers of examples differ.
      TypeError: for arrays that are not floating.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student = jnp.array([[1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
      >>> teacher = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> print(f"{distill.pkt(student, teacher):.4f}")
      0.0316

    References:
      Passalis and Tefas, `Learning Deep Representations with Probabilistic Knowledge Transfer
      <https://arxiv.org/abs/1803.10837>`_, 2018
    """
    student, teacher, use = _examples(student, teacher, where, "pkt")
    pairs = _pairs(use)

    def chances(x: jax.Array) -> jax.Array:
        x = unit(x)
        # Rounding leaves cosines of opposite examples below -1, where there is no logarithm.
        cosine = jnp.clip(jnp.matmul(x, x.T, precision="highest"), -1, 1)
        return jnp.where(pairs > 0, jnp.log((cosine + 1) / 2 + 1e-7), -1e30)

    values = relative_entropy(*soften(chances(student), chances(teacher)))
    return mean(values, "pkt", where=where)


def _examples(
    student: ArrayLike, teacher: ArrayLike, where: ArrayLike | None, who: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns features as `[B, D]` and what counts as `[B]`, 0 or 1."""
    student, teacher = floats(student, who, "student"), floats(teacher, who, "teacher")
    if len(student) != len(teacher):
        raise ValueError(
            f"{who}: student has shape {student.shape}, teacher {teacher.shape}; give the same "
            "examples of both"
        )
    use = counts(jnp.zeros(len(student), student.dtype), who, where=where)
    return rows(only(student, where, who)), rows(only(teacher, where, who)), use


def _pairs(use: jax.Array) -> jax.Array:
    return use[:, None] * use[None] * (1 - jnp.eye(len(use), dtype=use.dtype))


def _differences(x: jax.Array) -> jax.Array:
    """Returns `x_i - x_j` at `[j, i]`, over the largest entry: what follows has no scale."""
    x = scaled(x)
    apart = x[None] - x[:, None]
    # XLA may compute a value twice and round it differently: equal rows are not quite apart then,
    # and their direction would be made of rounding alone.
    largest = jnp.max(jnp.abs(apart), axis=-1, keepdims=True)
    return jnp.where(largest <= 8 * jnp.finfo(x.dtype).eps, 0, apart)


def _huber(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    return jnp.where(size <= 1, x * x / 2, size - 0.5)
