"""Encoding what lies on a mesh: the bits of one device, and nothing brought together."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxopt_models as jom
from jaxopt_models import Rule, _divided, chain, codebook, parallel, prune, quant
from jaxopt_models.testing import bits, leaf_bits

P = PartitionSpec
HALF = prune.Magnitude(sparsity=0.5)
W = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.float32)
KEY = jax.random.key(0)
ROWS, COLUMNS = P("x"), P(None, "x")
# Encoders, and whether they are tried on rows and on columns by default.
ENCODERS = [
    (quant.Int(bits=4), "columns"),
    (quant.Int(bits=3, group=8), "both"),
    (quant.Int(bits=3, group=8, symmetric=False), ""),
    (quant.Int(bits=8, per="tensor"), ""),
    (quant.Int(bits=8, symmetric=False, per="tensor"), "rows"),
    (quant.Int(bits=4, group=8, scale=quant.Int(bits=8)), ""),
    (quant.NVFP4(group=8), ""),
    (quant.Binary(), ""),
    (quant.XNOR(), ""),
    (quant.HQQ(bits=4, group=8), ""),
    (HALF, "both"),
    (prune.Magnitude(sparsity=0.25, structure=prune.Block(4, 2)), "rows"),
    (prune.Magnitude(structure=prune.NofM(2, 4)), "rows"),
    (codebook.KMeans(bits=3), ""),
    (codebook.KMeans(bits=4), "columns"),
    (codebook.KMeans(bits=2, per="channel"), "columns"),
    (chain(HALF, codebook.KMeans(bits=3)), "rows"),
    (chain(HALF, quant.Int(bits=4)), ""),
]
MESHES = [
    ((8,), ROWS),
    ((8,), COLUMNS),
    ((4, 2), P("x", "y")),
    ((2, 2, 2), P("y", ("x", "z"))),
]


def mesh_of(*sizes, kind=AxisType.Auto):
    return jax.make_mesh(sizes, ("x", "y", "z")[: len(sizes)], axis_types=(kind,) * len(sizes))


def spread(w, spec, kind):
    return jax.device_put(w, NamedSharding(mesh_of(8, kind=kind), spec))


@pytest.fixture
def compiled(monkeypatch):
    """The programs that encode divided tensors, compiled, in the order in which they run."""
    programs, make = [], _divided._program

    def kept(*args):
        program = make(*args)

        def run(*a):
            programs.append(program.lower(*a).compile())
            return program(*a)

        return run

    monkeypatch.setattr(_divided, "_program", kept)
    return programs


def gathered(programs):
    """Returns the size of the largest array that devices bring together."""
    found = [c for p in programs for c in parallel.collectives(p) if c.kind == "all-gather"]
    return max((math.prod(c.shape) for c in found), default=0)


def products():
    for i, (encoder, tried) in enumerate(ENCODERS):
        for j, (sizes, spec) in enumerate(MESHES):
            named = {ROWS: "rows", COLUMNS: "columns"}.get(spec, "")
            chosen = i % len(MESHES) == j or (named and tried in (named, "both"))
            yield pytest.param(encoder, sizes, spec, marks=[] if chosen else pytest.mark.full)


@pytest.mark.parametrize(("encoder", "sizes", "spec"), [*products()], ids=repr)
def test_what_lies_on_a_mesh_is_encoded_there(encoder, sizes, spec, compiled):
    mesh = mesh_of(*sizes)
    leaf, want = (encoder(w, key=KEY) for w in (jax.device_put(W, NamedSharding(mesh, spec)), W))
    assert leaf_bits(leaf) == leaf_bits(want)
    assert bits(leaf.materialize()) == bits(want.materialize())
    assert parallel.spec_of(leaf) == P(*[*spec, None][:2])
    assert compiled
    assert gathered(compiled) < W.size // 4  # scales at most


# XLA on a CPU writes beyond the memory of 2-bit integers that it sends.
TWO_BITS = [
    (quant.Int(bits=2), (64, 64), (4, 2), P("x", "y")),
    (quant.Int(bits=2), (64, 10), (8,), ROWS),
    (codebook.KMeans(bits=2, per="channel"), (64, 64), (2, 2, 2), P("y", ("x", "z"))),
]


@pytest.mark.parametrize(("encoder", "size", "sizes", "spec"), TWO_BITS, ids=repr)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_two_bits_travel_as_bytes(encoder, size, sizes, spec, kind, compiled):
    w = jnp.asarray(np.random.default_rng(0).normal(size=size), jnp.float32)
    placed = jax.device_put(w, NamedSharding(mesh_of(*sizes, kind=kind), spec))
    assert leaf_bits(encoder(placed)) == leaf_bits(encoder(w))
    if kind == AxisType.Explicit:
        compiled.append(jax.jit(encoder).lower(placed).compile())
    assert {c.bits for p in compiled for c in parallel.collectives(p)} <= {8, 16, 32}


EXPLICIT = [
    *((e, *MESHES[2]) for e in (HALF, quant.Int(bits=3), codebook.KMeans(bits=2))),
    *(
        (e, *case)
        for e in (quant.Int(bits=4), quant.Int(bits=8, symmetric=False))
        for case in MESHES[:2]
    ),
]


@pytest.mark.parametrize(("encoder", "sizes", "spec"), EXPLICIT, ids=repr)
def test_explicit_axes(encoder, sizes, spec):
    mesh = mesh_of(*sizes, kind=AxisType.Explicit)
    w = jax.device_put(W, NamedSharding(mesh, spec))
    leaf, want = encoder(w), encoder(W)
    assert leaf_bits(leaf) == leaf_bits(want)
    if not isinstance(encoder, codebook.KMeans):  # which is looked up, with no sharding to say
        assert bits(leaf.materialize()) == bits(want.materialize())
    assert {a.sharding.mesh for a in jax.tree.leaves(leaf)} == {mesh}
    assert leaf_bits(jax.jit(encoder)(w)) == leaf_bits(want)


SOLVERS = [
    quant.GPTQ(quant.Int(bits=4, group=8)),
    pytest.param(quant.AWQ(quant.Int(bits=4, group=8)), marks=pytest.mark.full),
    pytest.param(quant.AdaRound(quant.Int(bits=4)), marks=pytest.mark.full),
]


@pytest.mark.parametrize("encoder", SOLVERS, ids=repr)
def test_statistics_and_solvers(encoder, compiled):
    mesh = mesh_of(2, 2, 2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(256, 64)), jnp.float32)

    def run(w, x):
        wanted = ["gram", "l2", "histogram"]
        stats = jom.calibrate(lambda p, x: x @ p["w"], {"w": w}, [(x,)], wanted)
        return stats["w"], encoder(w, stats=stats["w"], key=KEY)

    stats, leaf = run(W, x)
    placed, divided = run(
        jax.device_put(W, NamedSharding(mesh, P("x", "y"))),
        jax.device_put(x, NamedSharding(mesh, P(("x", "z")))),
    )
    for a, b in zip(jax.tree.leaves(stats.states), jax.tree.leaves(placed.states), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * float(jnp.max(jnp.abs(a))))
    same = np.mean(np.asarray(leaf.materialize()) == np.asarray(divided.materialize()))
    assert same >= 0.999
    assert gathered(compiled) < W.size // 4


@pytest.mark.full
def test_thresholds_of_all_leaves_together():
    params = {"a": W, "b": W[:, :16] * 0.5}
    want = prune.allocate_global(params, sparsity=0.9)
    for sizes, spec in (MESHES[0], MESHES[2]):
        placed = parallel.shard(params, mesh_of(*sizes), spec)
        assert prune.allocate_global(placed, sparsity=0.9) == want


def test_ties_are_broken_as_on_one_device():
    w = jnp.asarray(np.random.default_rng(0).integers(0, 3, (64, 32)), jnp.float32)
    for spec in (P("x"), P(None, "x"), P("y", "x")):
        placed = jax.device_put(w, NamedSharding(mesh_of(4, 2), spec))
        assert leaf_bits(HALF(placed)) == leaf_bits(HALF(w))


@pytest.mark.parametrize("spec", [ROWS, COLUMNS], ids=["rows", "columns"])
def test_the_same_bits_under_jit(spec):
    recipe = [Rule("a", chain(HALF, quant.Int(bits=4))), Rule("b", quant.Int(bits=5))]
    want = jom.compress({"a": W, "b": W}, recipe)
    params = {n: spread(W, spec, AxisType.Auto) for n in "ab"}
    assert leaf_bits(jax.jit(lambda p: jom.compress(p, recipe))(params)) == leaf_bits(want)


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
