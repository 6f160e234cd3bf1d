"""Statistics of inputs in the `[in, out]` view of a parameter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._axes import Axes, Matrix
from .._bits import is_concrete
from .._encoder import not_finite


def check_roles(stats: Any, axes: Axes, ndim: int, who: str) -> None:
    """Raises unless statistics are of the inputs that the roles of a core tensor name."""
    if stats is None:
        raise ValueError(f"{who} needs statistics; calibrate and pass stats=")
    seen = stats.axes.resolve(ndim + stats.axes.stack).out
    if seen != axes.out:
        raise ValueError(
            f"{who}: the statistics are of inputs of a parameter with out axes {seen}, the rule "
            f"says {axes.out}; leave axes out of the rule, or use a method without statistics"
        )
    if inner := {axis for axis, _ in stats.groups} - set(axes.out):
        raise ValueError(f"{who}: inputs differ along axes {sorted(inner)}, which are no outputs")


def check_gram(stats: Any, axes: Axes, ndim: int, who: str) -> None:
    """Raises unless statistics of a core tensor have the gram of its inputs, all of it finite."""
    check_roles(stats, axes, ndim, who)
    if "gram" not in stats.states:
        raise ValueError(f"{who} needs the statistic 'gram'; it was given {stats.names}")
    check_finite(stats, who)


def check_finite(stats: Any, who: str) -> None:
    """Raises where products of inputs, as far as they can be seen, are not finite."""
    for n in ("gram", "drift"):
        found = stats.states.get(n)
        bad = not_finite(found) if is_concrete(found) else 0
        if is_concrete(bad) and int(bad):
            raise ValueError(
                f"{who}: the {n} of the inputs holds NaN or Inf; check the batches, or the "
                "layers before this one"
            )


def with_squares(stats: Any) -> Any:
    """Adds ``l2`` to statistics with a gram, which it is the diagonal of."""
    squares = jnp.diagonal(stats.states["gram"], axis1=-2, axis2=-1)
    # Sums of squares; rounding of a gram may leave the least of them below zero.
    return dataclasses.replace(stats, states={**stats.states, "l2": jnp.maximum(squares, 0)})


def of_columns(value: jax.Array, groups: tuple[tuple[int, int], ...], m: Matrix) -> jax.Array:
    """Spreads statistics `[*groups, ...]` over the columns that see them: `[columns, ...]`."""
    if not groups:
        return jnp.broadcast_to(value, (m.columns, *value.shape))
    for i, (axis, n) in enumerate(groups):
        value = jnp.repeat(value, m.core[axis] // n, axis=i)
    # Output axes of which inputs do not differ are spread, too, in the order of the view.
    order = sorted(range(len(groups)), key=lambda i: groups[i][0])
    rest = value.shape[len(groups) :]
    value = value.transpose(*order, *range(len(groups), value.ndim))
    grouped = {axis for axis, _ in groups}
    shape = [m.core[a] if a in grouped else 1 for a in m.out]
    value = jnp.broadcast_to(value.reshape(*shape, *rest), (*m.out_shape, *rest))
    return value.reshape(m.columns, *rest)


def by_column(stats: Any, name: str, m: Matrix, axes: Axes) -> jax.Array:
    """Returns a statistic of rows for each entry: `[rows, columns]` of the view ``m``.

    Args:
      stats: statistics of a core tensor.
      name: ``"l2"``, ``"absmax"``, ``"mean"``.
      m: the view, which may be coarser than ``axes`` (one column for all).
      axes: roles of the axes of the core tensor.
    """
    check_roles(stats, axes, len(m.core), name)
    true = Matrix(m.core, axes.out)
    rows = of_columns(getattr(stats, name), stats.groups, true).T
    return rows if true.out == m.out else m.view(true.unview(rows))


def split_columns(x: jax.Array, groups: tuple[tuple[int, int], ...], m: Matrix) -> jax.Array:
    """Sorts `[rows, columns]` by what its columns see: `[n, rows, columns / n]`.

    ``n`` is the number of groups of a grouped convolution, 1 without.
    """
    if not groups:
        return x[None]
    counts = dict(groups)
    shape, first, second = [x.shape[0]], [], []
    for a, size in zip(m.out, m.out_shape, strict=True):
        if a in counts:
            first.append(len(shape))
            shape.append(counts[a])
        second.append(len(shape))
        shape.append(size // counts.get(a, 1))
    order = (*first, 0, *second)
    n = 1
    for _, count in groups:
        n *= count
    return x.reshape(shape).transpose(order).reshape(n, x.shape[0], x.shape[1] // n)


def join_columns(x: jax.Array, groups: tuple[tuple[int, int], ...], m: Matrix) -> jax.Array:
    """Undoes :func:`split_columns`."""
    if not groups:
        return x[0]
    rows = x.shape[1]
    places = split_columns(jnp.arange(m.columns)[None], groups, m).reshape(-1)
    flat = x.transpose(1, 0, 2).reshape(rows, m.columns)
    return jnp.zeros_like(flat).at[:, places].set(flat)
