"""Which kernels there are, for :func:`jaxopt_models.accelerate`."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from . import _dispatch_binary as _dispatch_binary
from . import _dispatch_sparse as _dispatch_sparse
from ._dispatch_shapes import (
    by_channels,
    by_columns,
    inside,
    many_scales,
    no_floats,
    no_images,
    no_rows,
    of_images,
    of_rows,
    operand,
    unready,
)
from ._encoded import Encoded, innermost
from ._epilogue import NOTHING, Tail
from ._jaxpr import varying
from ._kernels import KERNELS, Kernel
from ._lookup import rows_of
from ._moved import is_moved, pointwise, product
from .kernels import conv
from .kernels._load import chosen
from .kernels.matmul import Packed
from .quant import WithInput


def _unfit(eqn: Any, values: Sequence[Any]) -> str:
    """Says why operands are not for the compiled kernels, ``""`` if they are."""
    position, seen = operand(values)
    leaf, x = seen.leaf, values[1 - position]
    why = unready(leaf, isinstance(innermost(leaf), Packed)) or no_floats(eqn, x)
    if not why and isinstance(leaf, WithInput):
        if leaf.per == "tensor" and varying(x):
            return "its whole input is on several devices"
        if why := many_scales(leaf):
            return why
        if not leaf.symmetric and not is_moved(leaf) and leaf.values.sums is None:
            return "it was packed before it got quant.Input; pack last"
    return why


# ------------------------------------------------------------------ products


def _dot_refuses(eqn: Any, values: Sequence[Any]) -> str:
    return _unfit(eqn, values) or no_rows(eqn, values)


def _dot(eqn: Any, values: Sequence[Any], tail: Tail = NOTHING) -> list[Any]:
    return of_rows(eqn, values, functools.partial(product, **tail.options))


# ------------------------------------------------------------------ convolutions


def _conv_refuses(eqn: Any, values: Sequence[Any]) -> str:
    if why := _unfit(eqn, values) or no_images(eqn, values):
        return why
    leaf, p = operand(values)[1].leaf, eqn.params
    wide = math.prod(inside(leaf).core[:-2]) > 1 or p["feature_group_count"] > 1
    if is_moved(leaf) and (wide or any(map(any, p["padding"]))):
        kind = type(inside(leaf)).__name__
        return f"{kind} is undone to inputs of windows of one pixel alone, without padding"
    return ""


def _conv(eqn: Any, values: Sequence[Any], tail: Tail = NOTHING) -> list[Any]:
    if is_moved(operand(values)[1].leaf):
        return of_images(eqn, values, functools.partial(pointwise, **tail.options))
    groups = eqn.params["feature_group_count"]
    return of_images(eqn, values, functools.partial(conv.conv, groups=groups, **tail.options))


# ------------------------------------------------------------------ lookups


def _lookup_refuses(eqn: Any, values: Sequence[Any]) -> str:
    position, seen = operand(values)
    if position != 0 or len(values) != 2:
        return "the parameter is an index"
    dims, shape = eqn.params["dimension_numbers"], eqn.invars[0].aval.shape
    last = len(eqn.outvars[0].aval.shape)
    plain = (
        tuple(dims.start_index_map) == tuple(dims.collapsed_slice_dims) == (0,)
        and not dims.operand_batching_dims
        and tuple(eqn.params["slice_sizes"]) == (1, *shape[1:])
        and tuple(dims.offset_dims) == tuple(range(last - len(shape) + 1, last))
    )
    if not plain or seen.order != tuple(range(len(shape))):
        return "it is not a lookup of whole rows along the first axis"
    return rows_of(seen.leaf, None)


def _lookup(eqn: Any, values: Sequence[Any]) -> list[Any]:
    _, seen = operand(values)
    [out], indices = eqn.outvars, values[1]
    shape, flat = eqn.invars[0].aval.shape, indices.reshape(-1)
    at = jnp.clip(flat, 0, shape[0] - 1)
    rows = rows_of(seen.leaf, at)
    if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        within = ((flat >= 0) & (flat < shape[0])).reshape(-1, *[1] * (len(shape) - 1))
        rows = jnp.where(within, rows, jnp.asarray(jnp.nan if fill is None else fill, rows.dtype))
    return [rows.reshape(out.aval.shape).astype(out.aval.dtype)]


KERNELS += [
    Kernel(
        "packed matmul", "dot_general", Encoded, ("cpu",), _dot, _dot_refuses, by_columns, chosen
    ),
    Kernel(
        "packed conv",
        "conv_general_dilated",
        Encoded,
        ("cpu",),
        _conv,
        _conv_refuses,
        by_channels,
        chosen,
    ),
    Kernel("rows alone", "gather", Encoded, (), _lookup, _lookup_refuses),
]
