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
    small = jom.compress(dict.fromkeys("abcd", W), recipe)
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

        def kernel(t):
            return t["params"]["kernel"].value

    else:
        with jax.set_mesh(mesh_of(8)):
            init = nnx.with_partitioning(init, (None, "x"))
            params = nnx.state(nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0)))

        def kernel(t):
            return t["kernel"].get_value()

    small = jom.compress(params, [Rule(".*kernel", quant.Int(bits=8))])
    names = {"in": None, "out": ("x", "y"), "x": ("x", "y")}
    placed = parallel.shard(small, mesh, names)
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
MESHES = [
    ((8,), P("x")),
    ((8,), P(None, "x")),
    ((4, 2), P("x", "y")),
    ((2, 2, 2), P("y", ("x", "z"))),
]


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
    for i, encoder in enumerate(ENCODERS):
        for j, case in enumerate(MESHES):
            chosen = i % len(MESHES) == j
            yield pytest.param(encoder, *case, marks=[] if chosen else pytest.mark.full)


@pytest.mark.parametrize(("encoder", "sizes", "spec"), [*products()], ids=repr)
def test_what_lies_on_a_mesh_is_encoded_there(encoder, sizes, spec, compiled):
    mesh = mesh_of(*sizes)
    leaf = encoder(jax.device_put(W, NamedSharding(mesh, spec)), key=KEY)
    assert leaf_bits(leaf) == leaf_bits(encoder(W, key=KEY))
    assert parallel.spec_of(leaf) == P(*[*spec, None][:2])
    assert compiled
    assert gathered(compiled) < W.size // 4  # scales at most


@pytest.mark.parametrize("encoder", [HALF, quant.Int(bits=3), codebook.KMeans(bits=2)], ids=repr)
def test_explicit_axes(encoder):
    mesh = mesh_of(4, 2, kind=AxisType.Explicit)
    w = jax.device_put(W, NamedSharding(mesh, P("x", "y")))
    want = leaf_bits(encoder(W))
    leaf = encoder(w)
    assert leaf_bits(leaf) == want
    assert {a.sharding.mesh for a in jax.tree.leaves(leaf)} == {mesh}
    assert leaf_bits(jax.jit(encoder)(w)) == want


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
    mesh = mesh_of(4, 2)
    assert prune.allocate_global(parallel.shard(params, mesh, P("x", "y")), sparsity=0.9) == want


def test_ties_are_broken_as_on_one_device():
    w = jnp.asarray(RNG.integers(0, 3, (64, 32)), jnp.float32)
    for spec in (P("x"), P(None, "x"), P("y", "x")):
        placed = jax.device_put(w, NamedSharding(mesh_of(4, 2), spec))
        assert leaf_bits(HALF(placed)) == leaf_bits(HALF(w))


WRONG = {
    "group": (quant.Int(bits=4, group=16), P("x"), r"w: Quantized .* axis 0 of 64 in shards of 8"),
    "words": (quant.Int(bits=3), P(None, ("x", "y")), "8 codes or mask bits"),
    "rows": (quant.Int(bits=8), P("x", "y", "x"), "has fewer axes"),
    "name": (quant.Int(bits=8), P("z"), r"names \['z'\]; the mesh has"),
    "twice": (quant.Int(bits=8), P("x", "x"), "names a mesh axis twice"),
    "uneven": (quant.Int(bits=8), P(None, "x"), "axis 1 of 12 does not divide .* pad it to 16"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_divided(case):
    encoder, spec, message = WRONG[case]
    mesh = mesh_of(4, 2) if case in ("words", "rows") else mesh_of(8)
    width = {"words": 24, "uneven": 12}.get(case, 64)
    small = {"w": encoder(jnp.ones((64, width)))}
    with pytest.raises(ValueError, match=message):
        parallel.shard(small, mesh, [("w", spec)])
    if case in ("group", "words"):
        w = jax.device_put(jnp.ones((64, width)), NamedSharding(mesh, spec))
        with pytest.raises(ValueError, match=message):
            jom.compress({"w": w}, [Rule("w", encoder)])


def test_rules_that_do_not_fit():
    mesh, params = mesh_of(8), {"a": W, "b": W}
    for rules, error, message in (
        ([("a|b", P("x")), ("c", P("x"))], ValueError, r"\['c'\] divide nothing"),
        ([("a", "x"), (".*", P())], TypeError, "no PartitionSpec"),
        ([("a(", P()), (".*", P())], ValueError, "no regular expression"),
        ({"a": P()}, ValueError, r"say nothing of \['b'\]"),
        (3, TypeError, "give pairs such as"),
        (None, ValueError, "no parameter carries names"),
    ):
        with pytest.raises(error, match=message):
            parallel.shard(params, mesh, rules)
    with pytest.raises(TypeError, match="give a Mesh"):
        parallel.shard(params, "x", P())
