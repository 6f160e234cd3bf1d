"""Meshes, and the transfers of compiled programs."""

import jax
from jax.sharding import AxisType

from jaxopt_models import parallel


def mesh_of(shape, names=("data", "model")):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def transfers(compiled):
    """Returns kind, type and shape of every transfer of a compiled program."""
    return [(c.kind, c.dtype, c.shape) for c in parallel.collectives(compiled)]
