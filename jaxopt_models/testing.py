"""The laws, for our encoders and a stranger's."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._axes import Axes
from ._calibrate import Stats, calibrate
from ._encoder import Encoder
from ._laws import (
    Case,
    check_file,
    check_mask,
    check_packed,
    check_recipe,
    check_straight_through,
    check_transforms,
    check_values,
    check_walk,
)
from ._laws import bits as bits
from ._laws import compilations as compilations
from ._laws import leaf_bits as leaf_bits

#: What is checked by default: a dense kernel, an attention projection, a convolution, a
#: grouped one, a depthwise one, a 1x1 one, a scanned stack, an embedding.
SHAPES: tuple[tuple[tuple[int, ...], Axes], ...] = (
    ((24, 16), Axes()),
    ((16, 4, 8), Axes(out=(1, 2))),
    ((3, 3, 8, 16), Axes()),
    ((2, 2, 4, 16), Axes()),
    ((4, 4, 1, 8), Axes()),
    ((1, 1, 16, 24), Axes()),
    ((3, 24, 16), Axes(stack=1)),
    ((40, 16), Axes(out=(0,))),
)


def check_encoder(
    encoder: Encoder,
    *,
    shapes: Sequence[tuple[tuple[int, ...], Axes]] = SHAPES,
    dtypes: Sequence[Any] = (jnp.float32, jnp.bfloat16),
    idempotent: bool = True,
    masks: bool = True,
    key: jax.Array | None = None,
    full: bool = False,
) -> None:
    """Runs the laws that every encoder keeps, on tensors of many kinds.

    1. ``materialize`` has the shape and dtype of the tensor, abstractly as for real.
    2. Encoding what was encoded changes nothing.
    3. Flatten/unflatten, `jit`, `vmap`, `scan`, slicing and `save`/`load` keep every bit.
    4. ``straight_through`` is bit-equal to ``materialize``, with the tangent passed on; where
       statistics are needed, what ``prepare`` shows.
    5. ``storage_bits`` counts the parts.
    6. Same input, same result; a second call compiles nothing.
    7. Zeros of an earlier mask stay zero.
    8. The recipe round-trips through JSON; ``partition`` and ``combine`` are inverse.
    9. ``accelerate`` computes what ``simulate`` defines, which without an input spec is the
       function of the rebuilt tensor; in value and gradient, stacked layers in a loop.
    10. What ``pack`` lays out for a CPU rebuilds to the same bits, and ``accelerate`` computes with
        it what ``simulate`` defines, within `3e-4` of the largest result.

    Nearly all of the time goes into compiling. So the types take turns over the shapes, and
    what needs programs of its own (`jit`, `vmap`, `scan`, laws 7, 9 and 10) runs on the first shape
    and on the first with a stack; ``full`` asks for every law on every pair. An encoder with
    ``needs`` gets statistics of random inputs.

    Args:
      encoder: the encoder to check.
      shapes: pairs of a shape and the roles of its axes.
      dtypes: floating types.
      idempotent: ``False`` where the docstring of the encoder excuses it from law 2.
      masks: ``False`` for an encoder that refuses pruned tensors with a `ValueError`.
      key: random key, for encoders that draw.
      full: every shape with every type, and every law on each.

    Raises:
      AssertionError: naming the law, the shape and the type.

    Example:
      >>> from jaxopt_models import quant, testing
      >>> testing.check_encoder(quant.Int(bits=4), shapes=testing.SHAPES[:1])
    """
    check_recipe(encoder)
    stacks: set[bool] = set()
    for i, (shape, axes) in enumerate(shapes):
        for dtype in dtypes if full else [dtypes[i % len(dtypes)]]:
            where = f"{encoder} on {jnp.dtype(dtype).name}{list(shape)}"
            w = _tensor(shape, dtype)
            stats = random_stats(encoder, w, axes=axes)
            case = Case(encoder, w, axes, stats, key, where)
            leaf = check_values(case, idempotent)
            whole = full or bool(axes.stack) not in stacks
            # What prepare shows is a program of its own; law 4 is checked in one below, too.
            if full or stats is None or not whole:
                check_straight_through(case, leaf)
            check_file(case, leaf)
            if whole:
                check_transforms(case, leaf)
                check_mask(case, masks)
                check_walk(case, leaf)
                check_packed(case, leaf)
        stacks.add(bool(axes.stack))


def random_stats(encoder: Encoder, w: jax.Array, *, axes: Axes | None = None) -> Stats | None:
    """Calibrates an encoder on random inputs of a product with one tensor.

    Args:
      encoder: the encoder.
      w: the tensor.
      axes: roles of its axes; default: last is out, no stack.

    Returns:
      The statistics that it needs, or ``None`` if it needs none.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxopt_models import quant, testing
      >>> testing.random_stats(quant.GPTQ(quant.Int(bits=4)), jnp.ones((8, 4))).gram.shape
      (8, 8)
    """
    if not encoder.needs:
        return None
    roles = (axes or Axes()).resolve(w.ndim)
    core = w.shape[roles.stack :]
    inner = [a for a in range(len(core)) if a not in roles.out]
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, *[core[a] for a in inner])), w.dtype)

    def product(w: jax.Array, x: jax.Array) -> jax.Array:
        return jnp.tensordot(x, w, (list(range(1, x.ndim)), inner))

    run = product
    for _ in range(roles.stack):
        run = functools.partial(_each, run)
    found = calibrate(lambda p, x: run(p["w"], x), {"w": w}, [(x,)], encoder.needs)
    return found["w"]


def _each(run: Any, w: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.scan(lambda c, w: (c, run(w, x)), 0, w)[1]


def _tensor(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    rng = np.random.default_rng(math.prod(shape))
    return jnp.asarray(rng.normal(size=shape) * 0.1, dtype)
