"""Compressed trees on a mesh, and compressing what lies on one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import Rule, _divided, chain, codebook, parallel, prune, quant
from jaxopt_models.testing import leaf_bits

RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(64, 64)), jnp.float32)
HALF = prune.Magnitude(sparsity=0.5)
KEY = jax.random.key(0)


def mesh_of(*sizes, kind=AxisType.Auto):
    return jax.make_mesh(sizes, ("x", "y", "z")[: len(sizes)], axis_types=(kind,) * len(sizes))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_parts_lie_with_their_tensor(kind):
    mesh = mesh_of(4, 2, kind=kind)
    recipe = [
        Rule("a", quant.Int(bits=4, group=8, scale=quant.Int(bits=8))),
        Rule("b", chain(HALF, codebook.KMeans(bits=3))),
        Rule("c", quant.Int(bits=3)),
    ]
    small = jom.compress({n: W for n in "abcd"}, recipe)
    rules = [("a", P("x", "y")), ("b", P(None, ("x", "y"))), ("c", P("x")), (".*", P())]
    placed = parallel.shard(small, mesh, rules)
    for name, shares in (("a", 8), ("b", 8), ("c", 4), ("d", 1)):
        leaf = placed[name]
        assert leaf_bits(leaf) == leaf_bits(small[name])
        largest = max(jax.tree.leaves(leaf), key=lambda x: x.nbytes)
        assert largest.addressable_shards[0].data.size * shares == largest.size, name
        want = P(*[*dict(rules).get(name, P()), None, None][:2])
        assert parallel.spec_of(leaf) == want
    assert parallel.spec_of(small["a"]) == P(None, None)


def test_rules_come_in_several_ways():
    mesh = mesh_of(8)
    params = {"a": {"kernel": W, "bias": jnp.zeros(64)}, "count": jnp.zeros((), jnp.int32)}
    want = {"a/kernel": P(None, "x"), "a/bias": P("x")}
    pairs = [*want.items()]
    tree = {"a": {"kernel": P(None, "x"), "bias": NamedSharding(mesh, P("x"))}}
    for rules in (pairs, tree):
        found = parallel.shardings(params, mesh, rules)
        assert found["a"]["kernel"].spec == P(None, "x")
        assert found["a"]["bias"].spec == P("x")
        assert found["count"].spec == P()


@pytest.mark.parametrize("framework", ["linen", "nnx"])
def test_the_names_that_flax_keeps(framework):
    mesh = mesh_of(4, 2)
    init = nn.initializers.lecun_normal()
    if framework == "linen":
        model = nn.Dense(16, kernel_init=nn.with_partitioning(init, ("in", "out")))
        params = model.init(KEY, jnp.zeros((1, 8)))
        kernel = lambda t: t["params"]["kernel"].value  # noqa: E731
    else:
        with jax.set_mesh(mesh_of(8)):
            init = nnx.with_partitioning(init, ("in", "out"), sharding_rules=(("in", None), ("out", "x")))
            params = nnx.state(nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0)))
        params = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), params)
        kernel = lambda t: t["kernel"].get_value()  # noqa: E731
    small = jom.compress(params, [Rule("kernel", quant.Int(bits=8))])
    placed = parallel.shard(small, mesh, {"in": None, "out": ("x", "y")})
    assert jax.tree.structure(placed) == jax.tree.structure(small)
    assert parallel.spec_of(kernel(placed)) == P(None, ("x", "y"))
    assert leaf_bits(kernel(placed)) == leaf_bits(kernel(small))


ENCODERS = [
    quant.Int(bits=4),
    quant.Int(bits=3, group=8, symmetric=False),
    quant.Int(bits=8, per="tensor"),
    quant.Int(bits=4, group=8, scale=quant.Int(bits=8)),
    quant.NVFP4(group=8),
    quant.Binary(),
    quant.XNOR(),
    quant.HQQ(bits=4, group=8),
    HALF,
    prune.Magnitude(sparsity=0.25, structure=prune.Block(4, 2)),
    prune.Magnitude(structure=prune.NofM(2, 4)),
    codebook.KMeans(bits=3),
    codebook.KMeans(bits=2, per="channel"),
    chain(HALF, codebook.KMeans(bits=3)),
    chain(HALF, quant.Int(bits=4)),
]
MESHES = [((8,), P("x")), ((8,), P(None, "x")), ((4, 2), P("x", "y")), ((2, 2, 2), P("y", ("x", "z")))]


def gathered(encoder, w):
    """Returns the most entries that the program which encodes a divided tensor brings together."""
    programs, make = [], _divided._program.__wrapped__

    def kept(*args):
        program = make(*args)
        return lambda *a: programs.append(program.lower(*a).compile()) or program(*a)

    original, _divided._program = _divided._program, kept
    try:
        leaf = encoder(w, key=KEY)
    finally:
        _divided._program = original
    assert programs
    every = [c for p in programs for c in parallel.collectives(p)]
    return leaf, max((math.prod(c.shape) for c in every if c.kind == "all-gather"), default=0)


def products():
    for i, encoder in enumerate(ENCODERS):
        for j, case in enumerate(MESHES):
            chosen = i % len(MESHES) == j
            yield pytest.param(encoder, *case, marks=[] if chosen else pytest.mark.full)


@pytest.mark.parametrize(("encoder", "sizes", "spec"), products(), ids=repr)
def test_what_lies_on_a_mesh_is_encoded_there(encoder, sizes, spec):
    mesh = mesh_of(*sizes)
    leaf, most = gathered(encoder, jax.device_put(W, NamedSharding(mesh, spec)))
    assert leaf_bits(leaf) == leaf_bits(encoder(W, key=KEY))
    assert parallel.spec_of(leaf) == spec
    assert most < W.size // 4  # scales at most


SOLVERS = [quant.GPTQ(quant.Int(bits=4, group=16)), quant.AWQ(quant.Int(bits=4, group=16))]


@pytest.mark.parametrize("encoder", [SOLVERS[0], pytest.param(SOLVERS[1], marks=pytest.mark.full)])
def test_statistics_and_solvers(encoder):
    mesh = mesh_of(2, 2, 2)
    x = jnp.asarray(RNG.normal(size=(256, 64)), jnp.float32)

    def fn(p, x):
        return jnp.tanh(x @ p["w"])

    def found(w, x):
        stats = jom.calibrate(fn, {"w": w}, [(x,)], ["gram", "l2", "histogram"])["w"]
        return stats, *gathered(encoder, w) if False else encoder(w, stats=stats, key=KEY)
