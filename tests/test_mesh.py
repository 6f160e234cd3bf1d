import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxopt_models as jom
from jaxopt_models import Rule, chain, codebook, prune, quant
from jaxopt_models.testing import bits, leaf_bits

HALF = prune.Magnitude(sparsity=0.5)
W = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
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


def test_a_stack_over_the_devices():
    w = jnp.asarray(np.random.default_rng(1).normal(size=(8, 16, 6)), jnp.float32)
    axes = jom.Axes(stack=1)
    for encoder in (HALF, quant.Int(bits=4)):
        got = encoder(spread(w, ROWS, AxisType.Auto), axes=axes)
        assert leaf_bits(got) == leaf_bits(encoder(w, axes=axes))


LATENTS = {
    # Encoder, tensor, and how the tensor and what is learned beside it are divided.
    "columns": (quant.LSQ(bits=4, symmetric=False), (16, 32), (None, "x"), ("x", None)),
    "rows": (chain(HALF, quant.LSQ(bits=4)), (16, 32), ("x",), (None, None)),
    "groups": (quant.LSQ(bits=3, group=2), (16, 32), ("x",), (None, "x")),
    "tensor": (quant.LSQ(bits=4, per="tensor"), (16, 64), (None, "x"), (None,)),
    "stack": (quant.LSQ(bits=4), (8, 6, 4), ("x",), ("x", None, None)),
    "few": (quant.LSQ(bits=3), (16, 32), (None, "x"), ()),
    "none": (quant.BinaryConnect(stochastic=True), (16, 32), ("x",), None),
}


def test_what_is_trained_is_divided_with_its_tensor():
    rng, axes = np.random.default_rng(2), jom.Axes(stack=1)
    params = {
        n: jnp.asarray(rng.normal(size=size), jnp.float32) for n, (_, size, *_) in LATENTS.items()
    }
    rules = [Rule(n, e, axes if n == "stack" else None) for n, (e, *_) in LATENTS.items()]
    key = jax.random.key(0)
    params = jom.compress(params, [Rule("rows|tensor|few|none", HALF)])
    latents = jom.prepare(params, rules, key=key)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))

    def divided(name):
        _, size, spec, learned = LATENTS[name]
        latent, spec = latents[name], PartitionSpec(*spec)
        specs = latent.specs(spec, NamedSharding(mesh, spec).shard_shape(size))
        assert specs.w == spec
        for found in jax.tree.leaves(specs.learned):
            assert found == PartitionSpec(*learned)
        return jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), latent, specs)

    both = {n: divided(n) for n in LATENTS}
    for name, x in both.items():
        assert x.w.addressable_shards[0].data.size == x.w.size // 8, name

    @jax.jit
    def shown(t, rest):
        def loss(t):
            values = jom.materialize(jom.combine(t, rest))
            return sum(jnp.sum(jnp.sin(v)) for v in values.values()), values

        (_, values), slopes = jax.value_and_grad(loss, has_aux=True)(t)
        return values, slopes

    one, eight = (shown(*jom.partition(tree)) for tree in (latents, both))
    for name in LATENTS:
        assert bits(eight[0][name]) == bits(one[0][name]), name
    for a, b in zip(*map(jax.tree.leaves, (one[1], eight[1])), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-6)

    # An encoder may look at the whole tensor, so it is shown before it is taken apart.
    f = jax.shard_map(
        lambda w, x: jax.lax.psum(x @ w, "x"),
        mesh=mesh,
        in_specs=(ROWS, COLUMNS),
        out_specs=PartitionSpec(),
    )
    x = jnp.asarray(rng.normal(size=(4, 16)), jnp.float32)
    got = jom.simulate(lambda p, x: f(p["rows"], x))({"rows": latents["rows"]}, x)
    np.testing.assert_allclose(got, x @ one[0]["rows"], rtol=1e-4, atol=1e-5)


@pytest.mark.full
def test_global_plans_are_the_same():
    params = {"a": W, "b": W[:, :24] * 0.5}
    want = prune.allocate_global(params, sparsity=0.9)
    sharded = {k: spread(v, ROWS, AxisType.Auto) for k, v in params.items()}
    assert prune.allocate_global(sharded, sparsity=0.9) == want
