"""One generation after another: chains of assistants, and networks born again."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import optax
from jax.sharding import Mesh

from ._core import Loss
from ._fit import fit
from ._network import as_network
from ._teach import teacher_student


def succession(
    teacher: Any,
    teacher_params: Any,
    successors: Sequence[tuple[Any, ...]],
    loss: Loss,
    optimizer: optax.GradientTransformation | Callable[[int], optax.GradientTransformation],
    batches: Any,
    *,
    steps: int,
    evaluate: Callable[[Any], float] | None = None,
    every: int = 0,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 1000,
    mesh: Mesh | None = None,
    axis: str = "data",
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
      successors: `(network, parameters to begin with)`, in order; a third entry is how it teaches
        the next one, if otherwise than it is trained: batch normalization in evaluation.
      loss: `(student, teacher, batch) -> value` of every generation, without heads or memory, for
        which there is no place here: train those by :func:`teacher_student`, one after another.
      optimizer: an optax transformation, or a function from the number of the generation to one.
      batches: as for :func:`fit`; every generation begins with the first.
      steps: of each generation.
      evaluate: from a student's parameters to a score; with ``every`` the best of a generation
        is kept and teaches the next.
      every: steps between two evaluations.
      checkpoint: folder for checkpoints, one below it for each generation, as for :func:`fit`.
      save_every: steps between two checkpoints.
      mesh: devices over which batches are divided.
      axis: the axis of the mesh that divides them.
      key: random key.
      progress: show a bar.

    Returns:
      The trained parameters of each generation.

    Raises:
      ValueError: for no successors, or a stateful one that is not told how it teaches.

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
    for i, (student, start, *teaching) in enumerate(successors):
        network = as_network(student, who, f"successor {i}")
        if network.stateful and not teaching and i + 1 < len(successors):
            raise ValueError(
                f"succession: successor {i} is stateful and teaches the next one; add how it "
                "computes in evaluation: (network, parameters, evaluation network)"
            )
        if hasattr(optimizer, "update"):
            # Generations of the same networks share one program.
            if (network, master) not in schemes:
                schemes[network, master] = teacher_student(
                    network, master, loss, optimizer, mesh=mesh, axis=axis
                )
            scheme = schemes[network, master]
        else:
            scheme = teacher_student(network, master, loss, optimizer(i), mesh=mesh, axis=axis)
        score = None if evaluate is None else lambda state: evaluate(state.student)
        done = fit(
            scheme.step,
            scheme.init(start, params, key=key),
            batches,
            steps=steps,
            evaluate=score,
            every=every,
            checkpoint=None if checkpoint is None else os.path.join(checkpoint, str(i)),
            save_every=save_every,
            progress=progress,
            title=f"{i + 1} of {len(successors)}",
        )
        params = done.best.student
        master = as_network(teaching[0], who, f"successor {i}") if teaching else network
        found.append(params)
    return found
