"""Layer by layer: each stage of a student imitates the teacher's on the teacher's own inputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from ._core import Loss, pairs, side_by_side
from ._features import reconstruction
from ._network import Network, Seen, as_network
from ._place import Place
from ._state import Scheme, State


def layerwise(
    students: Sequence[Any],
    teachers: Sequence[Any],
    optimizer: Any,
    *,
    loss: Loss | None = None,
    mesh: Mesh | None = None,
    axis: str = "data",
) -> Scheme:
    r"""Trains the stages of a student each on what the teacher's stage takes and gives.

    With the teacher's activations `a_0 = x`, `a_{i+1} = t_i(a_i)`, stage `i` descends

    .. math:: \|s_i(a_i) - a_{i+1}\|^2 / \|a_{i+1}\|^2

    apart from all others, in one program. No stage sees the errors of those before it: follow it
    by :func:`teacher_student` on the whole. Where the model is one function that cannot be cut,
    give that scheme taps and :func:`reconstruction`.

    Args:
      students: functions or networks `(params, a) -> a`; compressed parameters are welcome.
      teachers: as many.
      optimizer: any optax transformation; a list for one each.
      loss: `(student, teacher, batch) -> value` of each stage; default :func:`reconstruction`.
      mesh: devices over which batches are divided.
      axis: the axis of the mesh that divides them.

    Returns:
      ``(init, step)``: ``init(list_of_student_params, list_of_teacher_params, *, key=None)``;
      a batch is what the first stage reads, and metrics are arrays, one entry a stage.

    Raises:
      TypeError: as :func:`teacher_student`.
      ValueError: for lists of different lengths.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill
      >>> stage = lambda params, x: x @ params["w"]
      >>> scheme = distill.layerwise([stage, stage], [stage, stage], optax.sgd(0.5))
      >>> one, zero = {"w": jnp.eye(2)}, {"w": jnp.zeros((2, 2))}
      >>> state = scheme.init([zero, one], [one, one])
      >>> scheme.step(state, jnp.eye(2))[1]["loss"]
      Array([1., 0.], dtype=float32)
    """
    who = "layerwise"
    if len(students) != len(teachers) or not students:
        raise ValueError(
            f"layerwise: {len(students)} stages of the student, {len(teachers)} of the teacher; "
            "give as many"
        )
    masters = [as_network(t, who, f"teacher stage {i}") for i, t in enumerate(teachers)]
    stages = [
        dataclasses.replace(as_network(s, who, f"student stage {i}"), inputs=_entry(i))
        for i, s in enumerate(students)
    ]

    def activations(params: Sequence[Any], batch: Any) -> list[Any]:
        start = masters[0].inputs(batch)
        found = [start if isinstance(start, tuple) else (start,)]
        for network, p in zip(masters, params, strict=True):
            seen = dataclasses.replace(network, inputs=lambda given: given).look(p, found[-1])
            found.append((seen.out,))
        return found

    def imitate(student: Seen, teacher: Seen, batch: Any) -> Any:
        return reconstruction(student.out, teacher.out)

    scheme = side_by_side(
        stages,
        [Network(lambda params, x: x, inputs=_entry(i + 1)) for i in range(len(stages))],
        [loss or imitate] * len(stages),
        lambda i, shown, fixed: fixed[i],
        pairs(optimizer, None, len(stages), who),
        place=Place(mesh, axis, who),
        who=who,
        prepared=activations,
    )

    def init(students: Any, teachers: Any, *, key: Any = None) -> State:
        for name, given in (("student_params", students), ("teacher_params", teachers)):
            if not isinstance(given, (list, tuple)) or len(given) != len(stages):
                raise ValueError(f"layerwise: {name} must be a list of {len(stages)}")
        return scheme.init(students, teachers, heads=[None] * len(stages), key=key)

    return Scheme(init, scheme.step)


def _entry(i: int) -> Any:
    return lambda found: found[i]
