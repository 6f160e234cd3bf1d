"""Meshes of CPU devices, and what a compiled program says."""

import math

import jax
import numpy as np

from jaxopt_models import parallel
from jaxopt_models.parallel._program import as_module


def mesh(**axes):
    """A mesh of the first devices, as ``mesh(stage=4, data=2)``."""
    n = math.prod(axes.values())
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[:n])


def collectives(program):
    """Each collective of a program and its bytes, as ``[(kind, bytes)]``."""
    return [(c.kind, c.bytes) for c in parallel.collectives(program)]


def parameters(program):
    """Bytes of what each device is given."""
    module = as_module(program)
    given = [one for one in module.computations[module.entry].values() if one.kind == "parameter"]
    return sorted(a.bytes for one in given for a in one.arrays)


def gap(a, b):
    """The largest difference between the arrays of two trees, relative to values above one."""
    worst = 0.0
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        x, y = (np.asarray(v).astype(np.float64) for v in (x, y))
        assert x.shape == y.shape
        if x.size:
            worst = max(worst, float(np.max(np.abs(x - y) / np.maximum(1, np.abs(y)))))
    return worst


def same(a, b):
    """Says whether two trees are alike bit for bit, random keys and small types included."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False

    def bits(x):
        x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        return x.dtype, x.shape, np.asarray(x).tobytes()

    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(bits(x) == bits(y) for x, y in pairs)
