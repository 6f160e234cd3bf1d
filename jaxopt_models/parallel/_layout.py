"""How a program's arrays are divided over the devices it is planned for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._bits import array_bits
from .._divided import moved, shard_bits, without
from .._paths import flatten
from ._dense import check_spec
from ._shard import shardings_of


@dataclasses.dataclass(frozen=True)
class Layout:
    """How parameters and arguments are divided.

    Args:
      axes: sizes of the mesh's axes by name, the last being neighbours; one may be -1, for all
        devices that are left. ``None``: those of the mesh that is planned for.
      rules: how parameters are divided, as for :func:`shardings`.
      inputs: for each argument after ``params`` a `PartitionSpec`, a tree of them, or ``None`` for
        an argument that every device has whole; ``None`` for all: the first axis of every array
        is divided over all axes named in ``batch``.
      batch: the axis, or axes, of the data; default: the first axis of the mesh.
      gather: whether parameters that are divided over the axes of the data are put together again
        as they are stored, so that codes travel and not what they stand for.
      name: in tables; default: made of the axes.
    """

    axes: Mapping[str, int] | None = None
    rules: Any = ()
    inputs: Any = None
    batch: str | tuple[str, ...] | None = None
    gather: bool = True
    name: str = ""

    def over(self, mesh: Mesh) -> tuple[str, ...]:
        """Returns the axes of the data."""
        if self.batch is None:
            return (mesh.axis_names[0],)
        return (self.batch,) if isinstance(self.batch, str) else tuple(self.batch)

    def called(self, mesh: Mesh) -> str:
        """Returns its name."""
        return self.name or " x ".join(f"{a} {n}" for a, n in mesh.shape.items())


def place_params(tree: Any, mesh: Mesh, rules: Any, who: str) -> Any:
    """Returns the shapes of parameters with the sharding of each part.

    Raises:
      TypeError, ValueError: as :func:`shardings`.
    """
    return jax.tree.map(_struct, tree, shardings_of(tree, mesh, rules, who))


def _struct(x: Any, sharding: NamedSharding) -> Any:
    if not hasattr(x, "dtype"):
        return x
    return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=sharding)


def place_inputs(args: Sequence[Any], mesh: Mesh, layout: Layout, who: str) -> list[Any]:
    """Returns the shapes of arguments with their shardings.

    Raises:
      ValueError: for specs of another number, or arrays that do not divide.
    """
    given = layout.inputs
    if isinstance(given, PartitionSpec):
        raise TypeError(f"{who}: inputs is {given}; give a list, one PartitionSpec an argument")
    if given is not None and len(given) != len(args):
        raise ValueError(f"{who}: inputs has {len(given)} specs for {len(args)} arguments")
    over = layout.over(mesh)
    if unknown := [n for n in over if n not in mesh.shape]:
        raise ValueError(f"{who}: batch names {unknown}; the mesh has {dict(mesh.shape)}")
    default = PartitionSpec(over)
    placed = []
    for i, arg in enumerate(args):

        def put(spec: Any, tree: Any, i: int = i) -> Any:
            def one(keys: Any, x: Any) -> Any:
                if not hasattr(x, "dtype"):
                    return x
                here = spec if given is not None or x.shape else PartitionSpec()
                where = f"{who}: argument {i} after params{jax.tree_util.keystr(keys)}"
                check_spec(where, tuple(x.shape), here, mesh)
                return _struct(x, NamedSharding(mesh, here))

            return jax.tree_util.tree_map_with_path(one, tree)

        spec = default if given is None else PartitionSpec() if given[i] is None else given[i]
        placed.append(jax.tree.map(put, spec, arg, is_leaf=lambda s: isinstance(s, PartitionSpec)))
    return placed


def as_stored(fn: Callable[..., Any], placed: Any, over: Sequence[str]) -> Callable[..., Any]:
    """Returns a function whose parameters are first put together along some axes, as stored."""
    parts, treedef = jax.tree.flatten(placed)

    def whole(x: Any, part: Any) -> Any:
        if not isinstance(part, jax.ShapeDtypeStruct):
            return x
        spec = PartitionSpec(*(without(a, over) for a in part.sharding.spec))
        if spec == part.sharding.spec:
            return x
        return moved(x, part.sharding.mesh, part.sharding.spec, spec)

    def run(params: Any, *args: Any) -> Any:
        leaves = treedef.flatten_up_to(params)
        return fn(
            treedef.unflatten([whole(x, p) for x, p in zip(leaves, parts, strict=True)]), *args
        )

    return run


def shard_bytes(placed: Any) -> tuple[float, float]:
    """Returns the bytes of parameters on one device, and of all of them once."""
    here = whole = 0.0
    for p in flatten(placed)[0]:
        if p.reason:
            continue
        for x in jax.tree.leaves(p.value):
            here += shard_bits(x, x.sharding.spec, x.sharding.mesh.shape) / 8
            whole += array_bits(x) / 8
    return here, whole
