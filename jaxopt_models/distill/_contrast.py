"""Contrast: the student tells the teacher's view of an example from those of others."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from .._options import portion, whole
from ._reduce import counts, inside, mean, only, pair, positive, unit
from ._reduce import indices as whole_numbers


class ContrastMemory(NamedTuple):
    """Memory of :func:`contrast`: the last embeddings of all examples.

    Args:
      student: unit vectors `[N, D]`.
      teacher: unit vectors `[N, D]`.
      log_z: logarithms of the two normalising constants `[2]`, of student and teacher;
        minus infinity before the first call.
      order: `int32` `[N]`, the examples, those of a class together.
      first: `int32` `[N]`, where in ``order`` the class of each example begins.
      same: `int32` `[N]`, how many examples its class has.
    """

    student: jax.Array
    teacher: jax.Array
    log_z: jax.Array
    order: jax.Array
    first: jax.Array
    same: jax.Array


def contrast_memory(
    key: jax.Array, examples: int, width: int, *, labels: ArrayLike | None = None
) -> ContrastMemory:
    """Makes the memory of :func:`contrast`, of random unit vectors.

    Args:
      key: random key.
      examples: number `N` of training examples.
      width: width `D` of the embeddings; the authors' is 128.
      labels: whole numbers `[N]`: negatives are then drawn from other classes. Default: each
        example is a class of its own.

    Returns:
      A :class:`ContrastMemory`, of `2 N D` floats. Train with it in the carry, and save it with
      the optimizer's state.

    Raises:
      ValueError: for sizes out of range, or if there are no negatives.
      TypeError: for sizes or labels that are no whole numbers.

    Example:
      >>> import jax
      >>> from jaxopt_models import distill
      >>> distill.contrast_memory(jax.random.key(0), 1000, 128).student.shape
      (1000, 128)
    """
    examples = whole(examples, "contrast_memory: examples", least=2)
    width = whole(width, "contrast_memory: width", least=1)
    banks = unit(jax.random.normal(key, (2, examples, width)))
    place = jnp.arange(examples, dtype=jnp.int32)
    labels = place if labels is None else whole_numbers(labels, (examples,), "contrast_memory")
    order = jnp.argsort(labels).astype(jnp.int32)
    first = jnp.searchsorted(labels[order], labels).astype(jnp.int32)
    after = jnp.searchsorted(labels[order], labels, side="right").astype(jnp.int32)
    same = after - first
    if not isinstance(labels, jax.core.Tracer) and len(np.unique(labels)) == 1:
        raise ValueError("contrast_memory: labels name one class only; give two or more")
    return ContrastMemory(*banks, jnp.full(2, -jnp.inf), order, first, same)


def contrast(
    student: ArrayLike,
    teacher: ArrayLike,
    indices: ArrayLike,
    memory: ContrastMemory,
    key: jax.Array,
    *,
    negatives: int = 16384,
    temperature: ArrayLike = 0.07,
    momentum: float = 0.5,
    where: ArrayLike | None = None,
    weights: ArrayLike | None = None,
) -> tuple[jax.Array, ContrastMemory]:
    r"""Contrastive representation distillation (CRD), by noise-contrastive estimation.

    Each student embedding is compared with the memory of the teacher, at its own example and at
    `K` others drawn uniformly, with replacement, and each teacher embedding with the memory of the
    student. With `N` examples, :math:`P = e^{u \cdot v / \tau} / Z`, and both sides added,

    .. math:: -\mathrm{mean}_i \Bigl(\log \frac{P_{i,i}}{P_{i,i} + K/N}
        + \sum_{k=1}^{K} \log \frac{K/N}{P_{i,k} + K/N}\Bigr).

    `Z` is the mean of the exponentials of the first call times `N`, and stays, as in the authors'
    code. The teacher's projection is trained as well, by the second side. The authors weigh the
    loss by 0.8. Vectors of both memories are gathered, `2 B (K + 1) D` floats: 1 GiB for 64
    examples of width 128 at the default `K`.

    Args:
      student: embeddings `[B, D]`, projected; normalised here.
      teacher: embeddings `[B, D]`, projected to the same width.
      indices: whole numbers `[B]`, which examples these are, each once. One outside of the memory
        makes the loss NaN, unless ``where`` leaves it out.
      memory: of :func:`contrast_memory`, or of the call before.
      key: random key of the negatives.
      negatives: `K`.
      temperature: :math:`\tau`, positive.
      momentum: share of the old vector in the new one, in [0, 1).
      where: mask of examples `[B]`, what counts and is remembered.
      weights: non-negative weights of examples `[B]`.

    Returns:
      The loss, and the memory for the next call, to which no derivative passes.

    Raises:
      ValueError: if shapes differ, or for options out of range.
      TypeError: for embeddings that are not floating, or indices that are no whole numbers.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> a, b = jax.random.split(jax.random.key(0))
      >>> memory = distill.contrast_memory(a, 100, 8)
      >>> x = jnp.eye(4, 8)
      >>> loss, memory = distill.contrast(x, x, jnp.arange(4), memory, b, negatives=16)
      >>> again, memory = distill.contrast(x, x, jnp.arange(4), memory, b, negatives=16)
      >>> bool(again < loss)
      True

    References:
      Tian, Krishnan and Isola, `Contrastive Representation Distillation
      <https://arxiv.org/abs/1910.10699>`_, 2020
    """
    temperature = positive(temperature, "contrast", "temperature")
    negatives = whole(negatives, "contrast: negatives", least=1)
    momentum = portion(momentum, "contrast: momentum")
    student, teacher = pair(student, teacher, "contrast", least=2)
    examples, width = memory.student.shape
    if student.shape[1:] != (width,):
        raise ValueError(
            f"contrast: student has shape {student.shape}, the memory {memory.student.shape}; "
            f"give [B, {width}]"
        )
    valid, at = inside(whole_numbers(indices, student.shape[:1], "contrast", "indices"), examples)
    student = unit(only(student, where, "contrast"))
    teacher = unit(only(teacher, where, "contrast"))
    use = (counts(student[:, 0], "contrast", where=where) > 0) & valid

    # The place in the order of the classes, with the example's own class stepped over.
    same, first = memory.same[at][:, None], memory.first[at][:, None]
    drawn = jax.random.randint(key, (len(at), negatives), 0, examples - same)
    drawn = drawn + jnp.where(drawn >= first, same, 0)
    compared = jnp.concatenate([at[:, None], memory.order[drawn]], axis=1)
    banks = jax.lax.stop_gradient((memory.student, memory.teacher))

    def agreement(bank: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.einsum("bkd,bd->bk", bank[compared], x) / temperature

    agree = jnp.stack([agreement(banks[1], student), agreement(banks[0], teacher)])
    total = jnp.sum(use) * (negatives + 1)
    sums = jax.nn.logsumexp(agree, axis=(1, 2), b=use[None, :, None].astype(agree.dtype))
    estimate = sums + math.log(examples) - jnp.log(jnp.maximum(total, 1))
    log_z = jnp.where(jnp.isfinite(memory.log_z), memory.log_z, jax.lax.stop_gradient(estimate))

    known = jnp.where(jnp.isfinite(log_z), log_z, 0)[:, None, None]
    odds = agree - known - math.log(negatives / examples)
    told = jax.nn.log_sigmoid(odds[..., 0]) + jnp.sum(jax.nn.log_sigmoid(-odds[..., 1:]), axis=-1)
    values = jnp.where(valid, -jnp.sum(told, axis=0), jnp.nan)
    loss = mean(values, "contrast", where=where, weights=weights)

    target = jnp.where(use, at, examples)

    def remember(bank: jax.Array, x: jax.Array) -> jax.Array:
        new = unit(momentum * bank[at] + (1 - momentum) * jax.lax.stop_gradient(x))
        return bank.at[target].set(new.astype(bank.dtype), mode="drop")

    student, teacher = remember(banks[0], student), remember(banks[1], teacher)
    return loss, memory._replace(
        student=student, teacher=teacher, log_z=log_z.astype(memory.log_z.dtype)
    )
