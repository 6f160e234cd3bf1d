"""Losses of speech recognition: CTC frame by frame and by transcripts, and transducers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from .._options import flag, whole
from ._divergence import FLOOR, kl, log_probabilities, pick
from ._reduce import floats, indices, mask, mean, only, pair, positive
from ._sequences import beam_weights


def ctc_frames(
    student: jax.Array,
    teacher: jax.Array,
    *,
    temperature: float = 1.0,
    blank: int = 0,
    drop_blank: bool = False,
    where: Any = None,
    weights: Any = None,
) -> jax.Array:
    r"""CTC frame by frame: the student's distribution in each frame becomes the teacher's.

    .. math:: T^2\, \mathrm{KL}\left(\mathrm{softmax}(z^T_t / T) \,\|\,
        \mathrm{softmax}(z^S_t / T)\right),

    averaged over frames `t`. In most frames a teacher says blank, and a student learns little
    else from them: ``drop_blank`` leaves those out, which asks for the loss of transcripts
    beside it, since nothing else then teaches when to say blank.

    Args:
      student: logits, shape `[B, T, V]`.
      teacher: logits, shape `[B, T, V]`.
      temperature: `T`, above 0.
      blank: index of the blank class.
      drop_blank: whether frames count only where the teacher's most likely class is another.
      where: mask of frames, shape `[B, T]`.
      weights: of examples or frames, shape `[B]` or `[B, T]`.

    Returns:
      A scalar; 0 for equal logits, and where no frame counts.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: if the shapes differ, ``blank`` is no class, or a temperature is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> teacher = jnp.log(jnp.array([[[0.8, 0.1, 0.1], [0.25, 0.5, 0.25]]]))
      >>> losses = [
      ...     distill.ctc_frames(0 * teacher, teacher, drop_blank=drop) for drop in (False, True)
      ... ]
      >>> [round(float(loss), 3) for loss in losses]
      [0.259, 0.059]

    References:
      Hinton et al., `Distilling the Knowledge in a Neural Network
      <https://arxiv.org/abs/1503.02531>`_, 2015; Hilmes et al., `Analyzing the Importance of
      Blank for CTC-Based Knowledge Distillation <https://arxiv.org/abs/2506.01503>`_, 2025
    """
    who = "ctc_frames"
    student, teacher = pair(student, teacher, who, least=3)
    temperature = positive(temperature, who, "temperature")
    blank = _blank(blank, teacher.shape[-1], who)
    counts = mask(where, teacher.shape[:-1], who)
    if flag(drop_blank, f"{who}: drop_blank"):
        counts = counts & (jnp.argmax(teacher, axis=-1) != blank)
    student, teacher = (only(x, counts, who) / temperature for x in (student, teacher))
    losses = temperature**2 * kl(teacher, student)
    return mean(losses, who, where=counts, weights=weights)


def ctc_sequence(
    student: jax.Array,
    hypotheses: jax.Array,
    *,
    scores: Any = None,
    blank: int = 0,
    where: Any = None,
    where_labels: Any = None,
    weights: Any = None,
) -> jax.Array:
    r"""CTC by transcripts: the likelihood of what a teacher has recognised.

    With the teacher's hypotheses :math:`y_k` and their scores :math:`r_k`,

    .. math:: -\sum_k \mathrm{softmax}(r)_k \log p_S(y_k \mid x),

    averaged over examples, where :math:`p_S` adds up all alignments (`optax.ctc_loss`).

    Args:
      student: logits, shape `[B, T, V]`.
      hypotheses: labels without blanks, whole numbers, shape `[B, N]`, or `[B, K, N]` for the
        `K` best; shorter ones are padded behind.
      scores: log-probabilities of the hypotheses, shape `[B, K]`; without, they count alike.
      blank: index of the blank class.
      where: mask of frames, shape `[B, T]`; an example without frames does not count.
      where_labels: mask of labels, of the shape of ``hypotheses``; default: all but blanks.
      weights: of examples, shape `[B]`.

    Returns:
      A scalar; about 1e30 and more if a hypothesis is too long for its frames, and NaN if a label
      that counts is blank, none of the `V`, or behind one that does not count.

    Raises:
      TypeError: if labels are no whole numbers, or logits are not floating.
      ValueError: for shapes that do not fit each other, scores without beams, or if ``blank`` is
        no class.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student = jnp.zeros((1, 2, 2))  # of 4 alignments 3 spell the label 1: 01, 10 and 11
      >>> round(float(distill.ctc_sequence(student, jnp.array([[1]]))), 3)
      0.288

    References:
      Kim and Rush, `Sequence-Level Knowledge Distillation <https://arxiv.org/abs/1606.07947>`_,
      2016; Takashima, Li and Kawai, Investigation of Sequence-Level Knowledge Distillation
      Methods for CTC Acoustic Models, ICASSP 2019
    """
    who = "ctc_sequence"
    student = jnp.maximum(floats(student, who, "student", least=3), FLOOR)
    batch, frames, classes = student.shape
    blank = _blank(blank, classes, who)
    hypotheses = jnp.asarray(hypotheses)
    beams = hypotheses.ndim == 3
    if hypotheses.ndim not in (2, 3) or hypotheses.shape[0] != batch:
        raise ValueError(
            f"{who}: hypotheses have shape {hypotheses.shape}; give [B, N] or [B, K, N] "
            f"with B = {batch}"
        )
    if scores is not None and not beams:
        raise ValueError(f"{who}: scores= are of hypotheses [B, K, N], got {hypotheses.shape}")
    labels = indices(hypotheses, hypotheses.shape, who, "hypotheses")
    labels, counts, wrong = _spelled(labels, where_labels, blank, classes, who)
    present = mask(where, (batch, frames), who)
    logits = only(student, present, who)
    silent = 1 - present.astype(logits.dtype)

    def one(labels: jax.Array, counts: jax.Array) -> jax.Array:
        padded = 1 - counts.astype(logits.dtype)
        # Log-probabilities of real alignments may be far below the default of -1e5.
        return optax.ctc_loss(logits, silent, labels, padded, blank_id=blank, log_epsilon=FLOOR)

    losses = jax.vmap(one, in_axes=1, out_axes=1)(labels, counts) if beams else one(labels, counts)
    losses = jnp.where(wrong, jnp.nan, losses)
    if beams:
        share = beam_weights(
            jnp.zeros(losses.shape) if scores is None else scores, losses.shape, who
        )
        losses = jnp.sum(share * losses, axis=1)
    return mean(losses, who, where=jnp.any(present, axis=1), weights=weights)


def transducer(
    student: jax.Array,
    teacher: jax.Array,
    labels: jax.Array,
    *,
    blank: int = 0,
    where: Any = None,
    where_labels: Any = None,
    weights: Any = None,
) -> jax.Array:
    r"""Transducers on a collapsed lattice: the next label, blank, or anything else.

    In each node `(t, u)` of the lattice of frames and labels, the `V` classes become three,

    .. math:: P(t, u) = \left(p(y_{u+1}),\ p(\varnothing),\
        1 - p(y_{u+1}) - p(\varnothing)\right),

    and the loss is :math:`\mathrm{KL}(P_T \| P_S)`, averaged over the nodes inside both lengths.
    Behind the last label nothing is next, and two classes are left.

    Args:
      student: logits, shape `[B, T, U + 1, V]`.
      teacher: logits, shape `[B, T, U + 1, V]`.
      labels: the transcripts, whole numbers, shape `[B, U]`; shorter ones are padded behind.
      blank: index of the blank class.
      where: mask of frames, shape `[B, T]`.
      where_labels: mask of labels, shape `[B, U]`; default: all but blanks.
      weights: of examples or frames, shape `[B]` or `[B, T]`.

    Returns:
      A scalar; 0 for equal logits, and NaN if a label that counts is blank, none of the `V`, or
      behind one that does not count.

    Raises:
      TypeError: if labels are no whole numbers, or logits are not floating.
      ValueError: for shapes that do not fit each other, or if ``blank`` is no class.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> teacher = jnp.zeros((1, 1, 2, 4)).at[..., 0].set(jnp.log(3.0))
      >>> loss = distill.transducer(jnp.zeros((1, 1, 2, 4)), teacher, jnp.array([[2]]))
      >>> round(float(loss), 3)
      0.144

    References:
      Panchapagesan et al., `Efficient Knowledge Distillation for RNN-Transducer Models
      <https://arxiv.org/abs/2011.06110>`_, 2020
    """
    who = "transducer"
    student, teacher = pair(student, teacher, who, least=4)
    batch, frames, places, classes = student.shape
    blank = _blank(blank, classes, who)
    labels = indices(labels, (batch, places - 1), who)
    labels, counts, wrong = _spelled(labels, where_labels, blank, classes, who)
    first = jnp.ones((batch, 1), bool)
    has_next = jnp.concatenate([counts, ~first], axis=1)
    following = jnp.concatenate([labels, jnp.full((batch, 1), blank, labels.dtype)], axis=1)
    has_next, following = (
        jnp.broadcast_to(x[:, None], (batch, frames, places)) for x in (has_next, following)
    )

    def collapsed(logits: jax.Array) -> jax.Array:
        log_p = log_probabilities(logits)
        place = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 3)
        rest = (place != jnp.where(has_next, following, blank)[..., None]) & (place != blank)
        return jnp.stack(
            [
                jnp.where(has_next, pick(log_p, following), FLOOR),
                log_p[..., blank],
                jax.nn.logsumexp(jnp.where(rest, log_p, FLOOR), axis=-1),
            ],
            axis=-1,
        )

    reached = jnp.concatenate([first, counts], axis=1)
    nodes = mask(where, (batch, frames), who)[..., None] & reached[:, None]
    losses = kl(*(collapsed(only(x, nodes, who)) for x in (teacher, student)))
    losses = jnp.where(wrong[:, None, None], jnp.nan, losses)
    return mean(losses, who, where=nodes, weights=weights)


def _blank(blank: Any, classes: int, who: str) -> int:
    blank = whole(blank, f"{who}: blank", least=0)
    if blank >= classes:
        raise ValueError(f"{who}: blank={blank} is none of the {classes} classes")
    return blank


def _spelled(
    labels: jax.Array, where: Any, blank: int, classes: int, who: str
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns labels that are blank where they do not count, the mask, and rows that are wrong."""
    counts = labels != blank if where is None else mask(where, labels.shape, who, "where_labels")
    outside = (labels < 0) | (labels >= classes) | (labels == blank)
    late = counts[..., 1:] & ~counts[..., :-1]
    wrong = jnp.any(counts & outside, axis=-1) | jnp.any(late, axis=-1)
    return jnp.where(counts & ~outside, labels, blank), counts, wrong
