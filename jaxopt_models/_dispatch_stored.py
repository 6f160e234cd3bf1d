"""Which kernels there are for codes as they are stored: nothing has to be laid out.

On a CPU XLA multiplies integers with integers faster than floats, two rows or more of them. On a
GPU it makes a cast of codes part of a product, but nothing that hangs on where an entry is: scales
of each output follow the product, or go to the input where the product sums over them; everything
else is read by a kernel of Triton.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ._axes import Matrix
from ._dispatch_shapes import many_scales, no_floats, no_rows, of_rows, operand
from ._encoded import Encoded
from ._jaxpr import varying
from ._kernels import KERNELS, Kernel
from ._products import product_of
from .kernels.matmul import pallas_gpu, xla
from .kernels.matmul.stored import codes_of
from .kernels.matmul.stored import why_not as in_place
from .quant import Quantized, Tabulated, WithInput

#: Tables whose codes are numbers to XLA.
_NUMBERS = ("float8_e4m3fn", "float8_e5m2")


def _unfit_input(eqn: Any, leaf: Encoded, x: Any) -> str:
    if why := no_floats(eqn, x):
        return why
    parts = [x, *jax.tree.leaves(leaf)]
    if any(axis is not None for a in parts for axis in jax.typeof(a).sharding.spec):
        return "it is divided over an Explicit mesh"
    if isinstance(leaf, WithInput) and leaf.per == "tensor" and (varying(x) or leaf.stack):
        return "its whole input is read at once"
    return many_scales(leaf)


# ------------------------------------------------------------------ integers


def _integers_refuses(eqn: Any, values: Sequence[Any]) -> str:
    position, seen = operand(values)
    leaf, out = seen.leaf, _outputs(eqn, values)
    why = xla.why_not(leaf) or in_place(codes_of(leaf), out)
    why = why or _unfit_input(eqn, leaf, values[1 - position]) or no_rows(eqn, values)
    if not why and Matrix(leaf.core, out).rows > xla.MOST_INPUTS:
        return f"more than {xla.MOST_INPUTS} inputs"
    return why


def _integers(eqn: Any, values: Sequence[Any]) -> list[Any]:
    return of_rows(eqn, values, functools.partial(xla.product, out=_outputs(eqn, values)))


# ------------------------------------------------------------------ scales last


def _after_refuses(eqn: Any, values: Sequence[Any]) -> str:
    position, seen = operand(values)
    codes, x = codes_of(seen.leaf), values[1 - position]
    if isinstance(codes, Quantized):
        if not codes.signed or codes.bits not in (4, 8):
            return "only symmetric codes of 4 and 8 bits are read by XLA"
    elif not isinstance(codes, Tabulated) or codes.table not in _NUMBERS:
        return f"there is none for {type(codes).__name__}"
    if codes.scale.shape[-1] > 1:
        return "its scales are of groups of inputs"
    if codes.meaning.ndim - len(codes.out) - 1 != len(seen.leaf.stack):
        return "its scales are stacked otherwise"
    if codes.dtype not in (jnp.float32, jnp.bfloat16):
        return f"there is none for tensors of {codes.dtype}"
    if not _side(eqn, position, _scaled(codes, seen.order)):
        return "the product sums over some of the axes with scales of their own"
    return _unfit_input(eqn, seen.leaf, x)


def _scaled(codes: Any, order: tuple[int, ...]) -> list[int]:
    """Returns the axes of the operand along which scales differ."""
    n = len(codes.stack)
    axes = {*range(n), *(n + a for a in codes.out)}
    return [i for i, a in enumerate(order) if a in axes]


def _side(eqn: Any, position: int, scaled: list[int]) -> str:
    """Says whether scales belong to the ``"result"``, to the ``"input"``, or ``""`` to neither."""
    contract, batch = eqn.params["dimension_numbers"]
    if not set(scaled) & set(contract[position]):
        return "result"
    return "input" if set(scaled) <= {*contract[position], *batch[position]} else ""


def _after(eqn: Any, values: Sequence[Any]) -> list[Any]:
    position, seen = operand(values)
    leaf, codes, p = seen.leaf, codes_of(seen.leaf), eqn.params
    contract, batch = p["dimension_numbers"]
    x = leaf.read(values[1 - position], product_of(eqn, position).row, ())  # type: ignore[union-attr]
    q = codes.codes
    if isinstance(codes, Tabulated):
        q = jax.lax.bitcast_convert_type(q, jnp.dtype(codes.table))
    q = q.transpose(seen.order)
    scaled = _scaled(codes, seen.order)
    scale = _scales(codes).transpose(seen.order)
    if _side(eqn, position, scaled) == "input":
        x = (x.astype(scale.dtype) * _along(scale, position, x.ndim, contract, batch)).astype(
            x.dtype
        )
    pair = (q.astype(x.dtype), x) if position == 0 else (x, q.astype(x.dtype))
    y = jax.lax.dot_general(
        *pair,
        p["dimension_numbers"],
        precision=p["precision"],
        preferred_element_type=scale.dtype,
        out_sharding=p["out_sharding"],
    )
    if _side(eqn, position, scaled) == "result":
        free = [a for a in range(q.ndim) if a not in (*contract[position], *batch[position])]
        lead = len(batch[position])
        start = lead if position == 0 else y.ndim - len(free)
        shape = [1] * y.ndim
        for place, a in [*enumerate(batch[position]), *enumerate(free, start)]:
            shape[place] = scale.shape[a]
        rest = [a for a in range(q.ndim) if a in contract[position]]
        y = y * scale.transpose(*batch[position], *free, *rest).reshape(shape)
    return [y.astype(eqn.outvars[0].aval.dtype)]


def _scales(codes: Any) -> jax.Array:
    """Returns the scales, one along the axes that share one."""
    run = type(codes).scales
    for _ in codes.stack:
        run = jax.vmap(run)
    scale = run(codes)[..., 0]
    if codes.block > 1:
        scale = jnp.repeat(scale, codes.block, axis=-1)
    shape = [codes.core[a] if a in codes.out else 1 for a in range(len(codes.core))]
    return scale.reshape(*codes.stack, *shape)


def _along(scale: jax.Array, position: int, ndim: int, contract: Any, batch: Any) -> jax.Array:
    """Gives scales to the axes of the input that meet those of the parameter."""
    mine = (*contract[position], *batch[position])
    other = (*contract[1 - position], *batch[1 - position])
    place = dict(zip(mine, other, strict=True))
    order = sorted(place, key=place.__getitem__)
    shape = [1] * ndim
    for a in order:
        shape[place[a]] = scale.shape[a]
    rest = [a for a in range(scale.ndim) if a not in place]
    return scale.transpose(*order, *rest).reshape(shape)


# ------------------------------------------------------------------ by Triton


def _outputs(eqn: Any, values: Sequence[Any]) -> tuple[int, ...]:
    """Returns the axes of the core that an equation does not sum over."""
    position, seen = operand(values)
    contract, _ = eqn.params["dimension_numbers"]
    n = len(seen.leaf.stack)
    reduced = {seen.order[a] - n for a in contract[position]}
    return tuple(a for a in range(len(seen.leaf.core)) if a not in reduced)


def _stored_refuses(eqn: Any, values: Sequence[Any]) -> str:
    position, seen = operand(values)
    codes = codes_of(seen.leaf)
    why = in_place(codes, _outputs(eqn, values))
    why = why or _unfit_input(eqn, seen.leaf, values[1 - position])
    if why:
        return why
    precision = eqn.params["precision"]
    given = precision if isinstance(precision, tuple) else (precision,)
    if not all(p is None or isinstance(p, jax.lax.Precision) for p in given):
        return f"precision={precision}"
    return no_rows(eqn, values)


def stored(eqn: Any, values: Sequence[Any], *, interpret: bool = False) -> list[Any]:
    """Computes a product with codes where they lie; to ``interpret`` it needs no GPU."""
    product = functools.partial(
        pallas_gpu.product,
        out=_outputs(eqn, values),
        precision=eqn.params["precision"],
        dtype=eqn.outvars[0].aval.dtype,
        interpret=interpret,
    )
    return of_rows(eqn, values, product)


def _kernel(name: str, platform: str, run: Any, refuses: Any, *, quiet: bool = False) -> Kernel:
    return Kernel(name, "dot_general", Encoded, (platform,), run, refuses, quiet=quiet)


KERNELS += [
    _kernel("integers by XLA", "cpu", _integers, _integers_refuses, quiet=True),
    _kernel("scales after the product", "cuda", _after, _after_refuses, quiet=True),
    _kernel("codes in place", "cuda", stored, _stored_refuses),
]
