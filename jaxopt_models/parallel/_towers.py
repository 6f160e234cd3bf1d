"""Networks on different devices that are trained together, such as towers of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from .._partition import combine
from ..distill._core import one_number
from ._apart import Apart, apart
from ._slices import Slices
from ._steps import Training, training


def towers(
    fns: Callable[..., Any] | Sequence[Callable[..., Any]],
    loss: Callable[..., jax.Array],
    optimizer: Any,
    *,
    mesh: Mesh,
    axis: str = "tower",
    data: str | None = None,
    max_norm: float | None = None,
) -> Training:
    r"""Trains networks, each on its own devices, by one loss of all their outputs.

    .. math:: L(f_1(\theta_1, b), \dots f_n(\theta_n, b),\, b)

    Outputs, and derivatives by them, are all that travels. Each tower may be compressed, or
    prepared for learned quantizers, in its own way, and is trained where
    :func:`jaxopt_models.partition` says.

    Args:
      fns: `(params, *batch) -> out`, one for each device along ``axis``; each takes what it
        reads of the batch.
      loss: `(outs, *batch) -> value`, ``outs`` the list of all outputs of the whole batch.
      optimizer: any optax transformation, each tower having its own state; a list for one each.
      mesh: the devices.
      axis: the mesh axis with a tower on each of its devices.
      data: a mesh axis that divides the rows of batches and outputs.
      max_norm: to what norm all towers' derivatives together are scaled down, as
        `optax.clip_by_global_norm`, which among the optimizers would see one tower alone.

    Returns:
      ``(init, step)``: ``init(list_of_params)`` and ``step(state, *batch)``.

    Raises:
      TypeError, ValueError: as :func:`apart`; for what is no optimizer, or no function; when
        called, for a loss that returns more than a number.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import parallel
      >>> mesh = jax.make_mesh((1,), ("tower",))
      >>> loss = lambda outs, x: jnp.mean((outs[0] - x) ** 2)
      >>> init, step = parallel.towers(
      ...     [lambda p, x: x @ p["w"]], loss, optax.sgd(0.5), mesh=mesh
      ... )
      >>> state = init([{"w": jnp.zeros((2, 2))}])
      >>> state, metrics = step(state, jnp.eye(2))
      >>> float(metrics["loss"]), state.members()[0]["w"].tolist()
      (0.5, [[0.25, 0.0], [0.0, 0.25]])
    """
    who = "towers"
    slices = Slices(mesh, axis, data, who)
    if not callable(loss):
        raise TypeError(f"{who}: loss is {type(loss).__name__}; give (outs, *batch) -> value")
    run = apart(fns, mesh, axis=axis, data=data, learn=True)

    def value_and_grad(members: Apart, *batch: Any) -> tuple[jax.Array, Apart]:
        trained, rest = members.split()

        def total(trained: Apart) -> jax.Array:
            return one_number(loss(run(combine(trained, rest), *batch), *batch), who)

        return jax.value_and_grad(total)(trained)

    return training(slices, value_and_grad, optimizer, max_norm=max_norm)
