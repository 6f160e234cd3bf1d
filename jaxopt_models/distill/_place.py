"""Where the arrays of a training lie."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from .._spread import spread
from ._state import State


@dataclasses.dataclass(frozen=True)
class Place:
    """Data parallelism: batches are divided over a mesh axis, all else is on every device.

    XLA decides where intermediate arrays lie (Auto axes), whatever kind of axes the mesh has:
    losses compare examples with one another, which Explicit axes would have to be told about.

    Args:
      mesh: the devices; ``None`` for wherever JAX puts arrays.
      axis: the axis over which the first axis of a batch's arrays is divided; ``None``: batches
        are on every device, too.
      who: the public function, for messages.
    """

    mesh: Mesh | None
    axis: str | None
    who: str

    def __post_init__(self) -> None:
        if self.mesh is None:
            return
        if not isinstance(self.mesh, Mesh):
            raise TypeError(
                f"{self.who}: mesh is {type(self.mesh).__name__}; give a Mesh, such as "
                "jax.make_mesh((8,), ('data',))"
            )
        names = self.mesh.axis_names
        if self.axis is not None and self.axis not in names:
            raise ValueError(f"{self.who}: axis={self.axis!r} is none of the mesh's {names}")
        auto = (AxisType.Auto,) * len(names)
        object.__setattr__(self, "mesh", Mesh(self.mesh.devices, names, axis_types=auto))

    def state(self, state: State) -> State:
        """Returns a state on the devices; parameters that lie on the mesh already stay."""
        if self.mesh is None:
            return state

        def put(x: Any) -> Any:
            sharding, spec = getattr(x, "sharding", None), PartitionSpec()
            if isinstance(sharding, NamedSharding) and _same(sharding.mesh, self.mesh):
                spec = sharding.spec
            return spread(x, NamedSharding(self.mesh, spec))

        return jax.tree.map(put, state)

    def batch(self, batch: Any) -> Any:
        """Returns a batch divided over the axis.

        Where the devices are those of several processes, every process gives the same batch, whole,
        and sends its part to its devices; or arrays that are divided over all of them already, as
        `jax.make_array_from_process_local_data` makes them.

        Raises:
          ValueError: if the number of examples does not divide.
        """
        if self.mesh is None:
            return batch
        size = 1 if self.axis is None else self.mesh.shape[self.axis]

        def put(x: Any) -> Any:
            shape = getattr(x, "shape", ())
            if shape and shape[0] % size:
                raise ValueError(
                    f"{self.who}: a batch holds an array of shape {shape}, whose {shape[0]} rows "
                    f"do not divide over the {size} devices of axis {self.axis!r}"
                )
            spec = PartitionSpec(self.axis) if shape else PartitionSpec()
            return spread(x, NamedSharding(self.mesh, spec))

        return jax.tree.map(put, batch)

    def inside(self, x: jax.Array) -> jax.Array:
        """Returns an array that a step made itself, divided over the axis."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(
            x, NamedSharding(self.mesh, PartitionSpec(self.axis))
        )


def _same(a: Any, b: Mesh) -> bool:
    """Says whether meshes are the same but for the kinds of their axes."""
    return a.axis_names == b.axis_names and a.devices.tolist() == b.devices.tolist()
