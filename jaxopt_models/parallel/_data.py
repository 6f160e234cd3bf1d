"""Training with batches divided over devices, and gradients that travel compressed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._options import whole
from .._partition import combine, partition
from .._spread import spread
from ..distill._core import split_loss
from ..distill._place import Place
from ._codecs import Int8, TopK
from ._reduce import all_reduce
from ._steps import check_given


class DataParallel(NamedTuple):
    """A training over devices, as functions.

    Args:
      init: from parameters to the :class:`DataState` before the first step.
      step: `(state, batch, *beside) -> (state, metrics)`, compiled once; the state that goes in is
        given up.
      compiled: of the same arguments, the compiled program of a step, to be read.
    """

    init: Callable[..., DataState]
    step: Callable[..., tuple[DataState, dict[str, jax.Array]]]
    compiled: Callable[..., Any]


class DataState(NamedTuple):
    """Everything that a step needs and changes.

    Args:
      trained: of the parameters what is trained, on every device.
      rest: the rest of them: codes, masks, counters.
      opt: the optimizer's state, on every device.
      lost: for each device what it has not sent yet, divided over the devices.
      step: number of steps done.
    """

    trained: Any
    rest: Any
    opt: Any
    lost: Any
    step: jax.Array

    @property
    def params(self) -> Any:
        """The parameters, in the form they came in."""
        return combine(self.trained, self.rest)


def data_parallel(
    loss: Callable[..., Any],
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    axis: str = "data",
    codec: Int8 | TopK | None = None,
    feedback: bool = True,
    micro: int = 1,
) -> DataParallel:
    r"""Trains on batches that are divided over the devices of a mesh axis.

    .. math:: \theta \leftarrow \theta + \mathrm{opt}\Bigl(\frac1n \sum_d C\bigl(
              \tfrac1m \textstyle\sum_j \nabla \ell(\theta, x_{dj}) \bigr)\Bigr)

    Every device computes the gradients of its part of the batch, in ``micro`` pieces one after
    another where that is too large at once; :func:`all_reduce` averages them. Parameters and the
    optimizer's state are on all devices, and stay equal there to the bit. What is not trained, such
    as batch statistics, stays as it is.

    Args:
      loss: `(params, batch, *beside) -> value` or `(value, metrics)`, a mean over examples that
        knows nothing of the mesh. Distilling, it runs the teacher, whose parameters come beside.
      optimizer: any optax transformation.
      mesh: the devices.
      axis: the axis over which the first axis of all arrays of a batch is divided.
      codec: how gradients travel: :class:`Int8`, :class:`TopK`, or ``None`` for `float32`.
      feedback: keep what was not sent, and send it later.
      micro: number of pieces in which a device takes its part.

    Returns:
      ``(init, step, compiled)``: ``init(params)``, ``step(state, batch, *beside)``, where
      ``beside`` are trees on every device that are not trained. Metrics are means over devices
      and pieces.

    Raises:
      TypeError: for a loss, an optimizer, a mesh or a codec that is none.
      ValueError: for an unknown axis, or when called, if a batch does not divide.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import parallel
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> loss = lambda params, x: jnp.mean((x @ params["w"] - 1) ** 2)
      >>> train = parallel.data_parallel(loss, optax.sgd(0.5), mesh, codec=parallel.Int8(), micro=2)
      >>> state, metrics = train.step(train.init({"w": jnp.zeros((1, 1))}), jnp.ones((4, 1)))
      >>> float(metrics["loss"]), float(state.params["w"][0, 0])
      (1.0, 1.0)
    """
    who = "data_parallel"
    place = Place(mesh, axis, who)
    if place.mesh is None:
        raise TypeError(f"{who}: mesh is None; give a Mesh, such as jax.make_mesh((8,), ('data',))")
    if not callable(loss):
        raise TypeError(f"{who}: loss is {type(loss).__name__}; give (params, batch) -> value")
    if not hasattr(optimizer, "update"):
        raise TypeError(f"{who}: optimizer is {type(optimizer).__name__}; give optax.adam(1e-3)")
    micro = whole(micro, f"{who}: micro")
    if micro < 1:
        raise ValueError(f"{who}: micro={micro} is not positive")
    optimizer = optax.with_extra_args_support(optimizer)
    reduce = all_reduce(codec, axis=axis, feedback=feedback)
    auto, everywhere, divided = place.mesh, PartitionSpec(), PartitionSpec(axis)

    def mapped(fn: Callable[..., Any], ins: Any, outs: Any) -> Callable[..., Any]:
        # Derivatives by what is on every device stay each device's own.
        return jax.shard_map(fn, mesh=auto, in_specs=ins, out_specs=outs, check_vma=False)

    def per_device(tree: Any) -> Any:
        return jax.tree.map(lambda x: x[None], tree)

    @jax.jit
    def nothing_lost(trained: Any) -> Any:
        run = mapped(lambda t: per_device(reduce.init(t)), (everywhere,), divided)
        return run(trained)

    def init(params: Any) -> DataState:
        trained, rest = partition(params)
        if not jax.tree.leaves(trained):
            raise TypeError(f"{who}: the parameters hold nothing floating to train")
        trained, rest = jax.tree.map(jnp.copy, (trained, rest))
        state = (trained, rest, optimizer.init(trained))
        there = NamedSharding(auto, everywhere)
        *placed, count = jax.tree.map(lambda x: spread(x, there), (*state, jnp.int32(0)))
        return DataState(*placed, nothing_lost(placed[0]), count)

    def gradients(trained: Any, rest: Any, batch: Any, beside: Any) -> Any:
        def value(t: Any, piece: Any) -> Any:
            found = split_loss(loss(combine(t, rest), piece, *beside), who)
            return found[0], found[1]

        slopes = jax.value_and_grad(value, has_aux=True)
        if micro == 1:
            return slopes(trained, batch)
        pieces = jax.tree.map(lambda x: x.reshape(micro, -1, *x.shape[1:]), batch)
        shapes = jax.eval_shape(slopes, trained, jax.tree.map(lambda x: x[0], pieces))
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def add(sums: Any, piece: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, sums, slopes(trained, piece)), None

        sums, _ = lax.scan(add, zeros, pieces)
        return jax.tree.map(lambda x: x / micro, sums)

    def local(trained: Any, rest: Any, opt: Any, lost: Any, batch: Any, *beside: Any) -> Any:
        (value, metrics), grads = gradients(trained, rest, batch, beside)
        mine = jax.tree.map(lambda x: x[0], lost)
        grads, mine = reduce.update(grads, mine)
        shown = lax.pmean({"loss": value, **metrics}, axis)
        updates, opt = optimizer.update(grads, opt, trained, value=shown["loss"])
        return optax.apply_updates(trained, updates), opt, per_device(mine), shown

    @functools.partial(jax.jit, donate_argnums=0)
    def advance(state: DataState, batch: Any, *beside: Any) -> Any:
        ins = (everywhere, everywhere, everywhere, divided, divided, *[everywhere] * len(beside))
        outs = (everywhere, everywhere, divided, everywhere)
        trained, opt, lost, shown = mapped(local, ins, outs)(
            state.trained, state.rest, state.opt, state.lost, batch, *beside
        )
        return DataState(trained, state.rest, opt, lost, state.step + 1), shown

    def placed(state: Any, batch: Any) -> Any:
        check_given(state, DataState, who)
        rows = mesh.shape[axis] * micro
        for x in jax.tree.leaves(batch):
            if not jnp.shape(x) or not jnp.shape(x)[0] or jnp.shape(x)[0] % rows:
                raise ValueError(
                    f"{who}: a batch holds an array of shape {jnp.shape(x)}, which does not divide "
                    f"into {micro} pieces for each of the {mesh.shape[axis]} devices of {axis!r}"
                )
        return place.batch(batch)

    def step(state: DataState, batch: Any, *beside: Any) -> tuple[DataState, dict[str, jax.Array]]:
        return advance(state, placed(state, batch), *beside)

    def compiled(state: DataState, batch: Any, *beside: Any) -> Any:
        return advance.lower(state, placed(state, batch), *beside).compile()

    return DataParallel(init, step, compiled)
