"""Operations on a laid-out parameter as products of rows and convolutions of images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import Matrix
from ._encoded import Encoded, is_encoded
from ._kernels import View
from ._pack import why_not
from .kernels import status
from .kernels.matmul.stored import anywhere, codes_of
from .quant import WithInput


def operand(values: Sequence[Any]) -> tuple[int, View]:
    """Returns which operand is a parameter, and the view of it."""
    [(i, seen)] = [(i, v) for i, x in enumerate(values) if (v := View.of(x)) is not None]
    return i, seen


def inside(leaf: Encoded) -> Any:
    """Returns what is laid out in a leaf: the leaf, or what it is around."""
    return leaf.values if leaf.around else leaf


def unready(leaf: Any, laid_out: bool) -> str:
    """Says why a leaf cannot meet any compiled kernel, ``""`` if it can."""
    if not laid_out:
        return why_not(leaf) or "it is not laid out: call jaxopt_models.pack(tree)"
    found = status()
    return "" if found.path else f"there are no compiled kernels: {found.why}"


def no_floats(eqn: Any, x: Any) -> str:
    """Says that a product has an input or a result that no kernel has, ``""`` otherwise."""
    floats = (jnp.float32, jnp.bfloat16)
    if x.dtype not in floats:
        return f"the input is {x.dtype}"
    result = eqn.outvars[0].aval.dtype
    return "" if result in floats else f"the result is {result}"


def many_scales(leaf: Any) -> str:
    """Says that stacked tensors round one input by scales of their own, ``""`` otherwise."""
    many = isinstance(leaf, WithInput) and leaf.scale is not None and leaf.scale.size > 1
    return "each of its stacked tensors has an input scale" if many else ""


# ------------------------------------------------------------------ products


def no_rows(eqn: Any, values: Sequence[Any]) -> str:
    """Says why a `dot_general` is no product of rows with a parameter, ``""`` if it is one."""
    position, seen = operand(values)
    leaf = seen.leaf
    contract, batch = eqn.params["dimension_numbers"]
    codes, n = codes_of(inside(leaf)), len(leaf.stack)
    reduced = sorted(seen.order[a] - n for a in contract[position])
    if not anywhere(codes) and tuple(reduced) != Matrix(codes.core, codes.out).inner:
        return "the product sums over other axes than its inputs"
    if sorted(seen.order[a] for a in batch[position]) != list(range(n)):
        return "its stack axes are not those of a batch of products"
    return ""


def of_rows(eqn: Any, values: Sequence[Any], product: Callable[..., jax.Array]) -> list[Any]:
    """Computes a `dot_general` by a product of rows.

    Args:
      eqn: the equation.
      values: its operands.
      product: from rows `[m, in]` and a leaf of one core tensor to `[m, out]`.

    Returns:
      Its output.
    """
    position, seen = operand(values)
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


def _widened(eqn: Any, values: Sequence[Any]) -> bool:
    """Says whether a result has another type than the input, to which kernels round."""
    return eqn.outvars[0].aval.dtype != values[1 - operand(values)[0]].dtype


def by_columns(eqn: Any, values: Sequence[Any], bias: tuple[int, ...] | None) -> bool:
    """Says whether a bias of a shape, if any, adds to the columns of a product of rows."""
    position, seen = operand(values)
    contract, batch = eqn.params["dimension_numbers"]
    mine = [a for a in range(len(seen.order)) if a not in contract[position]]
    stored = [seen.order[a] for a in mine]
    if position != 1 or batch[position] or stored != sorted(stored) or _widened(eqn, values):
        return False
    columns = tuple(eqn.invars[1].aval.shape[a] for a in mine)
    return bias in (None, (*[1] * (len(eqn.outvars[0].aval.shape) - len(columns)), *columns))


# ------------------------------------------------------------------ convolutions


def no_images(eqn: Any, values: Sequence[Any]) -> str:
    """Says why a convolution is none of images with a parameter, ``""`` if it is one."""
    position, seen = operand(values)
    leaf, p = seen.leaf, eqn.params
    spec, ndim = p["dimension_numbers"], len(eqn.invars[1].aval.shape)
    if position != 1 or p["batch_group_count"] != 1 or leaf.stack:
        return "it is no convolution of inputs with one kernel"
    if ndim not in (3, 4):
        return f"a window of {ndim - 2} axes"
    if set(p["lhs_dilation"]) != {1}:
        return "the input is dilated"
    # Stored as [*window, channels, outputs], which is the order of the packed codes.
    stored = tuple(seen.order[a] for a in (*spec.rhs_spec[2:], spec.rhs_spec[1], spec.rhs_spec[0]))
    if stored != tuple(range(ndim)) or inside(leaf).out != (ndim - 1,):
        return "the kernel is not stored as [*window, channels, outputs]"
    return ""


def of_images(eqn: Any, values: Sequence[Any], conv: Callable[..., jax.Array]) -> list[Any]:
    """Computes a convolution by one of images.

    Args:
      eqn: the equation.
      values: its operands.
      conv: from images `[batch, height, width, channels]`, a leaf of `[height, width, channels,
        outputs]` and the keywords `strides`, `padding`, `dilation` to images.

    Returns:
      Its output.
    """
    _, seen = operand(values)
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
    y = conv(x, leaf, strides=strides, padding=pads, dilation=dilation)
    y = y[:, 0] if flat else y
    # From [batch, *window, outputs] to the axes of the result.
    where = (spec.out_spec[0], *spec.out_spec[2:], spec.out_spec[1])
    return [y.transpose(*(where.index(a) for a in range(y.ndim))).astype(out.aval.dtype)]


def by_channels(eqn: Any, values: Sequence[Any], bias: tuple[int, ...] | None) -> bool:
    """Says whether a bias of a shape, if any, adds to the outputs of a convolution."""
    [out], channels = eqn.outvars, eqn.params["dimension_numbers"].out_spec[1]
    shape = out.aval.shape
    if _widened(eqn, values):
        return False
    return bias in (None, tuple(n if a == channels else 1 for a, n in enumerate(shape)))


def _as_image(leaf: Any) -> Any:
    """Returns the kernel of a sequence as that of an image of one line."""
    changed: dict[str, Any] = {"core": (1, *leaf.core)}
    if is_encoded(getattr(leaf, "values", None)):
        changed["values"] = _as_image(leaf.values)
    if not leaf.around:
        changed["out"] = tuple(a + 1 for a in leaf.out)
    return dataclasses.replace(leaf, **changed)
