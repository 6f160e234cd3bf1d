"""Pipeline parallelism: stages of a model on different devices, micro-batches in a line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from .._options import flag, whole
from ..distill._core import one_number
from ._apart import Apart, held_apart, place, wrapped
from ._line import Line
from ._passes import forward, gpipe, one_by_one
from ._slices import Slices
from ._steps import Training, training
from ._timetable import Timetable

Loss = Callable[[Any, Any], jax.Array]


class Pipeline(NamedTuple):
    """A model in stages, each on its own device; made by :func:`pipeline`.

    Args:
      place: from a list of the stages' parameters to the :class:`Apart` that all others take.
      forward: `(members, x) -> out`, the last stage's output of the whole batch.
      value_and_grad: from a loss to a function `(members, x, target) -> (value, gradients)`.
      training: `(loss, optimizer, *, max_norm=None)` to ``(init, step)``.
      timetable: what each stage does when.
    """

    place: Callable[[Sequence[Any]], Apart]
    forward: Callable[[Any, Any], Any]
    value_and_grad: Callable[[Loss], Callable[[Any, Any, Any], tuple[jax.Array, Apart]]]
    training: Callable[..., Training]
    timetable: Timetable


def pipeline(
    stages: Callable[..., Any] | Sequence[Callable[..., Any]],
    mesh: Mesh,
    *,
    microbatches: int,
    axis: str = "stage",
    data: str | None = None,
    schedule: str = "gpipe",
    remat: bool = True,
) -> Pipeline:
    r"""Runs and trains a model whose stages lie on different devices.

    .. math:: y = f_S(\theta_S, \dots f_2(\theta_2, f_1(\theta_1, x))), \qquad
        L = \frac{1}{M} \sum_{m=1}^{M} \ell(y_m, t_m)

    A batch is divided into `M` micro-batches, and while one is in stage 2, the next one is in
    stage 1. One program serves all devices: device `s` along ``axis`` holds the parameters of
    stage `s` only and runs that stage only; between ticks each hands its output to the next. While
    a stage waits, it computes nothing. Stages may be different functions of different structures,
    what they hand on may differ in structure, shape and data type, and any of their parameters
    may be compressed. `L` is the loss of the whole batch where :math:`\ell` is a mean over
    examples.

    Args:
      stages: functions `(params, x) -> x`, one for each device along ``axis``; one function if
        they are all the same.
      mesh: the devices.
      microbatches: `M`; more of them, less waiting.
      axis: the mesh axis with a stage on each of its devices.
      data: a mesh axis that divides batches (and each part into micro-batches); gradients are
        averaged over it.
      schedule: ``"gpipe"``: all micro-batches go forward, then all backward; ``"1f1b"``: each goes
        backward as soon as it can, so that what a device keeps does not grow with `M`. Both wait
        :math:`(S - 1) / (M + S - 1)` of the time; see :class:`Timetable`.
      remat: whether a stage is computed again on the way back, so that its input alone is kept;
        ``"1f1b"`` always does.

    Returns:
      A :class:`Pipeline`. Batches (and targets) are trees of arrays `[B, ...]`, `B` a multiple of
      `M` (times the devices of ``data``). Gradients are an :class:`Apart`, without codes and masks;
      ``gradients.members()`` are in the structure of :func:`jaxopt_models.partition`'s first half.

    Raises:
      TypeError: for stages that are no functions, or options of another type.
      ValueError: for stages fewer or more than devices, an axis that the mesh has not, another
        schedule, ``"1f1b"`` without ``remat``; when called, for batches that do not divide.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import parallel
      >>> mesh = jax.make_mesh((1,), ("stage",))
      >>> stage = lambda params, x: x @ params["w"]
      >>> pipe = parallel.pipeline([stage], mesh, microbatches=2)
      >>> members = pipe.place([{"w": jnp.eye(2)}])
      >>> loss = lambda out, target: jnp.mean((out - target) ** 2)
      >>> value, grads = pipe.value_and_grad(loss)(members, jnp.eye(2), jnp.zeros((2, 2)))
      >>> float(value), grads.members()[0]["w"].tolist()
      (0.5, [[0.5, 0.0], [0.0, 0.5]])

    References:
      Huang et al., `GPipe <https://arxiv.org/abs/1811.06965>`_, 2018; Narayanan et al.,
      `Memory-Efficient Pipeline-Parallel DNN Training <https://arxiv.org/abs/2006.09503>`_, 2020
    """
    slices = Slices(mesh, axis, data, "pipeline")
    given = slices.functions(stages, "stage", "(params, x) -> x")
    count = whole(microbatches, "pipeline: microbatches", least=1)
    table = Timetable(slices.count, count, schedule=schedule)
    if not flag(remat, "pipeline: remat") and schedule == "1f1b":
        raise ValueError(
            "pipeline: remat=False with schedule='1f1b', which keeps inputs of stages alone; "
            "give schedule='gpipe', or leave remat=True"
        )
    by_rows = PartitionSpec(data) if data else PartitionSpec()
    answers, learns = wrapped(given, learn=False), wrapped(given, learn=True)

    def divided(x: Any) -> Any:
        """Returns this device's rows as micro-batches, `[M, b, ...]`."""
        return jax.tree.map(lambda a: a.reshape(count, a.shape[0] // count, *a.shape[1:]), x)

    def check(x: Any, name: str) -> int:
        """Returns the rows of a batch, which divide."""
        found = []
        parts = count * slices.shards
        for path, a in jax.tree_util.tree_flatten_with_path(x)[0]:
            shape = jnp.shape(a)
            if not shape or not shape[0] or shape[0] % parts:
                over = f" on each of {slices.shards} parts" if data else ""
                raise ValueError(
                    f"pipeline: {name}{jax.tree_util.keystr(path)} has shape {list(shape)}, whose "
                    f"rows do not divide into {count} micro-batches{over}; give a multiple of "
                    f"{parts} rows"
                )
            found.append(shape[0])
        if len(set(found)) != 1:
            raise ValueError(f"pipeline: arrays of {name} have rows {found}; give the same of each")
        return found[0]

    @jax.jit
    def answer(members: Apart, x: Any) -> Any:
        rows = check(x, "x") // (count * slices.shards)

        def shown(out: Any, _: Any) -> Any:
            for a in jax.tree.leaves(out):
                if jnp.shape(a)[:1] != (rows,):
                    raise ValueError(
                        f"pipeline: the last stage returns an array of shape {list(jnp.shape(a))} "
                        f"for {rows} rows; forward puts micro-batches together by their rows, the "
                        "first axis: return them there"
                    )
            return out

        def local(members: Apart, x: Any) -> Any:
            line = Line.of(slices, answers, members.arrangement, shown, divided(x), ())
            done = forward(line, members.held())
            return jax.tree.map(lambda a: a.reshape(1, -1, *a.shape[2:]), done)

        specs = slices.apart.spec, by_rows
        outs = slices.mapped(local, specs, PartitionSpec(axis, data))(members, x)
        return jax.tree.map(lambda a: a[-1], outs)

    def value_and_grad(loss: Loss) -> Callable[[Any, Any, Any], tuple[jax.Array, Apart]]:
        if not callable(loss):
            raise TypeError(f"pipeline: loss is {type(loss).__name__}; give (out, target) -> value")

        def checked(out: Any, target: Any) -> jax.Array:
            return one_number(loss(out, target), "pipeline")

        @jax.jit
        def run(members: Apart, x: Any, target: Any) -> tuple[jax.Array, Apart]:
            n, m = check(x, "x"), check(target, "target")
            if n != m:
                raise ValueError(f"pipeline: x has {n} rows, target {m}; give a target for each")

            def local(trained: Apart, rest: Apart, x: Any, target: Any) -> Any:
                a, b = trained.held(), rest.held()
                line = Line.of(
                    slices, learns, trained.arrangement, checked, divided(x), divided(target)
                )
                if schedule == "gpipe":
                    value, grads = gpipe(line, a, b, remat=remat)
                else:
                    value, grads = one_by_one(line, a, b, table)
                value = jax.lax.psum(value, axis)  # it is zero but on the last stage
                if data:
                    value, grads = jax.lax.pmean((value, grads), data)
                return value, jax.tree.map(lambda g: g[None], grads)

            spec = slices.apart.spec
            mapped = slices.mapped(local, (spec, spec, by_rows, by_rows), (PartitionSpec(), spec))
            value, grads = mapped(*members.split(), x, target)
            return value, Apart(grads, members.arrangement)

        return lambda members, x, target: run(held_apart(members, slices), x, target)

    return Pipeline(
        place=lambda members: place(members, slices, name="stages' parameters"),
        forward=lambda members, x: answer(held_apart(members, slices), x),
        value_and_grad=value_and_grad,
        training=lambda loss, optimizer, *, max_norm=None: training(
            slices, value_and_grad(loss), optimizer, max_norm=max_norm
        ),
        timetable=table,
    )
