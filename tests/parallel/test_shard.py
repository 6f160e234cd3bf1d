"""Compressed trees on a mesh, and compressing what lies on one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import Rule, chain, codebook, parallel, prune, quant
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


def test_inside_of_a_program():
    where = mesh_of(8)
    w = jnp.ones((8, 8))
    run = jax.jit(lambda p: parallel.shard(p, where, P("x")))
    assert run(w).sharding.is_equivalent_to(NamedSharding(where, P("x")), 2)
    with pytest.raises(TypeError, match="spec_of: inside"):
        jax.jit(parallel.spec_of)(parallel.shard(w, where, P("x")))
    with pytest.raises(TypeError, match="spec_of: float is no array"):
        parallel.spec_of(0.5)
    with pytest.raises(ValueError, match="leaves an axis open"):
        parallel.shard({"w": w}, where, P(P.UNCONSTRAINED, "x"))
    with pytest.raises(TypeError, match="shard: mesh is AbstractMesh"):
        parallel.shard({"w": w}, where.abstract_mesh, P("x"))


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
