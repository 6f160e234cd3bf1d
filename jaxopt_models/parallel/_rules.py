"""Rules: partitions by path, found from a program or from the parameters alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, PartitionSpec

from .._divided import counts_of, mesh_axes, shard_bits, shard_shape
from .._encoded import is_encoded
from .._options import whole
from .._table import Table


class Rules(list[tuple[str, PartitionSpec]]):
    """Pairs of a regular expression for whole paths and a partition; the first match decides.

    Args:
      pairs: the pairs.
      table: a row for each parameter: how it is divided, or why it is not.
      collectives: a row for each operation that needs a transfer between devices.
      inside: partitions of values inside the function that belong to these rules, by the names of
        :func:`jaxopt_models.taps`; for :func:`constrain`.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[str, PartitionSpec]],
        *,
        table: Table,
        collectives: Table | None = None,
        inside: dict[str, PartitionSpec] | None = None,
    ):
        super().__init__(pairs)
        self.table = table
        self.collectives = collectives
        self.inside = dict(inside or {})

    def spec(self, path: str) -> PartitionSpec:
        """Returns the partition of a parameter; what no rule matches is not divided."""
        return next((s for r, s in self if re.fullmatch(r, path)), PartitionSpec())


def devices_of(size: int | None, mesh: Mesh | None, axis: str, who: str) -> int:
    """Returns the number of devices along a mesh axis, given as it is or as a mesh."""
    if (size is None) == (mesh is None):
        raise ValueError(f"{who}: give either size=, the number of devices, or mesh=")
    if mesh is None:
        return whole(size, f"{who}: size", least=1)
    if not isinstance(mesh, Mesh):
        raise TypeError(f"{who}: mesh is {type(mesh).__name__}; give a Mesh, or size=")
    if axis not in mesh.shape:
        raise ValueError(f"{who}: axis={axis!r} is none of the mesh's {tuple(mesh.axis_names)}")
    return mesh.shape[axis]


def on_auto(mesh: Mesh, who: str) -> Mesh:
    """Returns a mesh whose arrays XLA may place, or raises."""
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"{who}: mesh is {type(mesh).__name__}; give a Mesh, such as "
            "jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))"
        )
    if any(kind is not AxisType.Auto for kind in mesh.axis_types):
        raise ValueError(
            f"{who}: the axes of the mesh are {mesh.axis_types}; make it with "
            "axis_types=(AxisType.Auto,) * n, as XLA decides where values inside lie"
        )
    return mesh


def shortened(specs: dict[str, PartitionSpec]) -> list[tuple[str, PartitionSpec]]:
    """Returns rules for paths, one for all that differ in numbers only; whole ones are left out."""
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for path in specs:
        pieces = re.split(r"(\d+)", path)
        groups.setdefault(tuple(pieces[::2]), []).append(pieces)
    found = []
    for group in groups.values():
        found += _patterns(group, specs)
    return [(pattern, spec) for pattern, spec in found if any(spec)]


def _patterns(
    group: list[list[str]], specs: dict[str, PartitionSpec]
) -> list[tuple[str, PartitionSpec]]:
    """Returns patterns for paths in pieces, every second a number that tells them apart."""
    paths = ["".join(pieces) for pieces in group]
    differ = [k for k in range(1, len(group[0]), 2) if len({p[k] for p in group}) > 1]
    if len({specs[path] for path in paths}) == 1:
        parts = [r"\d+" if k in differ else re.escape(x) for k, x in enumerate(group[0])]
        return [("".join(parts), specs[paths[0]])]

    def kinds(k: int) -> int:
        pairs = zip(group, paths, strict=True)
        return len({(pieces[k], specs[path]) for pieces, path in pairs})

    k = min(differ, key=kinds)
    found = []
    for number in dict.fromkeys(pieces[k] for pieces in group):
        found += _patterns([pieces for pieces in group if pieces[k] == number], specs)
    return found


def why_not(x: Any, spec: PartitionSpec, sizes: Mapping[str, int]) -> str:
    """Says why a parameter cannot be divided so; empty if it can."""
    counts = counts_of(spec, len(x.shape), sizes)
    for n, count in zip(x.shape, counts, strict=True):
        if n % count:
            return f"{n} does not divide by {count}"
    if is_encoded(x) and x.specs(spec, shard_shape(x.shape, spec, sizes)) is None:
        parts = math.prod(counts)
        return f"{parts} parts would cut what its {x.kind()} stores together (groups, packed words)"
    return ""


def bytes_each(x: Any, spec: PartitionSpec, sizes: Mapping[str, int]) -> int:
    """Returns the bytes of a parameter on each device: what belongs to all of it is not divided."""
    if not is_encoded(x):
        return shard_bits(x, spec, sizes) // 8
    if not mesh_axes(spec):
        return x.storage_bits() // 8
    specs = x.specs(spec, shard_shape(x.shape, spec, sizes))
    parts = zip(jax.tree.leaves(x), jax.tree.leaves(specs), strict=True)
    return sum(shard_bits(part, s, sizes) for part, s in parts) // 8
