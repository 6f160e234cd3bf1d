"""One generation after another: chains of assistants, and networks born again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import optax

from ._core import Loss
from ._fit import fit
from ._network import as_network
from ._teach import teacher_student


def succession(
    teacher: Any,
    teacher_params: Any,
    successors: Sequence[tuple[Any, Any]],
    loss: Loss,
    optimizer: optax.GradientTransformation | Callable[[int], optax.GradientTransformation],
    batches: Any,
    *,
    steps: int,
    evaluate: Callable[[Any], float] | None = None,
    every: int = 0,
    key: Any = None,
    progress: bool = True,
) -> list[Any]:
    """Trains networks one after another, each taught by the one before it.

    With networks of falling size these are teacher assistants, which bridge a gap that is too
    wide for one step; with one network again and again, each time from new parameters, it is
    born again, and the mean of the generations' probabilities (:func:`blend`) is their ensemble.

    Args:
      teacher: function `(params, x) -> out`, or a :class:`Network`.
      teacher_params: its parameters.
      successors: `(network, parameters to begin with)`, in order.
      loss: `(student, teacher, batch) -> value` of every generation.
      optimizer: an optax transformation, or a function from the number of the generation to one.
      batches: as for :func:`fit`; every generation begins with the first.
      steps: of each generation.
      evaluate: from a student's parameters to a score; with ``every`` the best of a generation
        is kept and teaches the next.
      every: steps between two evaluations.
      key: random key.
      progress: show a bar.

    Returns:
      The trained parameters of each generation.

    Raises:
      ValueError: for no successors.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill
      >>> fn = lambda params, x: x @ params["w"]
      >>> loss = lambda student, teacher, batch: distill.hint(student.out, teacher.out)
      >>> zero = {"w": jnp.zeros((2, 1))}
      >>> found = distill.succession(
      ...     fn, {"w": jnp.ones((2, 1))}, [(fn, zero), (fn, zero)], loss, optax.sgd(0.5),
      ...     lambda step: jnp.eye(2), steps=20, progress=False)
      >>> [params["w"].ravel().round(3).tolist() for params in found]
      [[1.0, 1.0], [1.0, 1.0]]

    References:
      Mirzadeh et al., `Improved Knowledge Distillation via Teacher Assistant
      <https://arxiv.org/abs/1902.03393>`_, 2019
      Furlanello et al., `Born-Again Neural Networks <https://arxiv.org/abs/1805.04770>`_, 2018
    """
    who = "succession"
    if not successors:
        raise ValueError("succession: no successors; give [(network, parameters), ...]")
    master, params, found = as_network(teacher, who, "teacher"), teacher_params, []
    schemes: dict[Any, Any] = {}
    for i, (student, start) in enumerate(successors):
        network = as_network(student, who, f"successor {i}")
        fixed = hasattr(optimizer, "update")
        if (pair := (network, master)) not in schemes or not fixed:
            tx = optimizer if fixed else optimizer(i)  # type: ignore[operator]
            schemes[pair] = teacher_student(network, master, loss, tx)
        state = schemes[pair].init(start, params, key=key)
        score = None if evaluate is None else lambda state: evaluate(state.student)
        done = fit(
            schemes[pair].step,
            state,
            batches,
            steps=steps,
            evaluate=score,
            every=every,
            progress=progress,
            title=f"{i + 1} of {len(successors)}",
        )
        params, master = done.best.student, network
        found.append(params)
    return found
