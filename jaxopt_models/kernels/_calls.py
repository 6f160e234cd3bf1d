"""A compiled kernel as an operation that JAX can map, divide over devices and lower anywhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ._load import status


def by_rows(
    run: Callable[..., jax.Array],
    *,
    rule: str,
    partition: Callable[..., Any],
) -> Callable[..., jax.Array]:
    """Makes an operation of rows and weights, `run(x, *rest)`, one that transformations know.

    Under `vmap` rows fold into one call where nothing else is mapped; else there is a call for
    each element. On a mesh ``partition`` says how operands and result are divided.

    Args:
      run: from rows `[m, ...]` and the other operands to rows `[m, ...]`.
      rule: how dimensions of the operands and the result correspond.
      partition: as `custom_partitioning` takes it.

    Returns:
      The operation.
    """
    divided = custom_partitioning(lambda *operands: run(*operands))
    divided.def_partition(partition=partition, sharding_rule=rule)
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


def either(
    plain: Callable[..., jax.Array],
    compiled: Callable[..., jax.Array],
    operands: Any,
    *,
    implementation: str | None,
    who: str,
) -> jax.Array:
    """Runs an operation by a kernel or in plain JAX, with the derivative of the latter.

    Nothing that the definition rebuilds is kept for the backward pass.

    Args:
      plain: the definition, `plain(*operands)`.
      compiled: the kernel, `compiled(loaded, *operands)`.
      operands: a tuple of pytrees of arrays.
      implementation: ``"cpu"``, ``"xla"``, or ``None`` for the kernel where there is one and the
        program is compiled for a CPU.
      who: the public function, for messages.

    Returns:
      The result, differentiable in forward and reverse mode by what is floating.

    Raises:
      ValueError: for another implementation, or if the kernel is asked for and not there.
    """
    if implementation not in (None, "cpu", "xla"):
        raise ValueError(f"{who}: implementation={implementation!r} is not 'cpu', 'xla' or None")
    found = status() if implementation != "xla" else None
    if implementation == "cpu" and not found.path:  # type: ignore[union-attr]
        raise ValueError(f"{who}: there are no kernels: {found.why}")  # type: ignore[union-attr]
    if found is None or not found.path:
        return derived(plain, plain, operands)

    def kernel(*operands: Any) -> jax.Array:
        return compiled(found, *operands)

    def chosen(*operands: Any) -> jax.Array:
        return jax.lax.platform_dependent(*operands, cpu=kernel, default=plain)

    return derived(plain, kernel if implementation == "cpu" else chosen, operands)


def derived(
    plain: Callable[..., jax.Array], run: Callable[..., jax.Array], operands: Any
) -> jax.Array:
    """Runs an operation with the derivative of its definition.

    Args:
      plain: the definition, `plain(*operands)`.
      run: what computes the same, `run(*operands)`.
      operands: a tuple of pytrees of arrays.

    Returns:
      What ``run`` returns, differentiable in forward and reverse mode by what is floating.
    """
    leaves, treedef = jax.tree.flatten(operands)
    leaves = [jnp.asarray(a) for a in leaves]
    floating = [jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]

    def joined(numbers: list[Any], codes: list[Any]) -> Any:
        given = iter(codes), iter(numbers)
        return jax.tree.unflatten(treedef, [next(given[f]) for f in floating])

    @jax.custom_jvp
    def whole(numbers: list[Any], codes: list[Any]) -> jax.Array:
        return run(*joined(numbers, codes))

    @whole.defjvp
    def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
        numbers, codes = primals

        @jax.checkpoint
        def along(numbers: Any, codes: Any, steps: Any) -> jax.Array:
            def reference(given: Any) -> jax.Array:
                return plain(*joined(given, codes))

            return jax.jvp(reference, (numbers,), (steps,))[1]

        y = whole(numbers, codes)
        return y, along(numbers, codes, tangents[0]).astype(y.dtype)

    numbers = [a for a, f in zip(leaves, floating, strict=True) if f]
    return whole(numbers, [a for a, f in zip(leaves, floating, strict=True) if not f])


def axis_of(a: Any, i: int) -> Any:
    """Returns the mesh axes along which axis ``i`` of an operand is divided, or ``None``."""
    spec = getattr(a.sharding, "spec", PartitionSpec())
    return spec[i] if i < len(spec) else None


def names_of(axis: Any) -> set[str]:
    """Returns the names in an entry of a partition."""
    return set() if axis is None else {axis} if isinstance(axis, str) else set(axis)


def count_of(mesh: Any, axis: Any) -> int:
    """Returns the number of parts that an entry of a partition makes."""
    return math.prod(mesh.shape[n] for n in names_of(axis))


def placed(mesh: Any, a: Any, *axes: Any) -> NamedSharding:
    """Returns how an operand is divided; one without entries is not."""
    given = axes if math.prod(a.shape) else (None,) * len(a.shape)
    return NamedSharding(mesh, PartitionSpec(*given))


def can_sum() -> bool:
    """Says whether a partition may add up what devices computed."""
    # On Explicit meshes JAX 0.12 marks every sum with a sharding, which XLA knows no more of at
    # that place.
    explicit = AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types
    return jax.__version_info__ < (0, 12) or not explicit
