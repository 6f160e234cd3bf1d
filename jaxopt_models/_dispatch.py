"""Which kernels there are, for :func:`jaxopt_models.accelerate`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._encoded import Encoded
from ._jaxpr import varying
from ._kernels import KERNELS, Kernel, View
from ._lookup import rows_of
from ._pack import why_not
from .kernels import conv, matmul, status
from .kernels.matmul import Packed
from .quant import WithInput


def _operand(values: Sequence[Any]) -> tuple[int, View]:
    """Returns which operand is a parameter, and the view of it."""
    [(i, seen)] = [(i, v) for i, x in enumerate(values) if (v := View.of(x)) is not None]
    return i, seen


def _codes(leaf: Encoded) -> Any:
    return leaf.values if isinstance(leaf, WithInput) else leaf


def _unfit(leaf: Encoded) -> str:
    """Says why a leaf is not for the compiled kernels, ``""`` if it is."""
    if not isinstance(_codes(leaf), Packed):
        why = why_not(leaf)
        return why or "it is not laid out: call jaxopt_models.pack(tree)"
    found = status()
    return "" if found.path else f"there are no compiled kernels: {found.why}"


def _unfit_input(leaf: Encoded, x: Any) -> str:
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the input is {x.dtype}"
    if isinstance(leaf, WithInput):
        if leaf.per == "tensor" and varying(x):
            return "its whole input is on several devices"
        if leaf.scale is not None and leaf.scale.size > 1:
            return "each of its stacked tensors has an input scale"
        if not leaf.symmetric and _codes(leaf).sums is None:
            return "it was packed before it got quant.Input; pack last"
    return ""


# ------------------------------------------------------------------ products


def _dot_refuses(eqn: Any, values: Sequence[Any]) -> str:
    position, seen = _operand(values)
    leaf, x = seen.leaf, values[1 - position]
    if why := _unfit(leaf) or _unfit_input(leaf, x):
        return why
    contract, batch = eqn.params["dimension_numbers"]
    codes, n = _codes(leaf), len(leaf.stack)
    reduced = sorted(seen.order[a] - n for a in contract[position])
    if tuple(reduced) != codes.matrix.inner:
        return "the product sums over other axes than its inputs"
    if sorted(seen.order[a] for a in batch[position]) != list(range(n)):
        return "its stack axes are not those of a batch of products"
    if eqn.outvars[0].aval.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the result is {eqn.outvars[0].aval.dtype}"
    return ""


def _dot(eqn: Any, values: Sequence[Any]) -> list[Any]:
    position, seen = _operand(values)
    leaf, x, [out] = seen.leaf, values[1 - position], eqn.outvars
    contract, batch = eqn.params["dimension_numbers"]
    by_axis = dict(
        zip((seen.order[a] for a in contract[position]), contract[1 - position], strict=True)
    )
    inner = [by_axis[a] for a in sorted(by_axis)]
    by_stack = dict(zip((seen.order[a] for a in batch[position]), batch[1 - position], strict=True))
    lead = [by_stack[a] for a in sorted(by_stack)]
    free = [a for a in range(x.ndim) if a not in inner and a not in lead]
    sizes = [x.shape[a] for a in free]
    rows = x.transpose(*lead, *free, *inner).reshape(
        *(x.shape[a] for a in lead), math.prod(sizes), math.prod(x.shape[a] for a in inner)
    )
    product = matmul.matmul
    for _ in lead:
        product = jax.vmap(product)
    y = product(rows, leaf)
    # Axes of the result: batch axes, then those of the first operand, then of the second.
    mine = [a for a in range(len(seen.order)) if a not in (*contract[position], *batch[position])]
    stored = sorted(seen.order[a] for a in mine)
    y = y.reshape(*(x.shape[a] for a in lead), *sizes, *(leaf.shape[a] for a in stored))
    first, second = len(lead), len(lead) + len(sizes)
    weights = [second + stored.index(seen.order[a]) for a in mine]
    inputs = list(range(first, second))
    batches = [sorted(by_stack).index(seen.order[a]) for a in batch[position]]
    order = [*batches, *inputs, *weights] if position else [*batches, *weights, *inputs]
    return [y.transpose(*order).astype(out.aval.dtype)]


# ------------------------------------------------------------------ convolutions


def _conv_refuses(eqn: Any, values: Sequence[Any]) -> str:
    position, seen = _operand(values)
    leaf, x, p = seen.leaf, values[1 - position], eqn.params
    if why := _unfit(leaf) or _unfit_input(leaf, x):
        return why
    spec, ndim = p["dimension_numbers"], len(eqn.invars[1].aval.shape)
    if position != 1 or p["batch_group_count"] != 1 or leaf.stack:
        return "it is no convolution of inputs with one kernel"
    if ndim not in (3, 4):
        return f"a window of {ndim - 2} axes"
    if set(p["lhs_dilation"]) != {1}:
        return "the input is dilated"
    # Stored as [*window, channels, outputs], which is the order of the packed codes.
    stored = tuple(seen.order[a] for a in (*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0]))
    if stored != tuple(range(ndim)) or _codes(leaf).out != (ndim - 1,):
        return "the kernel is not stored as [*window, channels, outputs]"
    if eqn.outvars[0].aval.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the result is {eqn.outvars[0].aval.dtype}"
    return ""


def _as_image(leaf: Any) -> Any:
    """Returns the kernel of a sequence as that of an image of one line."""
    if isinstance(leaf, WithInput):
        return dataclasses.replace(leaf, values=_as_image(leaf.values), core=(1, *leaf.core))
    return dataclasses.replace(leaf, core=(1, *leaf.core), out=tuple(a + 1 for a in leaf.out))


def _conv(eqn: Any, values: Sequence[Any]) -> list[Any]:
    _, seen = _operand(values)
    x, p, [out] = values[0], eqn.params, eqn.outvars
    spec = p["dimension_numbers"]
    flat = len(spec.lhs_spec) == 3
    x = x.transpose(spec.lhs_spec[0], *spec.lhs_spec[2:], spec.lhs_spec[1])
    leaf, pads = seen.leaf, list(p["padding"])
    strides, dilation = tuple(p["window_strides"]), tuple(p["rhs_dilation"])
    if flat:  # an image of one line
        x = x[:, None]
        leaf = _as_image(leaf)
        pads, strides, dilation = [(0, 0), *pads], (1, *strides), (1, *dilation)
    groups = p["feature_group_count"]
    y = conv.conv(x, leaf, strides=strides, padding=pads, dilation=dilation, groups=groups)
    y = y[:, 0] if flat else y
    # From [batch, *window, outputs] to the axes of the result.
    where = (spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
    return [y.transpose(*(where.index(a) for a in range(y.ndim))).astype(out.aval.dtype)]


# ------------------------------------------------------------------ lookups


def _lookup_refuses(eqn: Any, values: Sequence[Any]) -> str:
    position, seen = _operand(values)
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
    _, seen = _operand(values)
    [out], indices = eqn.outvars, values[1]
    shape, flat = eqn.invars[0].aval.shape, indices.reshape(-1)
    at = jnp.clip(flat, 0, shape[0] - 1)
    rows = rows_of(seen.leaf, at)
    if eqn.params["mode"] == jax.lax.GatherScatterMode.FILL_OR_DROP:
        fill = eqn.params["fill_value"]
        inside = ((flat >= 0) & (flat < shape[0])).reshape(-1, *[1] * (len(shape) - 1))
        rows = jnp.where(inside, rows, jnp.asarray(jnp.nan if fill is None else fill, rows.dtype))
    return [rows.reshape(out.aval.shape).astype(out.aval.dtype)]


KERNELS += [
    Kernel("packed matmul", "dot_general", Packed, ("cpu",), _dot, _dot_refuses),
    Kernel("packed matmul", "dot_general", WithInput, ("cpu",), _dot, _dot_refuses),
    Kernel("packed conv", "conv_general_dilated", Packed, ("cpu",), _conv, _conv_refuses),
    Kernel("packed conv", "conv_general_dilated", WithInput, ("cpu",), _conv, _conv_refuses),
    Kernel("rows alone", "gather", Encoded, (), _lookup, _lookup_refuses),
]
