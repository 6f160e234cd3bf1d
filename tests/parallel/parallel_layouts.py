"""Places trees by rules, and reads transfers out of compiled programs."""

import re

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxopt_models._encoded import is_encoded
from jaxopt_models._paths import flatten

KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"


def mesh_of(shape, names=("data", "model")):
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))


def spec_of(rules, path):
    return next((s for r, s in rules if re.fullmatch(r, path)), PartitionSpec())


def place(tree, mesh, rules):
    """Puts every part of every leaf where the rules say."""
    leaves, unflatten = flatten(tree)
    out = []
    for p in leaves:
        spec = spec_of(rules, p.path)
        x = p.value
        if not is_encoded(x):
            out.append(jax.device_put(x, NamedSharding(mesh, spec)) if hasattr(x, "dtype") else x)
            continue
        local = NamedSharding(mesh, spec).shard_shape(x.shape)
        specs = x.specs(spec, local) if any(spec) else jax.tree.map(lambda _: PartitionSpec(), x)
        assert specs is not None, p.path
        out.append(
            jax.tree.map(
                lambda s, a: jax.device_put(a, NamedSharding(mesh, s)),
                specs,
                x,
                is_leaf=lambda s: isinstance(s, PartitionSpec),
            )
        )
    return unflatten(out)


def transfers(compiled):
    """Returns `(kind, type[shape])` of every transfer of a compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        m = re.search(rf"= (.*?) ({KINDS})(?:-start)?\(", line)
        if m:
            for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", m[1]):
                found.append((m[2], dtype, tuple(int(n) for n in shape.split(",") if n)))
    return found
