"""Trees on a mesh: each part of a compressed parameter lies with its tensor."""

from __future__ import annotations

import itertools
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .._divided import full_spec, names_of, shard_shape, specs_of
from .._encoded import Encoded, is_encoded
from .._paths import flatten
from .._spread import spread
from ._dense import dense_specs


def shardings(tree: Any, mesh: Mesh, rules: Any) -> Any:
    """Returns how every array of a tree is divided when its tensors are.

    Codes, masks and packed words are divided as the tensor they stand for, scales and codebooks
    with the outputs they belong to; axes of size one and what belongs to the whole tensor are on
    every device. A group of inputs, a block of outputs and a packed word is never split: a shard
    of a leaf is the leaf of a shard, which is what ``jax.shard_map`` needs.

    Args:
      tree: parameters, dense or compressed, or their shapes: a dict, linen's variables, an nnx
        state. Compressed parameters keep the paths of the dense ones, and so the rules.
      mesh: the devices, with axes of any kind.
      rules: how the *dense* tensors are divided: pairs ``(regular expression on the whole path,
        PartitionSpec)``, of which the first match decides (:func:`tensor`, :func:`fsdp` make such
        rules); one ``PartitionSpec`` for all; a tree of specs or shardings with the same paths; a
        dict from flax's logical names of axes to mesh axes; or ``None``, where flax's names are
        mesh axes. What nothing names is on every device.

    Returns:
      A tree of the structure of ``tree`` with a ``NamedSharding`` for each array, for instance
      for ``in_shardings`` of ``jax.jit``.

    Raises:
      TypeError: for rules that are none.
      ValueError: if a rule divides nothing, or a tensor, a group or a packed word does not divide;
        names the path and what would help.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> small = {"kernel": jom.quant.Int(bits=4, group=8)(jnp.ones((16, 8)))}
      >>> found = jom.parallel.shardings(small, mesh, [("kernel", P(None, "model"))])["kernel"]
      >>> tuple(found.codes.spec), tuple(found.scale.spec)
      ((None, 'model'), ('model', None))
    """
    return shardings_of(tree, mesh, rules, "shardings")


def shardings_of(tree: Any, mesh: Mesh, rules: Any, who: str) -> Any:
    """Returns :func:`shardings` for another function.

    Args:
      tree: as for :func:`shardings`.
      mesh: the devices.
      rules: as for :func:`shardings`.
      who: name of that function, with which errors begin.

    Returns:
      A tree of the structure of ``tree`` with a ``NamedSharding`` for each array.

    Raises:
      TypeError: for a mesh, or rules, that are none.
      ValueError: as for :func:`shardings`.
    """
    if not hasattr(mesh, "axis_names"):
        raise TypeError(
            f"{who}: mesh is {type(mesh).__name__}; give a Mesh, such as "
            "jax.make_mesh((8,), ('model',))"
        )
    specs = dense_specs(tree, mesh, rules, who=who)
    leaves, unflatten = flatten(tree)
    found = []
    for p in leaves:
        spec = specs.get(p.path, PartitionSpec())
        if PartitionSpec.UNCONSTRAINED in spec:
            raise ValueError(
                f"{who}: {p.path}: {spec} leaves an axis open, which only values inside of a "
                "program can be (parallel.constrain); name a mesh axis, or None"
            )
        if is_encoded(p.value):
            try:
                parts = specs_of(p.value, spec, mesh)
            except ValueError as e:
                raise ValueError(f"{who}: {p.path}: {e}") from e
            found.append(jax.tree.map(lambda s: NamedSharding(mesh, s), parts))
        else:
            found.append(NamedSharding(mesh, spec))
    return unflatten(found)


def shard(tree: Any, mesh: Mesh, rules: Any) -> Any:
    """Lays a tree out on a mesh; see :func:`shardings`.

    Args:
      tree: as for :func:`shardings`, with arrays.
      mesh: the devices.
      rules: as for :func:`shardings`.

    Returns:
      The same tree, each array divided over the devices.

    Raises:
      TypeError: as for :func:`shardings`.
      ValueError: as for :func:`shardings`.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"kernel": jnp.ones((16, 8)), "bias": jnp.zeros(8)}
      >>> params = jom.parallel.shard(params, mesh, [("kernel", P("data")), (".*", P())])
      >>> tuple(params["kernel"].sharding.spec)
      ('data',)
      >>> small = jom.compress(params, [jom.Rule("kernel", jom.quant.Int(bits=8))])
      >>> tuple(small["kernel"].codes.sharding.spec)[0]
      'data'
    """
    found = shardings_of(tree, mesh, rules, "shard")
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"shard: mesh is {type(mesh).__name__}; give a Mesh of devices, such as "
            "jax.make_mesh((8,), ('model',))"
        )
    for p in flatten(tree)[0]:
        if not hasattr(p.value, "dtype") and not isinstance(p.value, (int, float, complex)):
            raise TypeError(f"shard: {p.path} is {type(p.value).__name__}, no array")
    return jax.tree.map(spread, tree, found)


def spec_of(x: Any) -> PartitionSpec:
    """Returns how the tensor that an array or a compressed parameter stands for is divided.

    It is the partition of the dense tensor from which the parts of a leaf are divided as they are:
    the inverse of :func:`shardings`.

    Args:
      x: an array, a leaf, or one traced on a mesh of Explicit axes.

    Returns:
      The partition, an entry for each axis.

    Raises:
      TypeError: for what is no array, or one traced on a mesh that is not Explicit: how it will lie
        is not known before it is compiled.
      ValueError: if the parts are not divided as any partition of the tensor says.

    Example:
      >>> import jax, jax.numpy as jnp, jaxopt_models as jom
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> small = {"w": jom.prune.Magnitude(sparsity=0.5)(jnp.ones((16, 8)))}
      >>> tuple(jom.parallel.spec_of(jom.parallel.shard(small, mesh, P(None, "model"))["w"]))
      (None, 'model')
    """
    parts = jax.tree.leaves(x)
    for a in parts:
        if not hasattr(a, "ndim"):
            raise TypeError(f"spec_of: {type(a).__name__} is no array")
        if isinstance(a, jax.core.Tracer) and not _is_explicit(a):
            raise TypeError(
                "spec_of: inside of jax.jit only arrays on a mesh of Explicit axes know how they "
                "lie; ask outside, or make the mesh with AxisType.Explicit"
            )
    if not is_encoded(x):
        return PartitionSpec(*full_spec(_part_spec(x), x.ndim))
    found = [full_spec(_part_spec(a), a.ndim) for a in parts]
    names = list(dict.fromkeys(e for entries in found for e in entries if e is not None))
    if not names:
        return PartitionSpec(*[None] * x.ndim)
    mesh = next(_sharding(a).mesh for a in parts if isinstance(_sharding(a), NamedSharding))
    for spec in _candidates(names, x.ndim):
        if found == _parts_of(x, spec, mesh):
            return spec
    raise ValueError(
        f"spec_of: the parts of {x!r} are divided as {found}, which no partition of the tensor "
        "gives; divide it by jaxopt_models.parallel.shard"
    )


def _candidates(names: list[Any], ndim: int) -> Any:
    """Yields the partitions that use each of these entries at most once, most of them first."""
    for count in range(len(names), 0, -1):
        for axes in itertools.permutations(range(ndim), min(count, ndim)):
            for chosen in itertools.combinations(names, len(axes)):
                entries: list[Any] = [None] * ndim
                for axis, name in zip(axes, chosen, strict=True):
                    entries[axis] = name
                yield PartitionSpec(*entries)


def _parts_of(x: Encoded, spec: PartitionSpec, mesh: Any) -> list[list[Any]] | None:
    used = [n for e in spec for n in names_of(e)]
    if len(set(used)) < len(used):
        return None
    specs = x.specs(spec, shard_shape(x.shape, spec, mesh.shape))
    if specs is None:
        return None
    pairs = zip(jax.tree.leaves(specs), jax.tree.leaves(x), strict=True)
    return [full_spec(s, a.ndim) for s, a in pairs]


def _sharding(x: Any) -> Any:
    return (
        jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else getattr(x, "sharding", None)
    )


def _is_explicit(x: jax.core.Tracer) -> bool:
    mesh = getattr(_sharding(x), "mesh", None)
    kinds = getattr(mesh, "axis_types", ())
    return bool(kinds) and all(kind is AxisType.Explicit for kind in kinds)


def _part_spec(x: Any) -> PartitionSpec:
    sharding = _sharding(x)
    return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()
