"""A compiled kernel as an operation that JAX can map, divide over devices and lower anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning


def by_rows(
    run: Callable[..., jax.Array],
    *,
    rule: str,
    partition: Callable[..., Any],
    **factors: int,
) -> Callable[..., jax.Array]:
    """Makes an operation of rows and weights, `run(x, *rest)`, one that transformations know.

    Under `vmap` rows fold into one call where nothing else is mapped; else there is a call for
    each element. On a mesh ``partition`` says how operands and result are divided.

    Args:
      run: from rows `[m, ...]` and the other operands to rows `[m, ...]`.
      rule: how dimensions of the operands and the result correspond.
      partition: as `custom_partitioning` takes it.
      **factors: sizes of the factors in ``rule`` that no dimension gives.

    Returns:
      The operation.
    """
    divided = custom_partitioning(lambda *operands: run(*operands))
    divided.def_partition(partition=partition, sharding_rule=rule, **factors)
    mapped = custom_vmap(lambda *operands: divided(*operands))

    @mapped.def_vmap
    def _(size: int, batched: Sequence[bool], x: jax.Array, *rest: jax.Array) -> Any:
        if batched[0] and not any(batched[1:]):
            y = mapped(x.reshape(size * x.shape[1], *x.shape[2:]), *rest)
            return y.reshape(size, x.shape[1], *y.shape[1:]), True

        def one(part: Sequence[jax.Array]) -> jax.Array:
            given = iter(part)
            return mapped(
                *(next(given) if b else a for a, b in zip((x, *rest), batched, strict=True))
            )

        parts = [a for a, b in zip((x, *rest), batched, strict=True) if b]
        return jax.lax.map(one, parts), True

    return mapped


def with_tangent(
    run: Callable[..., jax.Array], reference: Callable[..., jax.Array]
) -> Callable[..., jax.Array]:
    """Gives an operation the derivative of its definition.

    Nothing that the definition rebuilds is kept for the backward pass.

    Args:
      run: from two lists of operands, numbers and integers, to an array.
      reference: the same in plain JAX.

    Returns:
      ``run``, differentiable in forward and reverse mode by the numbers.
    """

    @jax.custom_jvp
    def both(numbers: list[jax.Array], codes: list[jax.Array]) -> jax.Array:
        return run(numbers, codes)

    @both.defjvp
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        numbers, codes = primals

        @jax.checkpoint
        def along(numbers: Any, codes: Any, steps: Any) -> jax.Array:
            return jax.jvp(lambda given: reference(given, codes), (numbers,), (steps,))[1]

        y = both(numbers, codes)
        return y, along(numbers, codes, tangents[0]).astype(y.dtype)

    return both


def is_number(x: Any) -> bool:
    """Says whether an operand is differentiated by."""
    return jnp.issubdtype(x.dtype, jnp.floating)
