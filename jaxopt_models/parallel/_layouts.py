"""How a program's arrays are divided over the devices it is planned for."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from .._bits import array_bits
from .._encoded import is_encoded
from .._paths import flatten


@dataclasses.dataclass(frozen=True)
class Layout:
    """How parameters and arguments are divided.

    Args:
      axes: sizes of the mesh's axes by name, the last being neighbours; one may be -1, for all
        devices that are left. ``None``: those of the mesh that is planned for.
      rules: pairs of a regular expression on a parameter's whole path and the `PartitionSpec` of
        the dense tensor; the first that matches decides, and without one it is on every device.
      inputs: a `PartitionSpec` for each argument after ``params``, or a tree of them; ``None``:
        the first axis of every array is divided over all axes named in ``batch``.
      batch: the axis, or axes, of the data; default: the first axis of the mesh.
      gather: whether parameters that are divided over the axes of the data are put together again
        as they are stored, so that codes travel and not what they stand for.
      name: in tables; default: made of the axes.
    """

    axes: Mapping[str, int] | None = None
    rules: Sequence[tuple[str, Any]] = ()
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


def place_params(tree: Any, mesh: Mesh, rules: Sequence[tuple[str, Any]], who: str) -> Any:
    """Returns the shapes of parameters with the sharding of each part.

    Raises:
      ValueError: for a rule that decides nothing, or a tensor that cannot be divided so.
    """
    leaves, unflatten = flatten(tree)
    used: set[int] = set()
    placed = []
    for p in leaves:
        spec = PartitionSpec()
        for i, (pattern, given) in enumerate(rules):
            if not p.reason and re.fullmatch(pattern, p.path):
                spec = given
                used.add(i)
                break
        placed.append(_leaf(p.path, p.value, spec, mesh, who))
    dividing = [i for i, (_, spec) in enumerate(rules) if any(spec or ())]
    if idle := [rules[i][0] for i in dividing if i not in used]:
        paths = ", ".join(p.path for p in leaves[:8])
        raise ValueError(f"{who}: no parameter for the rules {idle}; paths are {paths} ...")
    return unflatten(placed)


def _leaf(path: str, x: Any, spec: Any, mesh: Mesh, who: str) -> Any:
    if not is_encoded(x) and not hasattr(x, "dtype"):
        return x
    local = _local(f"{who}: {path}", tuple(x.shape), spec, mesh)
    if not is_encoded(x):
        return _struct(x, mesh, spec)
    specs = x.specs(spec, local)
    if specs is None:
        raise ValueError(
            f"{who}: {path}, a {x.kind()} of shape {list(x.shape)}, cannot be divided as {spec}: a "
            f"shard of {list(local)} would cut a group, or packed codes; divide another axis"
        )
    for part, s in zip(jax.tree.leaves(x), jax.tree.leaves(specs), strict=True):
        _local(f"{who}: a part of {path}", tuple(part.shape), s, mesh)
    return jax.tree.map(lambda part, s: _struct(part, mesh, s), x, specs)


def _struct(x: Any, mesh: Mesh, spec: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(x.shape), x.dtype, sharding=NamedSharding(mesh, spec))


def _local(what: str, shape: tuple[int, ...], spec: Any, mesh: Mesh) -> tuple[int, ...]:
    """Returns the shape of a shard.

    Raises:
      ValueError: if there is no such axis, or it does not divide.
    """
    if not isinstance(spec, PartitionSpec) or len(spec) > len(shape):
        raise ValueError(f"{what}: {spec!r} is no PartitionSpec for shape {list(shape)}")
    local = list(shape)
    for i, axes in enumerate(spec):
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        if unknown := [a for a in names if a not in mesh.shape]:
            raise ValueError(f"{what}: axis {unknown[0]!r} is none of {mesh.axis_names}")
        n = math.prod(mesh.shape[a] for a in names)
        if local[i] % n:
            raise ValueError(
                f"{what}: axis {i} of shape {list(shape)} does not divide by {n}, the size of "
                f"{' x '.join(map(repr, names))}; pad it, or divide another axis"
            )
        local[i] //= n
    return tuple(local)


def place_inputs(args: Sequence[Any], mesh: Mesh, layout: Layout, who: str) -> list[Any]:
    """Returns the shapes of arguments with their shardings.

    Raises:
      ValueError: for specs of another number, or arrays that do not divide.
    """
    given = layout.inputs
    if given is not None and len(given) != len(args):
        raise ValueError(f"{who}: inputs has {len(given)} specs for {len(args)} arguments")
    default = PartitionSpec(layout.over(mesh))
    placed = []
    for i, arg in enumerate(args):

        def put(spec: Any, tree: Any, i: int = i) -> Any:
            def one(keys: Any, x: Any) -> Any:
                if not hasattr(x, "dtype"):
                    return x
                here = spec if given is not None or x.shape else PartitionSpec()
                where = f"{who}: argument {i} after params{jax.tree_util.keystr(keys)}"
                _local(where, tuple(x.shape), here, mesh)
                return _struct(x, mesh, here)

            return jax.tree_util.tree_map_with_path(one, tree)

        spec = default if given is None else given[i]
        placed.append(jax.tree.map(put, spec, arg, is_leaf=lambda s: isinstance(s, PartitionSpec)))
    return placed


def as_stored(fn: Callable[..., Any], placed: Any, over: Sequence[str]) -> Callable[..., Any]:
    """Returns a function whose parameters are first put together along some axes, as stored."""
    parts, treedef = jax.tree.flatten(placed)

    def whole(x: Any, part: Any) -> Any:
        if not isinstance(part, jax.ShapeDtypeStruct):
            return x
        spec = PartitionSpec(*(_without(a, over) for a in part.sharding.spec))
        if spec == part.sharding.spec:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(part.sharding.mesh, spec))

    def run(params: Any, *args: Any) -> Any:
        leaves = treedef.flatten_up_to(params)
        return fn(
            treedef.unflatten([whole(x, p) for x, p in zip(leaves, parts, strict=True)]), *args
        )

    return run


def _without(axes: Any, over: Sequence[str]) -> Any:
    names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
    left = tuple(a for a in names if a not in over)
    return left if len(left) > 1 else left[0] if left else None


def shard_bytes(placed: Any) -> tuple[float, float]:
    """Returns the bytes of parameters on one device, and of all of them once."""
    here = whole = 0.0
    for p in flatten(placed)[0]:
        if p.reason:
            continue
        for x in jax.tree.leaves(p.value):
            local = jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
            here, whole = here + array_bits(local) / 8, whole + array_bits(x) / 8
    return here, whole
