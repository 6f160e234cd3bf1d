import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxopt_models as jom
from jaxopt_models import Rule, chain, codebook, prune, quant
from jaxopt_models.testing import bits, leaf_bits

HALF = prune.Magnitude(sparsity=0.5)
W = jnp.asarray(np.random.default_rng(0).normal(size=(64, 48)), jnp.float32)
ROWS, COLUMNS = PartitionSpec("x"), PartitionSpec(None, "x")
ENCODERS = [
    quant.Int(bits=4),
    quant.Int(bits=3, group=8),
    quant.Int(bits=8, symmetric=False, per="tensor"),
    HALF,
    prune.Magnitude(sparsity=0.25, structure=prune.Block(4, 2)),
    prune.Magnitude(structure=prune.NofM(2, 4)),
    codebook.KMeans(bits=4),
    codebook.KMeans(bits=2, per="channel"),
    chain(HALF, quant.Int(bits=4)),
    chain(HALF, codebook.KMeans(bits=3)),
]
# Each program is compiled for a mesh; test_contract runs every product with --full.
ROW = [*ENCODERS[1:6], ENCODERS[9]]
COLUMN = [*ENCODERS[0:2], ENCODERS[3], *ENCODERS[6:8]]
CASES = [(e, ROWS) for e in ROW] + [(e, COLUMNS) for e in COLUMN]


def spread(w, spec, kind):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    return jax.device_put(w, NamedSharding(mesh, spec))


@pytest.mark.parametrize(("encoder", "spec"), CASES, ids=repr)
def test_the_same_bits_as_on_one_device(encoder, spec):
    want = encoder(W)
    got = encoder(spread(W, spec, AxisType.Auto))
    assert leaf_bits(got) == leaf_bits(want)
    assert bits(got.materialize()) == bits(want.materialize())


@pytest.mark.parametrize("spec", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_the_same_bits_under_jit(spec):
    recipe = [Rule("a", chain(HALF, quant.Int(bits=4))), Rule("b", quant.Int(bits=5))]
    want = jom.compress({"a": W, "b": W}, recipe)
    params = {n: spread(W, spec, AxisType.Auto) for n in "ab"}
    assert leaf_bits(jax.jit(lambda p: jom.compress(p, recipe))(params)) == leaf_bits(want)


@pytest.mark.parametrize("spec", [ROWS, COLUMNS], ids=["rows", "columns"])
@pytest.mark.parametrize("encoder", [quant.Int(bits=4), quant.Int(bits=8, symmetric=False)])
def test_the_same_bits_on_a_mesh_of_explicit_axes(encoder, spec):
    want = encoder(W)
    got = encoder(spread(W, spec, AxisType.Explicit))
    assert leaf_bits(got) == leaf_bits(want)
    assert bits(got.materialize()) == bits(want.materialize())


@pytest.mark.xfail(strict=True, reason="reshapes and sums need out_sharding on explicit axes")
@pytest.mark.parametrize("encoder", [HALF, quant.Int(bits=3), codebook.KMeans(bits=2)], ids=repr)
def test_explicit_columns_of_the_other_encoders(encoder):
    encoder(spread(W, COLUMNS, AxisType.Explicit))


def test_a_stack_over_the_devices():
    w = jnp.asarray(np.random.default_rng(1).normal(size=(8, 16, 6)), jnp.float32)
    axes = jom.Axes(stack=1)
    for encoder in (HALF, quant.Int(bits=4)):
        got = encoder(spread(w, ROWS, AxisType.Auto), axes=axes)
        assert leaf_bits(got) == leaf_bits(encoder(w, axes=axes))


@pytest.mark.full
def test_global_plans_are_the_same():
    params = {"a": W, "b": W[:, :24] * 0.5}
    want = prune.allocate_global(params, sparsity=0.9)
    sharded = {k: spread(v, ROWS, AxisType.Auto) for k, v in params.items()}
    assert prune.allocate_global(sharded, sparsity=0.9) == want
