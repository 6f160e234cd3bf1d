"""A teacher that is ahead of its student."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from .._options import whole
from ..distill._network import as_network
from ..distill._place import Place


def ahead(
    teacher: Any,
    params: Any,
    batches: Iterable[Any],
    *,
    mesh: Mesh,
    to: Mesh,
    axis: str | None = "data",
    to_axis: str | None = "data",
    count: int = 1,
) -> Iterator[tuple[Any, Any]]:
    """Gives batches with a teacher's outputs, which are computed while the student steps.

    Teacher and student live on different devices (two meshes, of different shapes if you like).
    Before a batch is given, the teacher has been told to compute the next ``count``: JAX returns
    before devices are done, so the teacher's devices work on the next batch while the student's
    work on this one, and its outputs travel meanwhile. The teacher keeps its own sharding and
    precision: parameters that lie on ``mesh`` already stay as they are divided, compressed ones
    stay compressed.

    Args:
      teacher: function `(params, x) -> out`, or a :class:`~jaxopt_models.distill.Network`, whose
        parameters may be compressed.
      params: the teacher's parameters.
      batches: any iterable of batches.
      mesh: the teacher's devices.
      to: the student's devices.
      axis: the axis of ``mesh`` that divides batches for the teacher; ``None``: none does.
      to_axis: the axis of ``to`` that divides batches and outputs for the student.
      count: how many batches the teacher is ahead; each keeps its outputs in memory.

    Yields:
      ``(batch, outputs)`` on the student's devices; for :func:`jaxopt_models.distill.stored`,
      pass ``(*batch, outputs)`` to the step.

    Raises:
      TypeError, ValueError: for meshes that are none, axes they have not, ``count`` below 1, or
        batches that do not divide.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jaxopt_models import parallel
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> teacher, params = (lambda p, x: x * p["w"]), {"w": jnp.float32(2)}
      >>> batches = [(jnp.ones(2), jnp.zeros(2)), (jnp.zeros(2), jnp.ones(2))]
      >>> for (x, y), logits in parallel.ahead(teacher, params, batches, mesh=mesh, to=mesh):
      ...     print(x.tolist(), y.tolist(), logits.tolist())
      [1.0, 1.0] [0.0, 0.0] [2.0, 2.0]
      [0.0, 0.0] [1.0, 1.0] [0.0, 0.0]
    """
    network = as_network(teacher, "ahead", "teacher")
    there, here = Place(mesh, axis, "ahead"), Place(to, to_axis, "ahead")
    for place, name in ((there, "mesh"), (here, "to")):
        if place.mesh is None:
            raise TypeError(f"ahead: {name}=None; give the mesh of its devices")
    whole(count, "ahead: count", least=1)
    params = there.state(params)
    run = jax.jit(lambda params, batch: network.look(params, batch).out)

    def given() -> Iterator[tuple[Any, Any]]:
        waiting: collections.deque[tuple[Any, Any]] = collections.deque()
        for batch in batches:
            outs = run(params, there.batch(batch))
            waiting.append((here.batch(batch), here.batch(outs)))
            if len(waiting) > count:
                yield waiting.popleft()
        yield from waiting

    return given()
