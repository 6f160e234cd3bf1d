"""Losses of models with a tower for each modality, such as CLIP.

Every example is a pair, and a batch of `B` pairs is judged by the `B x B` affinities of one
tower's vectors to the other's. Examples that `where=` leaves out are in no row and no column.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ._divergence import kl, log_probabilities
from ._reduce import mask, mean, only, pair, positive, unit


def affinity(
    student_images: jax.Array,
    student_texts: jax.Array,
    teacher_images: jax.Array,
    teacher_texts: jax.Array,
    *,
    temperature: Any = 0.01,
    teacher_temperature: Any = None,
    where: Any = None,
    weights: Any = None,
) -> jax.Array:
    r"""TinyCLIP's affinity mimicking: images find texts, and texts images, as for the teacher.

    With vectors of length one and affinities :math:`A = I\, T^\top / \tau`,

    .. math:: \tfrac12\, \mathrm{mean}_i\left[
        \mathrm{KL}(\mathrm{softmax}(A^T_{i\cdot}) \,\|\, \mathrm{softmax}(A^S_{i\cdot})) +
        \mathrm{KL}(\mathrm{softmax}(A^T_{\cdot i}) \,\|\, \mathrm{softmax}(A^S_{\cdot i}))
        \right].

    The paper's cross entropy has the same derivatives by the student, and is zero nowhere. Only
    affinities are compared, so the widths of student and teacher may differ.

    Args:
      student_images: shape `[B, D]`; their lengths do not matter.
      student_texts: shape `[B, D]`.
      teacher_images: shape `[B, D']`.
      teacher_texts: shape `[B, D']`.
      temperature: :math:`\tau` of the student, above 0; an array if it is learned.
      teacher_temperature: that of the teacher; default: the same.
      where: mask of pairs, shape `[B]`.
      weights: of pairs, shape `[B]`.

    Returns:
      A scalar; 0 for equal affinities.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for shapes that do not fit each other, or temperatures not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> eye, wide = jnp.eye(3), jnp.eye(3, 8)
      >>> loss = distill.affinity(eye, eye[::-1], wide, wide, temperature=1.0)
      >>> round(float(loss), 3)
      0.243

    References:
      Wu et al., `TinyCLIP <https://arxiv.org/abs/2309.12314>`_, 2023
    """
    who = "affinity"
    temperature = positive(temperature, who, "temperature")
    if teacher_temperature is None:
        teacher_temperature = temperature
    teacher_temperature = positive(teacher_temperature, who, "teacher_temperature")
    names = "student_images", "student_texts"
    student, pairs = _affinities(student_images, student_texts, temperature, where, who, names)
    names = "teacher_images", "teacher_texts"
    teacher, _ = _affinities(teacher_images, teacher_texts, teacher_temperature, where, who, names)
    if student.shape != teacher.shape:
        raise ValueError(
            f"{who}: the student has {student.shape[0]} pairs, the teacher {teacher.shape[0]}"
        )
    there = jnp.broadcast_to(pairs[None], student.shape)
    losses = kl(teacher, student, where=there) + kl(teacher.T, student.T, where=there)
    return mean(losses / 2, who, where=pairs, weights=weights)


def image_text(
    images: jax.Array,
    texts: jax.Array,
    *,
    temperature: Any = 0.07,
    where: Any = None,
    weights: Any = None,
) -> jax.Array:
    r"""CLIP's loss: each image finds its text in the batch, and each text its image.

    With vectors of length one and affinities :math:`A = I\, T^\top / \tau`,

    .. math:: -\tfrac12\, \mathrm{mean}_i\left[
        \log \mathrm{softmax}(A_{i\cdot})_i + \log \mathrm{softmax}(A_{\cdot i})_i \right].

    Of a student's and a teacher's vectors it is the contrastive form of :func:`cross_modal`.

    Args:
      images: shape `[B, D]`; their lengths do not matter.
      texts: shape `[B, D]`.
      temperature: :math:`\tau`, above 0; an array if it is learned.
      where: mask of pairs, shape `[B]`.
      weights: of pairs, shape `[B]`.

    Returns:
      A scalar.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for shapes that do not fit each other, or a temperature not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> eye = jnp.eye(3)
      >>> losses = [distill.image_text(eye, x, temperature=1.0) for x in (eye, eye[::-1])]
      >>> [round(float(loss), 3) for loss in losses]
      [0.551, 1.218]

    References:
      Radford et al., `Learning Transferable Visual Models From Natural Language Supervision
      <https://arxiv.org/abs/2103.00020>`_, 2021
    """
    who = "image_text"
    temperature = positive(temperature, who, "temperature")
    scores, pairs = _affinities(images, texts, temperature, where, who, ("images", "texts"))
    there = jnp.broadcast_to(pairs[None], scores.shape)
    found = [jnp.diagonal(log_probabilities(x, there)) for x in (scores, scores.T)]
    return mean(-(found[0] + found[1]) / 2, who, where=pairs, weights=weights)


def cross_modal(
    student: jax.Array, teacher: jax.Array, *, where: Any = None, weights: Any = None
) -> jax.Array:
    r"""A student of one modality points where a teacher of another does.

    Half the squared distance between vectors of length one,

    .. math:: \tfrac12 \left\| \frac{s}{\|s\|} - \frac{t}{\|t\|} \right\|^2 = 1 - \cos(s, t).

    Zero vectors stay zero: one of them has the loss one half, two have none.

    Args:
      student: shape `[B, ..., D]`, for instance of depth images or of speech.
      teacher: of the same shape, for instance of the color images or the text they belong to.
      where: mask of leading axes.
      weights: of leading axes.

    Returns:
      A scalar, from 0 to 2.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student = jnp.array([[2.0, 0.0], [0.0, 1.0], [0.0, -3.0]])
      >>> teacher = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
      >>> float(distill.cross_modal(student, teacher))  # (0 + 1 + 2) / 3
      1.0

    References:
      Gupta et al., `Cross Modal Distillation for Supervision Transfer
      <https://arxiv.org/abs/1507.00448>`_, 2015
    """
    who = "cross_modal"
    student, teacher = (only(x, where, who) for x in pair(student, teacher, who, least=2))
    difference = unit(student) - unit(teacher)
    losses = jnp.sum(jnp.square(difference), axis=-1) / 2
    return mean(losses, who, where=where, weights=weights)


def _affinities(
    images: Any, texts: Any, temperature: Any, where: Any, who: str, names: tuple[str, str]
) -> tuple[jax.Array, jax.Array]:
    """Returns scaled cosines of all pairs, shape `[B, B]`, and the mask of pairs, `[B]`."""
    images, texts = pair(images, texts, who, least=2, names=names)
    if images.ndim != 2:
        raise ValueError(f"{who}: {names[0]} have shape {images.shape}; give [B, D]")
    where = mask(where, images.shape[:1], who)
    images, texts = (unit(only(x, where, who)) for x in (images, texts))
    # Low temperatures would turn fewer bits into wrong logits.
    return jnp.matmul(images, texts.T, precision="highest") / temperature, where
