"""The usual loss of classifiers, as one value for all schemes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from .._options import number, portion
from ._core import Loss
from ._labels import cross_entropy
from ._network import Seen
from ._reduce import positive
from ._soft import check_divergence, kd


def second(batch: Any) -> Any:
    """Returns the second part of a batch, where labels usually are.

    Raises:
      TypeError: if it has no second part.
    """
    if not isinstance(batch, (tuple, list)) or len(batch) < 2:
        kind = "an array" if hasattr(batch, "dtype") else type(batch).__name__
        raise TypeError(
            f"a batch is {kind}, no tuple (inputs, labels); say where labels are: "
            "classification or deep_supervision(labels=lambda batch: batch['label']), "
            "adversarial(condition=...), where None tells the judge nothing"
        )
    return batch[1]


def classification(
    *,
    hard: float = 0.1,
    soft: float = 0.9,
    temperature: float = 4.0,
    smoothing: float = 0.0,
    divergence: str = "forward",
    labels: Callable[[Any], Any] = second,
    where: Callable[[Any], Any] | None = None,
) -> Loss:
    r"""Returns the loss of a classifier that learns from labels and from others.

    .. math:: h\, \mathrm{CE}(y, s) + \frac{w}{n} \sum_{j=1}^{n} T^2\, \mathrm{KL}(p_j \| s)

    over `n` teachers or peers. The defaults are those of Hinton distillation; ``hard=1,
    soft=beta`` is the formula of :func:`joint`, ``hard=1, soft=1, temperature=1`` that of
    :func:`mutual`, and ``hard=0, soft=1`` needs no labels.

    Args:
      hard: weight `h` of the labels; with 0 they are not looked at.
      soft: weight `w` of the others.
      temperature: `T` of :func:`kd`.
      smoothing: of the labels, as for :func:`cross_entropy`.
      divergence: as for :func:`kd`.
      labels: from a batch to whole numbers `[B]` (or distributions `[B, C]`).
      where: from a batch to a mask of the leading axes of the logits: padding, for instance.

    Returns:
      The loss `(student, teacher or list, batch) -> (value, metrics)`; metrics are ``hard`` and
      ``soft``.

    Raises:
      TypeError, ValueError: for weights that are no numbers or negative, or other options out of
        range; from a step, if there are no labels or nobody teaches.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import distill
      >>> see = lambda z: distill.Seen(jnp.array([z]))
      >>> batch = jnp.zeros((1, 1)), jnp.array([0])
      >>> loss = distill.classification(hard=1.0, soft=1.0)
      >>> value, metrics = loss(see([0.0, 0.0]), see([0.0, 0.0]), batch)
      >>> print(f"{float(value):.4f} {float(metrics['soft']):.4f}")
      0.6931 0.0000
    """
    hard, soft = number(hard, "classification: hard"), number(soft, "classification: soft")
    if hard < 0 or soft < 0 or hard + soft == 0:
        raise ValueError(f"classification: hard={hard}, soft={soft}; give one that is above 0")
    temperature = positive(temperature, "classification", "temperature")
    smoothing = portion(smoothing, "classification: smoothing")
    check_divergence(divergence, "classification")
    check_reader(labels, "classification: labels")
    if where is not None:
        check_reader(where, "classification: where")

    def loss(student: Seen, others: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        counts = None if where is None else where(batch)
        parts = {}
        if hard:
            right = labels(batch)
            if any(right is getattr(s, "out", None) for s in _listed(others)):
                raise ValueError(
                    "classification: the labels are the teacher's outputs; give batches "
                    "(inputs, labels, outputs), or hard=0"
                )
            parts["hard"] = cross_entropy(student.out, right, smoothing=smoothing, where=counts)
        if soft:
            if others is None:
                raise ValueError(
                    "classification: soft targets, but nobody teaches here; write "
                    "classification(hard=1, soft=0), or give self_taught a decay="
                )
            found = [
                kd(
                    student.out,
                    s.out,
                    temperature=temperature,
                    divergence=divergence,
                    where=counts,
                )
                for s in _listed(others)
            ]
            parts["soft"] = sum(found) / len(found)
        weights = {"hard": hard, "soft": soft}
        return sum(weights[name] * part for name, part in parts.items()), parts

    return loss


def check_reader(reader: Any, name: str) -> None:
    """Raises a `TypeError` unless something that takes a part of a batch can be called."""
    if not callable(reader):
        raise TypeError(
            f"{name} is {type(reader).__name__}; give a function of the batch, such as "
            "lambda batch: batch[1]"
        )


def _listed(others: Any) -> list[Any]:
    return others if isinstance(others, list) else [others]
