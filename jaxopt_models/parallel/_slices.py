"""Slices of a mesh axis: a member of several on each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .._spread import spread


@dataclasses.dataclass(frozen=True)
class Slices:
    """A mesh of which one axis separates members, and another may divide batches.

    Args:
      mesh: the devices; all axes become Auto ones, as XLA decides where values between lie.
      axis: along which members differ.
      data: along which the first axis of batches is divided; ``None``: nothing is.
      who: the public function, for messages.
    """

    mesh: Mesh
    axis: str
    data: str | None
    who: str

    def __post_init__(self) -> None:
        if not isinstance(self.mesh, Mesh):
            raise TypeError(
                f"{self.who}: mesh is {type(self.mesh).__name__}; give a Mesh, such as "
                f"jax.make_mesh((4,), ({self.axis!r},))"
            )
        names = self.mesh.axis_names
        for option in ("axis", "data"):
            name = getattr(self, option)
            if name is not None and name not in names:
                raise ValueError(f"{self.who}: {option}={name!r} is none of the mesh's {names}")
        if self.axis is None:
            raise ValueError(f"{self.who}: axis=None; name the axis along which members differ")
        if self.axis == self.data:
            raise ValueError(
                f"{self.who}: axis and data are both {self.axis!r}; members need an axis of "
                "their own: jax.make_mesh((4, 2), ('member', 'data'))"
            )
        auto = (AxisType.Auto,) * len(names)
        object.__setattr__(self, "mesh", Mesh(self.mesh.devices, names, axis_types=auto))

    @property
    def count(self) -> int:
        """Number of members."""
        return self.mesh.shape[self.axis]

    @property
    def shards(self) -> int:
        """Number of parts that batches are divided into."""
        return 1 if self.data is None else self.mesh.shape[self.data]

    def listed(self, given: Any, name: str) -> list[Any]:
        """Returns a list with one for each member.

        Raises:
          TypeError: if it is no list.
          ValueError: if it has another length than the axis.
        """
        if not isinstance(given, (list, tuple)):
            raise TypeError(
                f"{self.who}: {name} is {type(given).__name__}; give a list of {self.count}"
            )
        if len(given) != self.count:
            few = len(given) < self.count
            fix = (
                f"give {self.count}, or a mesh whose axis has {len(given)} devices"
                if few
                else f"give a mesh whose axis has {len(given)} devices, or join neighbours into "
                "one function"
            )
            raise ValueError(
                f"{self.who}: {len(given)} {name} for the {self.count} devices of axis "
                f"{self.axis!r}; {fix}"
            )
        return list(given)

    def functions(self, given: Any, name: str, form: str) -> list[Callable[..., Any]]:
        """Returns a function for each member; a single one serves all.

        Raises:
          TypeError: if one is no function; ``form`` is what it should take and return.
          ValueError: if there are fewer or more than members.
        """
        several = isinstance(given, (list, tuple))
        fns = self.listed(given, f"{name}s") if several else [given] * self.count
        for i, fn in enumerate(fns):
            if not callable(fn):
                raise TypeError(f"{self.who}: {name} {i} is {type(fn).__name__}; give {form}")
        return fns

    def devices(self, i: int) -> list[jax.Device]:
        """Returns the devices of one slice that belong to this process."""
        at = self.mesh.axis_names.index(self.axis)
        inside = np.moveaxis(self.mesh.devices, at, 0).reshape(self.count, -1)[i]
        return [d for d in inside.tolist() if d.process_index == jax.process_index()]

    @property
    def apart(self) -> NamedSharding:
        """How arrays `[members, ...]` are divided."""
        return NamedSharding(self.mesh, PartitionSpec(self.axis))

    def everywhere(self, tree: Any) -> Any:
        """Returns a tree on all devices: where a compiled step leaves such arrays, too."""
        there = NamedSharding(self.mesh, PartitionSpec())
        return jax.tree.map(lambda x: spread(x, there), tree)

    def specs(self, tree: Any) -> Any:
        """Returns how the arrays of a batch are divided.

        Raises:
          ValueError: if the number of examples does not divide.
        """

        def spec(x: Any) -> PartitionSpec:
            shape = np.shape(x)
            if self.data is None or not shape:
                return PartitionSpec()
            if shape[0] % self.shards:
                raise ValueError(
                    f"{self.who}: a batch holds an array of shape {list(shape)}, whose {shape[0]} "
                    f"rows do not divide over the {self.shards} devices of axis {self.data!r}"
                )
            return PartitionSpec(self.data)

        return jax.tree.map(spec, tree)

    def mapped(self, fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
        """Returns a function of what each device holds as one of whole arrays.

        Which values differ along which axis is not tracked: model code that knows of no mesh,
        such as a loop that begins with zeros, would have to be changed for it.

        Raises:
          ValueError: under another mesh, or one whose axes are not Auto.
        """
        context = jax.sharding.get_abstract_mesh()
        if not context.empty and context != self.mesh.abstract_mesh:
            raise ValueError(
                f"{self.who}: called under {context}, where XLA cannot decide where values lie; "
                "leave jax.set_mesh or jax.shard_map around it away, or set this mesh with axes of "
                "jax.sharding.AxisType.Auto"
            )
        return jax.shard_map(
            fn, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def branch(self, run: Callable[..., Any], *operands: Any, same: bool = False) -> Any:
        """Returns what ``run(i, *operands)`` does on the slice of member ``i``.

        Args:
          run: with ``i`` a number; called for each of them while it is traced.
          *operands: what the device holds.
          same: whether it is one and the same program for all members.
        """
        if same:
            return run(0, *operands)
        runs = [lambda *given, i=i: run(i, *given) for i in range(self.count)]
        return jax.lax.switch(jax.lax.axis_index(self.axis), runs, *operands)


def no_mesh() -> Any:
    """Returns a context in which arrays of single devices can be computed with.

    Under `jax.set_mesh` JAX refuses them.
    """
    return jax.set_mesh(Mesh(np.empty((), object), ()))


def one_of(given: Sequence[Any]) -> bool:
    """Says whether all of a list are one and the same object."""
    return all(x is given[0] for x in given)
