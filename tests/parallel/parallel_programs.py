"""Meshes of CPU devices, and what a compiled program says."""

import math
import re

import jax
import numpy as np

BITS = {"f32": 32, "f16": 16, "bf16": 16, "s32": 32, "u32": 32, "s8": 8, "u8": 8, "pred": 8}


def mesh(**axes):
    """A mesh of the first devices, as ``mesh(stage=4, data=2)``."""
    n = math.prod(axes.values())
    return jax.make_mesh(tuple(axes.values()), tuple(axes), devices=jax.devices()[:n])


def collectives(text):
    """Bytes on each device after each collective of a program, as ``[(kind, bytes)]``."""
    kinds = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
    found = []
    for types, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        arrays = re.findall(r"(\w+)\[([\d,]*)\]", types)
        size = sum(
            BITS[dtype] * math.prod(int(n) for n in shape.split(",") if n) // 8
            for dtype, shape in arrays
        )
        found.append((kind, size))
    return found


def parameters(text):
    """Shapes of what each device is given, in bytes: the entry computation's parameters."""
    entry = text[text.index("ENTRY") :]
    return sorted(
        BITS.get(dtype, 4) * math.prod(int(n) for n in shape.split(",") if n) / 8
        for dtype, shape in re.findall(r"= (\w+)\[([\d,]*)\]\S* parameter\(", entry)
    )


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
