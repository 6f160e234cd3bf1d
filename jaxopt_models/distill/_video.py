"""Video: teachers and students that see different numbers of frames, and motion.

The losses are those of images and tokens; what videos need is a common axis of time.

- frame by frame: `kd` or `hint` of the student's and `align_frames(teacher, T)`, with the mask of
  the student's frames as `where=`;
- the whole clip: the same of both `align_frames(x, 1)[:, 0]`, the means over time;
- relations between frames: `self_relation(student, align_frames(teacher, T), heads=1)`;
- changes from frame to frame: `motion`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._options import whole
from ._reduce import floats, mask, mean, only


def align_frames(x: jax.Array, frames: int, *, where: Any = None) -> jax.Array:
    r"""Resamples time by means: each new frame is that of the old ones in its share of time.

    Old frame :math:`i` of `T` fills :math:`[i/T, (i+1)/T)`, new frame :math:`j` of `F`
    :math:`[j/F, (j+1)/F)`, and an old one counts by how much of it lies in the new one:

    .. math:: y_j = \frac{\sum_i m_i o_{ij} x_i}{\sum_i m_i o_{ij}}.

    So a student that sees every third frame is compared with the means of three, one frame is
    the mean over time, and with more frames than before some are repeated.

    Args:
      x: features or logits, the time second, shape `[B, T, ...]`.
      frames: number of frames `F`, at least 1.
      where: mask of the old frames `m`, shape `[B, T]`.

    Returns:
      Shape `[B, F, ...]`; zeros in a frame none of whose old ones count.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: for fewer axes, or a mask of another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> distill.align_frames(jnp.array([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]), 2)
      Array([[1., 4.]], dtype=float32)

    References:
      Bhardwaj et al., `Efficient Video Classification Using Fewer Frames
      <https://arxiv.org/abs/1902.10640>`_, 2019
    """
    who = "align_frames"
    x = floats(x, who, "x", least=2)
    frames = whole(frames, f"{who}: frames", least=1)
    old = x.shape[1]
    where = mask(where, x.shape[:2], who)
    # In whole numbers, so that frames that fall into place are copied bit for bit.
    ends = np.minimum.outer(np.arange(1, old + 1) * frames, np.arange(1, frames + 1) * old)
    starts = np.maximum.outer(np.arange(old) * frames, np.arange(frames) * old)
    overlap = jnp.asarray(np.maximum(ends - starts, 0), x.dtype)
    counted = where.astype(x.dtype)[..., None] * overlap[None]
    totals = jnp.sum(counted, axis=1, keepdims=True)
    share = counted / jnp.where(totals > 0, totals, 1)
    return jnp.einsum("bif,bi...->bf...", share, only(x, where, who), precision="highest")


def motion(
    student: jax.Array, teacher: jax.Array, *, where: Any = None, weights: Any = None
) -> jax.Array:
    r"""The student's features change from frame to frame as the teacher's do.

    .. math:: \mathrm{mean}\left((f^S_{t+1} - f^S_t) - (f^T_{t+1} - f^T_t)\right)^2

    What stands still has no part in it, so it is added to a loss of the frames themselves.

    Args:
      student: features or logits, shape `[B, T, ...]`.
      teacher: of the same shape; :func:`align_frames` brings it to the student's frames.
      where: mask of frames, shape `[B, T]`; a change counts between two that do.
      weights: of examples, shape `[B]`.

    Returns:
      A scalar; 0 for equal changes, and for a single frame.

    Raises:
      TypeError: for arrays that are not floating.
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> student = jnp.array([[0.0, 1.0, 2.0]])
      >>> [float(distill.motion(student, t)) for t in (student + 5, 3 * student)]
      [0.0, 4.0]
    """
    who = "motion"
    student = floats(student, who, "student", least=2)
    teacher = floats(teacher, who, "teacher", least=2)
    if student.shape != teacher.shape:
        raise ValueError(
            f"{who}: student has shape {student.shape}, teacher {teacher.shape}; they must be "
            "equal (of other frames: distill.align_frames, of other widths: distill.project)"
        )
    where = mask(where, student.shape[:2], who)
    student, teacher = (jnp.diff(only(x, where, who), axis=1) for x in (student, teacher))
    between = where[:, 1:] & where[:, :-1]
    return mean(jnp.square(student - teacher), who, where=between, weights=weights)
