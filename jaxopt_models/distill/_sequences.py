"""Losses of sequences: relations between tokens, and whole sequences a teacher has decoded.

Distillation token by token needs nothing of its own: it is `kd` on logits `[B, T, V]` with the
mask of tokens `[B, T]` as `where=`.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp

from .._options import flag, whole
from ._divergence import kl, log_probabilities, pick
from ._reduce import floats, indices, mask, mean, only


def attention_relation(
    student_queries: jax.Array,
    student_keys: jax.Array,
    teacher_queries: jax.Array,
    teacher_keys: jax.Array,
    *,
    heads: int | None = None,
    causal: bool = False,
    where: Any = None,
    weights: Any = None,
) -> jax.Array:
    r"""MiniLM's loss: the student's tokens attend to each other as the teacher's do.

    For each example, head :math:`a` and token :math:`t`,

    .. math:: \mathrm{KL}\left(A^T_{a,t} \,\|\, A^S_{a,t}\right), \qquad
        A = \mathrm{softmax}\left(Q K^\top / \sqrt{d}\right),

    averaged over all of them. Widths may differ, and with ``heads=`` numbers of heads as well:
    the heads are joined and split anew into that many (MiniLMv2).

    Args:
      student_queries: shape `[B, T, heads, d]`, or with ``heads=`` also `[B, T, D]`.
      student_keys: of the same shape.
      teacher_queries: shape `[B, T, heads, d']`, or with ``heads=`` any `[B, T, ...]`.
      teacher_keys: of the same shape.
      heads: number of relation heads; a divisor of the joined widths of both.
      causal: whether a token attends to itself and earlier ones only.
      where: mask of tokens, shape `[B, T]`. Padding neither attends nor is attended.
      weights: of examples or tokens, shape `[B]` or `[B, T]`.

    Returns:
      A scalar; 0 for equal attention.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for shapes that do not fit each other, or widths that ``heads`` does not divide.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> eye = jnp.eye(3)[None, :, None]  # one example, three tokens, one head
      >>> loss = distill.attention_relation(eye, eye, 2 * eye, 2 * eye)
      >>> round(float(loss), 3)
      0.284

    References:
      Wang et al., `MiniLM <https://arxiv.org/abs/2002.10957>`_, 2020;
      Wang et al., `MiniLMv2 <https://arxiv.org/abs/2012.15828>`_, 2020
    """
    who = "attention_relation"
    student = _scores(student_queries, student_keys, who, "student", heads, where)
    teacher = _scores(teacher_queries, teacher_keys, who, "teacher", heads, where)
    if student.shape != teacher.shape:
        raise ValueError(
            f"{who}: the student's relations have shape {student.shape}, the teacher's "
            f"{teacher.shape}, [B, T, heads, T]; give the same tokens, and heads= where the "
            "numbers of heads differ"
        )
    batch, tokens = student.shape[:2]
    present = mask(where, (batch, tokens), who)
    attended = present[:, None, :]
    if flag(causal, f"{who}: causal"):
        attended = attended & jnp.tril(jnp.ones((1, tokens, tokens), bool))
    attended = jnp.broadcast_to(attended[:, :, None, :], student.shape)
    return mean(kl(teacher, student, where=attended), who, where=present, weights=weights)


def self_relation(
    student: jax.Array,
    teacher: jax.Array,
    *,
    heads: int | None = None,
    causal: bool = False,
    where: Any = None,
    weights: Any = None,
) -> jax.Array:
    r"""Relations of vectors with themselves: MiniLM's loss of values, and MiniLMv2's of all three.

    :func:`attention_relation` with one array as queries and keys: the distributions are
    :math:`\mathrm{softmax}(V V^\top / \sqrt{d})`. MiniLM adds it, for the values of the last
    layer, to the loss of attention; MiniLMv2 adds those of queries, keys and values of one layer.

    Args:
      student: shape `[B, T, heads, d]`, or with ``heads=`` also `[B, T, D]`.
      teacher: shape `[B, T, heads, d']`, or with ``heads=`` any `[B, T, ...]`.
      heads: number of relation heads; a divisor of the joined widths of both.
      causal: whether a token is related to itself and earlier ones only.
      where: mask of tokens, shape `[B, T]`. Padding neither has relations nor is in one.
      weights: of examples or tokens, shape `[B]` or `[B, T]`.

    Returns:
      A scalar; 0 for equal relations.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for shapes that do not fit each other, or widths that ``heads`` does not divide.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student, teacher = jnp.ones((2, 3, 8)), jnp.ones((2, 3, 6, 2))
      >>> float(distill.self_relation(student, teacher, heads=4))
      0.0

    References:
      Wang et al., `MiniLM <https://arxiv.org/abs/2002.10957>`_, 2020;
      Wang et al., `MiniLMv2 <https://arxiv.org/abs/2012.15828>`_, 2020
    """
    return attention_relation(
        student,
        student,
        teacher,
        teacher,
        heads=heads,
        causal=causal,
        where=where,
        weights=weights,
    )


def sequence(
    student: jax.Array,
    tokens: jax.Array,
    *,
    scores: Any = None,
    where: Any = None,
    weights: Any = None,
) -> jax.Array:
    r"""Sequence-level distillation: the likelihood of what a teacher has decoded.

    With beams :math:`y_k` and their scores :math:`r_k`,

    .. math:: -\sum_k \mathrm{softmax}(r)_k \sum_t \log p_S(y_{k,t} \mid y_{k,<t}, x),

    divided by the expected number of tokens. The student's logits are those it gives when it
    reads the teacher's tokens.

    Args:
      student: logits, shape `[B, T, V]`, or `[B, K, T, V]` for `K` beams.
      tokens: the teacher's, whole numbers, shape `[B, T]` or `[B, K, T]`.
      scores: log-probabilities of the beams, shape `[B, K]`; without, beams count alike.
      where: mask of tokens, of the shape of ``tokens``.
      weights: of examples, shape `[B]`.

    Returns:
      A scalar; NaN if a token that counts is none of the `V`.

    Raises:
      TypeError: if tokens are no whole numbers, or logits are not floating.
      ValueError: for shapes that do not fit each other, or scores without beams.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student = jnp.log(jnp.array([[[0.5, 0.25, 0.25], [0.25, 0.25, 0.5]]]))
      >>> loss = distill.sequence(student, jnp.array([[0, 1]]))
      >>> round(float(loss / jnp.log(2.0)), 3)  # (1 + 2) / 2 bits
      1.5

    References:
      Kim and Rush, `Sequence-Level Knowledge Distillation <https://arxiv.org/abs/1606.07947>`_,
      2016
    """
    who = "sequence"
    student = floats(student, who, "student", least=3)
    tokens = indices(tokens, student.shape[:-1], who, "tokens")
    where = mask(where, tokens.shape, who)
    losses = -pick(log_probabilities(only(student, where, who)), tokens)
    batch = student.shape[0]
    if scores is not None:
        if student.ndim != 4:
            raise ValueError(
                f"{who}: scores= are of beams; student has shape {student.shape}, "
                "give logits [B, K, T, V]"
            )
        scores = beam_weights(scores, student.shape[:2], who)
        weights = scores if weights is None else scores * _column(weights, batch, who)
    return mean(losses, who, where=where, weights=weights)


def beam_weights(scores: Any, shape: tuple[int, ...], who: str) -> jax.Array:
    """Returns the distribution over the beams of each example, shape `[B, K]`."""
    scores = floats(scores, who, "scores")
    if scores.shape != shape:
        raise ValueError(f"{who}: scores= has shape {scores.shape}; give {shape}")
    return jnp.exp(log_probabilities(scores))


def _column(weights: Any, batch: int, who: str) -> jax.Array:
    weights = jnp.asarray(weights)
    if weights.shape != (batch,):
        raise ValueError(f"{who}: weights= has shape {weights.shape}; give {(batch,)}")
    return weights[:, None]


def _scores(
    queries: Any, keys: Any, who: str, name: str, heads: int | None, where: Any
) -> jax.Array:
    """Returns scaled products of all pairs of tokens, shape `[B, T, heads, T]`."""
    queries = _split(queries, who, f"{name}'s queries", heads, where)
    keys = _split(keys, who, f"{name}'s keys", heads, where)
    if queries.shape != keys.shape:
        raise ValueError(
            f"{who}: the {name}'s queries have shape {queries.shape}, its keys {keys.shape}, "
            "[B, T, heads, d]; they must be equal"
        )
    # Fewer bits would be seen in the divergence of nearly equal relations.
    products = jnp.einsum("bqhd,bkhd->bqhk", queries, keys, precision="highest")
    return products / math.sqrt(queries.shape[-1])


def _split(x: Any, who: str, name: str, heads: int | None, where: Any) -> jax.Array:
    x = floats(x, who, name, least=3)
    if heads is None:
        if x.ndim != 4:
            raise ValueError(
                f"{who}: the {name} have shape {x.shape}; give [B, T, heads, d], or set heads="
            )
        heads = x.shape[2]
    heads = whole(heads, f"{who}: heads", least=1)
    width = math.prod(x.shape[2:])
    if width % heads:
        raise ValueError(f"{who}: heads={heads} does not divide the width {width} of the {name}")
    x = x.reshape(*x.shape[:2], heads, width // heads)
    return only(x, mask(where, x.shape[:2], who), who)
