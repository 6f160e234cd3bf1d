"""Parameters and data divided over a mesh, with Auto and with Explicit axes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import quant

RNG = np.random.default_rng(11)
W = jnp.asarray(RNG.normal(size=(16, 32)), jnp.float32)
X = jnp.asarray(RNG.normal(size=(8, 16)), jnp.float32)


def fn(p, x):
    return jnp.tanh(x @ p["w"])


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_divided_leaf_and_divided_data(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    leaf = quant.Int(bits=8)(W)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    with jax.set_mesh(mesh):
        divided = dataclasses.replace(
            leaf, codes=put(leaf.codes, None, "model"), scale=put(leaf.scale, "model", None)
        )
        x = put(X, "data", None)
        run = jax.jit(jom.accelerate(fn))
        got = run({"w": divided}, x)
        text = run.lower({"w": divided}, x).compile().as_text()
        slope = jax.jit(jax.grad(lambda x: jnp.sum(run({"w": divided}, x))))(x)
        stats = jom.calibrate(fn, {"w": put(W, None, "model")}, [(x,)], ["gram", "histogram"])
    assert got.sharding.spec == P("data", "model")
    assert "f32[16,32]" not in text  # no device rebuilds the whole weight
    want = leaf.materialize()
    np.testing.assert_allclose(got, fn({"w": want}, X), rtol=1e-5, atol=1e-5)
    exact = jax.grad(lambda x: jnp.sum(fn({"w": want}, x)))(X)
    np.testing.assert_allclose(slope, exact, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stats["w"].gram, X.T @ X, rtol=1e-5, atol=1e-5)
    assert stats["w"].histogram.counts.sum() == X.size


ENCODERS = [
    quant.Int(bits=8),
    quant.Int(bits=3),
    quant.Int(bits=4, group=8, symmetric=False),
    jom.codebook.KMeans(bits=3),
    jom.codebook.KMeans(bits=3, per="channel"),
    jom.chain(jom.prune.Magnitude(sparsity=0.5), quant.Int(bits=4)),
    jom.chain(quant.Int(bits=8), quant.Input(bits=8, per="tensor")),
]


@pytest.mark.parametrize("encoder", ENCODERS, ids=repr)
def test_shards_stay_packed(encoder):
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    params = {"a": W, "b": W.T + 1}
    split = jax.shard_map(
        lambda a, b, x: jax.lax.psum(jnp.tanh(x @ a) @ b, "model"),
        mesh=mesh,
        in_specs=(P(None, "model"), P("model"), P()),
        out_specs=P(),
    )

    def two(p, x):
        return split(p["a"], p["b"], x)

    small = jom.compress(params, [jom.Rule("a|b", encoder)])
    got = jom.accelerate(two)(small, X)
    if "Input" not in repr(encoder):
        np.testing.assert_allclose(got, two(jom.materialize(small), X), rtol=1e-5, atol=1e-5)
    [kept] = jax.make_jaxpr(jom.accelerate(two))(small, X).eqns
    [mapped] = [e for e in kept.params["jaxpr"].eqns if e.primitive.name == "shard_map"]
    assert not [v for v in mapped.invars if v.aval.shape == W.shape and v.aval.dtype == jnp.float32]


def test_a_leaf_that_cannot_be_divided_is_rebuilt_before():
    mesh = jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,))
    w = jnp.asarray(RNG.normal(size=(16, 12)), jnp.float32)
    f = jax.shard_map(
        lambda w, x: x @ w, mesh=mesh, in_specs=(P(None, "model"), P()), out_specs=P(None, "model")
    )
    small = jom.compress({"w": w}, [jom.Rule("w", quant.Int(bits=3))])  # planes of 12 codes
    got = jom.accelerate(lambda p, x: f(p["w"], x))(small, X)
    np.testing.assert_allclose(got, X @ small["w"].materialize(), rtol=1e-5, atol=1e-5)
