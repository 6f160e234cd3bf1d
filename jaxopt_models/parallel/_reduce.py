"""Averages of gradients over devices, as an optax transformation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from ._codecs import Int8, TopK


class ReduceState(NamedTuple):
    """What :func:`all_reduce` keeps on each device.

    Args:
      lost: arrays by name: what has not been sent yet, `float32`.
    """

    lost: Any


def all_reduce(
    codec: Int8 | TopK | None = None, *, axis: str | Sequence[str] = "data", feedback: bool = True
) -> optax.GradientTransformation:
    r"""Averages updates over the devices of a mapped axis, in few bytes.

    .. math:: u = \mathrm{mean}_d\, C(g_d + e_d), \qquad e_d \leftarrow g_d + e_d - C(g_d + e_d)

    It stands first in an ``optax.chain`` whose ``init`` and ``update`` run inside ``jax.shard_map``
    or ``jax.pmap``: what is lost differs from device to device. :func:`data_parallel` arranges
    that. All updates together travel as one array of `float32`.

    Args:
      codec: :class:`Int8`, :class:`TopK`, or ``None`` for ``pmean``, as it is.
      axis: the mapped axis or axes.
      feedback: keep what was not sent, `e`, and add it in the next step. Without, errors that
        have a direction add up.

    Returns:
      An optax transformation.

    Raises:
      TypeError: if ``codec`` is none.
      NameError: from JAX, outside of a mapped axis.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from jaxopt_models import parallel
      >>> tx = optax.chain(parallel.all_reduce(parallel.Int8(), axis="data"), optax.sgd(1.0))
      >>> def step(grads):
      ...     return tx.update(grads, tx.init(grads))[0]
      >>> grads = {"w": jnp.array([[127.0, -1.0]])}
      >>> jax.pmap(step, axis_name="data", devices=jax.devices()[:1])(grads)["w"].tolist()
      [[-127.0, 1.0]]

    References:
      Karimireddy et al., `Error Feedback Fixes SignSGD <https://arxiv.org/abs/1901.09847>`_, 2019
    """
    known = hasattr(codec, "mean") and hasattr(codec, "lost") and not isinstance(codec, type)
    if codec is not None and not known:
        raise TypeError(
            f"all_reduce: codec={codec!r}; give parallel.Int8(), parallel.TopK() or None"
        )
    names = (axis,) if isinstance(axis, str) else tuple(axis)

    def init(params: Any) -> ReduceState:
        size = sum(x.size for x in jax.tree.leaves(params))
        if codec is None or not feedback or not size:
            return ReduceState({})
        return ReduceState(codec.lost(size, lax.axis_size(names)))

    def update(updates: Any, state: ReduceState, params: Any = None) -> tuple[Any, ReduceState]:
        leaves, treedef = jax.tree.flatten(updates)
        if codec is None or not leaves:
            return jax.tree.map(lambda x: lax.pmean(x, names), updates), state
        flat = jnp.concatenate([x.astype(jnp.float32).reshape(-1) for x in leaves])
        count = lax.axis_size(names)
        before = state.lost if feedback else codec.lost(flat.size, count)
        mean, lost = codec.mean(flat, before, names, count)
        # A step that is skipped for its NaN must not spoil those after it.
        finite = jnp.all(jnp.isfinite(mean))
        lost = jax.tree.map(lambda new, old: jnp.where(finite, new, old), lost, before)
        ends = [0]
        for x in leaves:
            ends.append(ends[-1] + math.prod(x.shape))
        found = [
            mean[a:b].reshape(x.shape).astype(x.dtype)
            for x, a, b in zip(leaves, ends[:-1], ends[1:], strict=True)
        ]
        return treedef.unflatten(found), ReduceState(lost) if feedback else state

    return optax.GradientTransformation(init, update)
