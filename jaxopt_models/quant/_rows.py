"""Statistics of inputs in the `[in, out]` view of a parameter."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from .._axes import Axes, Matrix
from .._bits import is_concrete
from .._encoder import not_finite

# Statistics with a row for each input, which is the last axis of their states.
_ROWS = ("gram", "l2", "mean", "absmax", "minmax", "drift")


def check_shape(stats: Any, shape: tuple[int, ...], stack: int) -> None:
    """Raises unless statistics can be of the inputs of a parameter of this shape.

    They may have more stack axes than are asked for, which are then pooled.
    """
    lead = _lead(stats, shape[:stack])
    if len(lead) < stack or tuple(shape[: len(lead)]) != lead:
        raise ValueError(
            f"the statistics are of a stack {lead}, it has {tuple(shape[:stack])} of shape "
            f"{tuple(shape)}; calibrate this model"
        )
    _check_rows(stats, tuple(shape[len(lead) :]))


def _lead(stats: Any, default: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the stack that statistics are of."""
    if "count" not in stats.states:
        return tuple(default)
    counts = stats.states["count"].low.shape
    return tuple(counts[: len(counts) - len(stats.groups)])


def _check_rows(stats: Any, core: tuple[int, ...]) -> None:
    """Raises unless statistics can be of the inputs of a core tensor."""
    rows = Matrix(core, _roles(stats, core).out or ()).rows
    for name in _ROWS:
        state = jax.tree.leaves(stats.states.get(name))
        if state and state[0].shape[-1] != rows:
            raise ValueError(
                f"the statistics are of {state[0].shape[-1]} inputs, it has {rows}; calibrate "
                "this model"
            )
    for axis, n in stats.groups:
        if axis >= len(core) or core[axis] % n:
            raise ValueError(
                f"the statistics are of inputs in {n} groups along axis {axis}, its shape is "
                f"{core}; calibrate this model"
            )


def _roles(stats: Any, core: tuple[int, ...]) -> Axes:
    """Returns the resolved roles of the axes of what statistics are of."""
    try:
        found: Axes = stats.axes.resolve(len(core) + stats.axes.stack)
    except ValueError as e:
        raise ValueError(
            f"the statistics are of a parameter with {stats.axes}, its shape is {core}; calibrate "
            "this model"
        ) from e
    return found


def check_roles(stats: Any, axes: Axes, core: tuple[int, ...], who: str) -> None:
    """Raises unless statistics are of the inputs that the roles of a core tensor name."""
    if stats is None:
        raise ValueError(f"{who} needs statistics; calibrate and pass stats=")
    seen = _roles(stats, core).out
    if seen != axes.out:
        raise ValueError(
            f"{who}: the statistics are of inputs of a parameter with out axes {seen}, the rule "
            f"says {axes.out}; leave axes out of the rule, or use a method without statistics"
        )
    if inner := {axis for axis, _ in stats.groups} - set(axes.out):
        raise ValueError(f"{who}: inputs differ along axes {sorted(inner)}, which are no outputs")
    _check_rows(stats, core)


def check_gram(stats: Any, axes: Axes, shape: tuple[int, ...], who: str) -> None:
    """Raises unless statistics have the gram of the inputs of a parameter, all of it finite."""
    check_stats(stats, axes, shape, who)
    if "gram" not in stats.states:
        raise ValueError(f"{who} needs the statistic 'gram'; it was given {stats.names}")
    check_finite(stats, who)


def check_stats(stats: Any, axes: Axes, shape: tuple[int, ...], who: str) -> None:
    """Raises unless statistics are of the inputs of a parameter, of this shape and these roles."""
    core, stack = tuple(shape[axes.stack :]), tuple(shape[: axes.stack])
    check_roles(stats, axes, core, who)
    if (lead := _lead(stats, stack)) != stack:
        raise ValueError(
            f"the statistics are of a stack {lead}, it has {stack} of shape {tuple(shape)}; leave "
            "axes out of the rule, or calibrate this model"
        )


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


def check_matrix(w: Any, gram: Any, who: str) -> None:
    """Raises unless a gram is of the rows of a matrix, all of it finite where it can be seen."""
    rows = w.shape[0] if w.ndim else 0
    if w.ndim != 2 or tuple(gram.shape) != (rows, rows):
        raise ValueError(
            f"{who}: gram has shape {tuple(gram.shape)} for w of shape {tuple(w.shape)}; give "
            "[rows, rows] for [rows, columns]"
        )
    bad = not_finite(gram) if is_concrete(gram) else 0
    if is_concrete(bad) and int(bad):
        raise ValueError(f"{who}: gram holds NaN or Inf in {int(bad)} entries; check the inputs")


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
    check_roles(stats, axes, m.core, name)
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
