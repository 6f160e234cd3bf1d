"""Encoding tensors where their shards lie."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ._axes import Axes
from ._bits import dtype_bits
from ._encoded import Encoded

Run = Callable[..., Encoded]


def division(w: Any) -> NamedSharding | None:
    """Returns how a tensor is divided over a mesh; ``None`` if it is not, or nobody knows.

    Under a trace only Explicit axes can be known: with Auto ones XLA decides after it.
    """
    sharding = jax.typeof(w).sharding if isinstance(w, jax.core.Tracer) else _sharding(w)
    divided = isinstance(sharding, NamedSharding) and any(a is not None for a in sharding.spec)
    return sharding if divided else None


def _sharding(w: Any) -> Any:
    return getattr(w, "sharding", None)


def full_spec(spec: PartitionSpec, ndim: int) -> list[Any]:
    """Returns an entry of a partition for each axis."""
    return [*spec, *[None] * (ndim - len(spec))]


def names_of(entry: Any) -> tuple[str, ...]:
    """Returns the mesh axes that one entry of a partition names."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def mesh_axes(spec: PartitionSpec) -> set[str]:
    """Returns all mesh axes that a partition names."""
    return {n for entry in spec for n in names_of(entry)}


def without(entry: Any, names: Sequence[str]) -> Any:
    """Returns one entry of a partition without some mesh axes."""
    left = tuple(n for n in names_of(entry) if n not in names)
    return left if len(left) > 1 else left[0] if left else None


def counts_of(spec: PartitionSpec, ndim: int, sizes: Mapping[str, int]) -> list[int]:
    """Returns into how many shards a partition divides each axis; of an unknown mesh axis one."""
    return [math.prod(sizes.get(n, 1) for n in names_of(e)) for e in full_spec(spec, ndim)]


def shard_shape(
    shape: Sequence[int], spec: PartitionSpec, sizes: Mapping[str, int]
) -> tuple[int, ...]:
    """Returns the shape of one shard; every axis must divide."""
    return tuple(n // c for n, c in zip(shape, counts_of(spec, len(shape), sizes), strict=True))


def shard_bits(x: Any, spec: PartitionSpec, sizes: Mapping[str, int]) -> int:
    """Returns the bits that one shard of an array occupies."""
    return math.prod(shard_shape(x.shape, spec, sizes)) * dtype_bits(x.dtype)


def on_one_axis(spec: PartitionSpec, stack: int, axis: int) -> PartitionSpec:
    """Returns the partition that divides a core tensor along one axis, by all that divides it."""
    before, core = spec[:stack], spec[stack:]
    names = tuple(n for entry in core for n in names_of(entry))
    together = names[0] if len(names) == 1 else names or None
    return PartitionSpec(*before, *(together if a == axis else None for a in range(len(core))))


def on_outputs(spec: PartitionSpec, shape: tuple[int, ...], axes: Axes) -> PartitionSpec:
    """Returns the partition that divides a tensor along its largest output axis, if it has one."""
    if not axes.out:
        return spec
    largest = max(axes.out, key=lambda a: shape[axes.stack + a])
    return on_one_axis(spec, axes.stack, largest)


def moved(x: jax.Array, mesh: Any, *specs: PartitionSpec) -> jax.Array:
    """Pins an array to partitions, one after another; what travels between them is as stored.

    Integers that are smaller than a byte are sent as bytes: XLA would widen 4 bits to 8, and where
    a CPU sends 2 bits it writes beyond their memory.

    Args:
      x: the array.
      mesh: the devices.
      *specs: the partitions.
    """
    shape, dtype = x.shape, x.dtype
    each = 8 // min(8, dtype_bits(dtype))
    small = each > 1 and x.ndim > 0
    parts = [counts_of(s, x.ndim, mesh.shape)[-1] for s in specs] if small else []
    whole = small and all(shape[-1] % (each * n) == 0 for n in parts)
    if whole:
        x = x.reshape(*shape[:-1], shape[-1] // each, each)
        x = jax.lax.bitcast_convert_type(x, jnp.uint8)
    elif small and jnp.issubdtype(dtype, jnp.integer):
        x = x.astype(jnp.int8)
    for spec in specs:
        x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
    if whole:
        x = jax.lax.bitcast_convert_type(x, dtype).reshape(shape)
    return x.astype(dtype)


def encode_divided(
    encoder: Any, run: Run, sharding: NamedSharding, axes: Axes, w: Any, *rest: Any
) -> Encoded:
    """Encodes a divided tensor; each part of the leaf is divided with it.

    Args:
      encoder: it says in which partition it needs no entry of another shard.
      run: ``run(encoder, w, *rest) -> leaf``, traceable.
      sharding: of ``w``.
      axes: resolved roles of its axes.
      w: the tensor.
      *rest: further arguments of ``run``.

    Raises:
      ValueError: if shards split a group or a packed word.
    """
    shape, mesh = tuple(w.shape), sharding.mesh
    spec = PartitionSpec(*full_spec(sharding.spec, len(shape)))
    plain = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (w, *rest))
    stored = jax.eval_shape(functools.partial(run, encoder), *plain)
    specs = specs_of(stored, spec, mesh)
    within = encoder.partition(spec, shape, axes)
    # Codes are found as the tensor is divided meanwhile, and moved when they are packed.
    found = [specs] if within == spec else [*_specs(stored, within, mesh), specs]
    steps = tuple(tuple(jax.tree.leaves(s)) for s in found)
    if isinstance(w, jax.core.Tracer):
        shardings = jax.tree.map(lambda s: NamedSharding(mesh, s), specs)

        def traced(w: Any, *rest: Any) -> Encoded:
            here = NamedSharding(jax.sharding.get_abstract_mesh(), within)
            return _encoded(encoder, run, here, steps, w, *rest)

        return jax.sharding.auto_axes(traced, out_sharding=shardings)(w, *rest)
    auto = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    program = _program(encoder, run, NamedSharding(auto, within), steps)
    leaf = program(*jax.tree.map(lambda x: _on(x, mesh, auto), (w, *rest)))
    if AxisType.Explicit not in mesh.axis_types:
        return leaf
    return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), leaf, specs)


def _specs(leaf: Encoded, spec: PartitionSpec, mesh: Any) -> list[Encoded]:
    """Returns the partitions of the parts in a list; an empty one if there are none."""
    if any(
        n % count
        for n, count in zip(leaf.shape, counts_of(spec, leaf.ndim, mesh.shape), strict=True)
    ):
        return []
    specs = leaf.specs(spec, shard_shape(leaf.shape, spec, mesh.shape))
    return [] if specs is None else [specs]


def _on(x: Any, old: Any, new: Mesh) -> Any:
    sharding = _sharding(x)
    if isinstance(sharding, NamedSharding) and sharding.mesh == old:
        return jax.device_put(x, NamedSharding(new, sharding.spec))
    return x


@functools.lru_cache(maxsize=512)
def _program(
    encoder: Any, run: Run, within: NamedSharding, steps: tuple[tuple[PartitionSpec, ...], ...]
) -> Callable[..., Encoded]:
    """Returns the compiled program for one encoder, its partition, and those of the parts."""
    return jax.jit(functools.partial(_encoded, encoder, run, within, steps))


def _encoded(
    encoder: Any,
    run: Run,
    within: NamedSharding,
    steps: Sequence[Sequence[PartitionSpec]],
    w: jax.Array,
    *rest: Any,
) -> Encoded:
    """Encodes a tensor in one partition, and pins the parts to theirs."""
    w = jax.lax.with_sharding_constraint(w, within)
    parts, treedef = jax.tree.flatten(run(encoder.over(within), w, *rest))
    every = zip(parts, *steps, strict=True)
    return jax.tree.unflatten(treedef, [moved(x, within.mesh, *specs) for x, *specs in every])


def specs_of(leaf: Encoded, spec: PartitionSpec, mesh: Any) -> Encoded:
    """Returns a leaf with the partition of each part, for one of its dense tensor.

    Raises:
      ValueError: if shards split a group or a packed word; says which axes cannot be divided.
    """
    specs = leaf.specs(spec, shard_shape(leaf.shape, spec, mesh.shape))
    if specs is not None:
        return specs
    entries = full_spec(spec, leaf.ndim)
    alone = {}
    for axis, entry in enumerate(entries):
        if entry is not None:
            one = PartitionSpec(*(entry if a == axis else None for a in range(leaf.ndim)))
            alone[axis] = leaf.specs(one, shard_shape(leaf.shape, one, mesh.shape)) is not None
    wrong = [a for a, fine in alone.items() if not fine] or list(alone)
    local = shard_shape(leaf.shape, spec, mesh.shape)
    what = ", ".join(f"axis {a} of {leaf.shape[a]} in shards of {local[a]}" for a in wrong)
    raise ValueError(
        f"{leaf.kind()} of shape {list(leaf.shape)} cannot be divided as {spec}: {what} would "
        "split a group of inputs or outputs, or a packed word (8 codes or mask bits along the last "
        "axis); divide another axis, choose a group that divides the shard, or leave it whole "
        "(PartitionSpec())"
    )
