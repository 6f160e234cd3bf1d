"""Teachers on different devices, and their student."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import optax
from jax.sharding import Mesh

from ..distill._core import Loss, check_loss
from ..distill._network import Network, Seen, as_network
from ..distill._state import Scheme, State
from ..distill._teach import one_student
from ._apart import place, run_apart
from ._slices import Slices


def teachers(
    networks: Any | Sequence[Any],
    mesh: Mesh,
    *,
    axis: str = "teacher",
    data: str | None = None,
    combine: Callable[[list[Any]], Any] | None = None,
) -> Network:
    """Returns several teachers, each on its own devices, as one network.

    Its parameters are an :class:`Apart` of the teachers', and it takes the place of a teacher in
    every scheme of :mod:`jaxopt_models.distill`: what it shows is what all of them show, computed
    side by side. Outputs (and values that are tapped) alone travel.

    Args:
      networks: a function or :class:`~jaxopt_models.distill.Network` for each teacher; a single
        one for all. They may read different parts of a batch.
      mesh: the devices.
      axis: the mesh axis with a teacher on each of its devices.
      data: a mesh axis that divides batches; ``None``: each teacher sees the whole batch.
      combine: from the list of outputs to the one that is shown, such as :func:`mean`; default:
        ``out`` is the list of :class:`~jaxopt_models.distill.Seen`, one for each.

    Returns:
      The network.

    Raises:
      TypeError, ValueError: as :func:`apart`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill, parallel
      >>> mesh = jax.make_mesh((1,), ("teacher",))
      >>> fn = lambda params, x: x @ params["w"]
      >>> ensemble = parallel.teachers([fn], mesh, combine=parallel.mean)
      >>> loss = lambda student, teacher, batch: distill.hint(student.out, teacher.out)
      >>> scheme = distill.teacher_student(fn, ensemble, loss, optax.sgd(0.5))
      >>> ones = parallel.Apart.of([{"w": jnp.ones((2, 1))}], mesh, axis="teacher")
      >>> state = scheme.init({"w": jnp.zeros((2, 1))}, ones)
      >>> state, metrics = scheme.step(state, jnp.eye(2))
      >>> float(metrics["loss"]), state.student["w"].ravel().tolist()
      (1.0, [0.5, 0.5])
    """
    slices = Slices(mesh, axis, data, "teachers")
    run = _shown(networks_of(networks, slices, "teacher"), slices)

    def fn(params: Any, batch: Any) -> Any:
        found = run(params, batch)
        return found if combine is None else combine([seen.out for seen in found])

    return Network(fn, inputs=lambda batch: (batch,))


def teacher_student(
    student: Any,
    teachers: Any | Sequence[Any],
    loss: Loss,
    optimizer: optax.GradientTransformation,
    *,
    mesh: Mesh,
    axis: str = "teacher",
    data: str | None = None,
    heads_optimizer: optax.GradientTransformation | None = None,
) -> Scheme:
    """Trains a student on what several teachers show, each of which lives on its own devices.

    It computes what :func:`jaxopt_models.distill.teacher_student` does with a list of teachers,
    in one program in which each device holds the parameters of one teacher; the losses are the
    same. Teachers may differ in everything, and be compressed.

    Args:
      student: function `(params, x) -> out`, or a :class:`~jaxopt_models.distill.Network`.
      teachers: one for each device along ``axis``; a single one if they differ by their
        parameters alone.
      loss: `(student, teachers, batch) -> value`, as there; ``teachers`` is a list.
      optimizer: any optax transformation.
      mesh: the devices.
      axis: the mesh axis with a teacher on each of its devices.
      data: ``None``: every device steps with the student on the whole batch, which changes no
        bit; a mesh axis that divides the batches of all; or ``axis`` itself, which divides the
        student's part among the teachers' devices, each of which still teaches the whole batch.
      heads_optimizer: another one for heads; default: the same.

    Returns:
      ``(init, step)``, as :func:`jaxopt_models.distill.teacher_student`; ``init`` takes a list of
      the teachers' parameters, or an :class:`Apart` of them.

    Raises:
      TypeError, ValueError: as there, and as :func:`apart`.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import distill, parallel
      >>> mesh = jax.make_mesh((1,), ("teacher",))
      >>> fn = lambda params, x: x @ params["w"]
      >>> loss = lambda student, teachers, batch: distill.hint(student.out, teachers[0].out)
      >>> scheme = parallel.teacher_student(fn, [fn], loss, optax.sgd(0.5), mesh=mesh)
      >>> state = scheme.init({"w": jnp.zeros((2, 1))}, [{"w": jnp.ones((2, 1))}])
      >>> state, metrics = scheme.step(state, jnp.eye(2))
      >>> state.student["w"].ravel().tolist()
      [0.5, 0.5]
    """
    who = "parallel.teacher_student"
    check_loss(loss, who)
    slices = Slices(mesh, axis, None if data == axis else data, who)
    run = _shown(networks_of(teachers, slices, "teacher"), slices)
    scheme = one_student(
        student,
        Network(run, inputs=lambda batch: (batch,)),
        lambda seen, others, batch: loss(seen, others.out, batch),
        optimizer,
        heads_optimizer=heads_optimizer,
        mesh=slices.mesh,
        axis=data,
        who=who,
    )

    def init(student: Any, teachers: Any, **options: Any) -> State:
        return scheme.init(student, place(teachers, slices, name="teachers' parameters"), **options)

    return Scheme(init, scheme.step)


def networks_of(given: Any, slices: Slices, name: str) -> list[Network]:
    """Returns a network for each member; the same one for what is the same."""
    several = isinstance(given, (list, tuple))
    items = slices.listed(given, f"{name}s") if several else [given] * slices.count
    made: dict[int, Network] = {}
    for i, item in enumerate(items):
        if id(item) not in made:
            made[id(item)] = as_network(item, slices.who, f"{name} {i}")
    return [made[id(item)] for item in items]


def _shown(networks: Sequence[Network], slices: Slices) -> Callable[..., list[Seen]]:
    """Returns the function from members and a batch to what each of them shows."""
    looks: dict[int, Callable[..., Seen]] = {}
    for network in networks:
        if id(network) not in looks:

            def look(params: Any, batch: Any, network: Network = network) -> Seen:
                # Its parameters stay where they are.
                return dataclasses.replace(network.look(params, batch), params=None, new=None)

            looks[id(network)] = look
    runs = [looks[id(network)] for network in networks]
    return run_apart(runs, slices, combine=None, learn=False)
