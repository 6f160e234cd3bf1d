import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from parallel_layouts import mesh_of, transfers

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, parallel, quant
from jaxopt_models._bits import dtype_bits

RNG = np.random.default_rng(0)
MESH = mesh_of((8,), ("data",))
BYTES = {"int8": 1, "uint8": 1, "bfloat16": 2, "float16": 2, "int32": 4, "float32": 4}


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def fn(params, x):
    return jnp.maximum(x @ params["a"], 0) @ params["b"]


def loss(fn):
    return lambda params, x: jnp.sum(fn(params, x) ** 2) / 100


def pair():
    return {"a": normal(64, 128), "b": normal(128, 64)}


def spread(x, mesh=MESH):
    return jax.device_put(x, NamedSharding(mesh, P("data")))


def gathers(compiled):
    """Returns bytes that all-gathers bring to a device, by type."""
    found = collections.Counter()
    for kind, dtype, shape in transfers(compiled):
        if kind == "all-gather":
            found[dtype] += BYTES[dtype] * int(np.prod(shape))
    return found


@pytest.mark.parametrize(
    ("encoder", "want"),
    [
        (None, {"float32": 2 * 4 * 8192}),
        (quant.Int(bits=8), {"int8": 2 * 8192, "float32": 4 * 128}),
        (quant.Int(bits=4, group=16), {"uint8": 8192, "float32": 4 * (128 * 4 + 64 * 8)}),
        (quant.Int(bits=3), {"uint8": 2 * 3 * 1024, "float32": 4 * 128}),
    ],
    ids=repr,
)
def test_what_is_stored_is_what_travels(encoder, want):
    params, x = pair(), normal(16, 64)
    params = params if encoder is None else jom.compress(params, [Rule(".*", encoder)])
    rules = parallel.fsdp(params, mesh=MESH, smallest=0)
    assert list(rules) == [("a", P(None, "data")), ("b", P("data", None)), (".*", P())]
    step = jax.jit(parallel.gathered(fn, rules, mesh=MESH))
    there = parallel.shard(params, MESH, rules)
    np.testing.assert_allclose(step(there, spread(x)), jom.accelerate(fn)(params, x), atol=1e-4)
    assert gathers(step.lower(there, spread(x)).compile()) == want


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_gradients(bits):
    params, x = pair(), normal(16, 64)
    recipe = (
        [] if bits is None else [Rule("a", quant.Int(bits=bits)), Rule("b", quant.Int(bits=bits))]
    )
    encoded = jax.eval_shape(lambda p: jom.compress(p, recipe), params)
    rules = parallel.fsdp(encoded, mesh=MESH, smallest=0)
    there = parallel.shard(params, MESH, rules)
    shown = jom.straight_through(recipe) if recipe else lambda p: p
    want = jax.jit(jax.value_and_grad(loss(lambda p, x: fn(shown(p), x))))(params, x)
    run = parallel.gathered(fn, rules, mesh=MESH, recipe=recipe)
    divided = jax.tree.map(lambda a: a.sharding, there)
    step = jax.jit(jax.value_and_grad(loss(run)), out_shardings=(None, divided))
    compiled = step.lower(there, spread(x)).compile()
    got = compiled(there, spread(x))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))
    # Both weights forward, the second once more backward: neither is kept whole.
    codes = {None: {"float32": 3 * 4 * 8192}, 8: {"int8": 3 * 8192}, 4: {"uint8": 3 * 4096}}[bits]
    found = gathers(compiled)
    assert {k: found[k] for k in codes} == codes
    assert sum(found.values()) - sum(codes.values()) <= 4 * 256  # scales


def test_layers_of_a_loop_with_tensor_parallelism():
    mesh = mesh_of((2, 4))

    def stack(params, x):
        def layer(x, w):
            y = jax.nn.relu(x @ w["up"]) @ w["down"]
            return x + y / jnp.sqrt((y * y).mean(-1, keepdims=True) + 1), None

        return jax.lax.scan(layer, x, params)[0]

    params = {"up": normal(3, 16, 64), "down": normal(3, 64, 16)}
    recipe = [Rule(".*", quant.Int(bits=8), axes=Axes(stack=1))]
    small, x = jom.compress(params, recipe), normal(4, 16)
    rules = parallel.tensor(stack, small, x, mesh=mesh, smallest=0)
    both = parallel.fsdp(small, mesh=mesh, rules=rules, smallest=0)
    assert dict(both) == {
        "up": P(None, "data", "model"),
        "down": P(None, "model", "data"),
        ".*": P(),
    }
    step = jax.jit(parallel.gathered(stack, both, mesh=mesh))
    there, inputs = parallel.shard(small, mesh, both), spread(x, mesh=mesh)
    compiled = step.lower(there, inputs).compile()
    np.testing.assert_allclose(compiled(there, inputs), jom.accelerate(stack)(small, x), atol=1e-5)
    # A layer at a time, and of it the quarter that a device works with.
    assert gathers(compiled)["int8"] == 2 * 16 * 64 // 4
    assert [r for r in transfers(compiled) if r[0] == "all-reduce"] == [
        ("all-reduce", "float32", (2, 16))
    ]


def test_rules():
    params = {
        "w": jnp.ones((6, 16)),
        "conv": jnp.ones((24, 3, 8, 4)),
        "b": jnp.ones(6),
        "s": jnp.ones(()),
    }
    rules = parallel.fsdp(params, size=4, smallest=5)
    assert dict(rules) == {"w": P(None, "data"), "conv": P(None, None, "data", None), ".*": P()}
    notes = {r["path"]: r["note"] for r in rules.table}
    assert notes["b"] == "6 does not divide by 4"
    assert "fewer than smallest=5" in notes["s"]
    grouped = jom.compress({"w": normal(64, 6)}, [Rule("w", quant.Int(bits=4, group=32))])
    assert list(parallel.fsdp(grouped, size=4, smallest=0)) == [(".*", P())]
    assert dict(parallel.fsdp(grouped, size=2, smallest=0))["w"] == P("data", None)
    given = [("w", P("model", None))]
    mesh = mesh_of((2, 4))
    rules = parallel.fsdp({"w": jnp.ones((8, 3))}, mesh=mesh, rules=given, smallest=0)
    assert dict(rules)["w"] == P(("model", "data"), None)


def test_leaves_that_read_their_input_and_what_comes_back():
    both = jom.chain(quant.Int(bits=8), quant.Input(bits=8))
    params, x = pair(), normal(16, 64)
    small = jom.compress(params, [Rule("a", both)])
    rules = parallel.fsdp(small, mesh=MESH, smallest=0)
    run = parallel.gathered(lambda p, x: (fn(p, x), p["b"]), rules, mesh=MESH)
    got, b = run(parallel.shard(small, MESH, rules), spread(x))
    np.testing.assert_allclose(got, jom.simulate(fn)(small, x), atol=1e-3)
    np.testing.assert_array_equal(b, params["b"])


def test_what_is_not_divided_is_encoded_too():
    params, x = {"a": normal(64, 128), "b": normal(128, 3)}, normal(16, 64)
    recipe = [Rule(".*", quant.Int(bits=4))]
    rules = [("a", P("data")), ("b", P())]
    run = jax.jit(parallel.gathered(fn, rules, mesh=MESH, recipe=recipe))
    want = fn(jom.straight_through(recipe)(params), x)
    np.testing.assert_allclose(run(parallel.shard(params, MESH, rules), spread(x)), want, atol=1e-4)


@pytest.mark.parametrize("axes", [None, Axes(out=(0,)), Axes(stack=1)], ids=repr)
def test_layers_are_encoded_together_or_apart_as_the_rule_says(axes):
    def use(params, x):
        return jax.lax.map(lambda w: x @ w, params["w"]) + x @ params["w"][1:2]

    params = {"w": normal(8, 8, 8) * jnp.arange(1.0, 9)[:, None, None]}
    x, recipe = jnp.eye(8), [Rule("w", jom.prune.Magnitude(sparsity=0.5), axes=axes)]
    run = parallel.gathered(use, [("w", P("data"))], mesh=MESH, recipe=recipe)
    want = use(jom.straight_through(recipe)(params), x)
    np.testing.assert_array_equal(run(params, x), want)


def test_chains_are_encoded_before_they_travel():
    both = jom.chain(jom.prune.Magnitude(sparsity=0.5), quant.Int(bits=4, group=8))
    params, x = pair(), normal(16, 64)
    recipe, rules = [Rule("a", both)], [("a|b", P("data"))]
    run = parallel.gathered(fn, rules, mesh=MESH, recipe=recipe)
    want = fn(jom.straight_through(recipe)(params), x)
    np.testing.assert_allclose(run(parallel.shard(params, MESH, rules), x), want, atol=1e-4)


@pytest.mark.parametrize(
    "encoder", [quant.Int(bits=4), jom.codebook.KMeans(bits=4), jom.prune.Magnitude(sparsity=0.5)]
)
def test_the_table_says_the_bytes_of_a_device(encoder):
    small, x = jom.compress(pair(), [Rule(".*", encoder)]), normal(4, 64)
    by_fsdp = parallel.fsdp(small, mesh=MESH, smallest=0)
    by_tensor = parallel.tensor(fn, small, x, mesh=MESH, axis="data", smallest=0)
    for rules in (by_fsdp, by_tensor):
        shardings = jax.tree.leaves(parallel.shardings(small, MESH, rules))
        parts = zip(jax.tree.leaves(small), shardings, strict=True)
        bits = sum(np.prod(s.shard_shape(a.shape)) * dtype_bits(a.dtype) for a, s in parts)
        assert rules.table.data["each"] == sum(rules.table.column("a device")) == bits // 8
        assert rules.table.data["total"] == sum(x.storage_bits() for x in small.values()) // 8


def test_mistakes():
    params, x = pair(), normal(16, 64)
    small = jom.compress(params, [Rule("b", quant.Int(bits=4, group=64))])
    rules = parallel.fsdp(params, mesh=MESH, smallest=0)
    with pytest.raises(ValueError, match=r"b cannot be divided by .*groups"):
        parallel.gathered(fn, rules, mesh=MESH)(small, x)
    with pytest.raises(ValueError, match="axis='model' is none of the mesh's"):
        parallel.gathered(fn, rules, mesh=MESH, axis="model")
    with pytest.raises(ValueError, match="names b, which is a Quantized already"):
        rules = parallel.fsdp(small, mesh=MESH, smallest=0)
        parallel.gathered(fn, rules, mesh=MESH, recipe=[Rule("b", quant.Int(bits=8))])(small, x)
    with pytest.raises(ValueError, match="rules divide a along 'data' already"):
        parallel.fsdp(params, mesh=MESH, rules=[("a", P("data"))])


@pytest.mark.parametrize("where", [{"size": 2}, {"mesh": mesh_of((2, 4))}], ids=["size", "mesh"])
def test_rules_of_other_axes_are_matched_as_shardings_does(where):
    params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8,))}
    both = {"a": P("model", "data"), "b": P("data"), ".*": P()}
    for given in ([("a", P("model"))], {"a": P("model"), "b": P()}):
        assert dict(parallel.fsdp(params, rules=given, smallest=0, **where)) == both
    mistakes = [
        (ValueError, r"fsdp: the rules \['typo'\] divide nothing", [("typo", P("model"))]),
        (ValueError, r"fsdp: b of shape \(8,\) has fewer axes", [("b", P("model", None))]),
        (TypeError, "fsdp: rules='a'; give pairs", "a"),
        (TypeError, r"rule 0 \('a'\) gives 'model', no PartitionSpec", [("a", "model")]),
    ]
    if "mesh" in where:
        mistakes += [(ValueError, r"fsdp: a: .* names \['modle'\]", [("a", P("modle"))])]
        params["c"] = quant.Int(bits=4, group=8)(jnp.ones((16, 8)))
        mistakes += [(ValueError, r"rules divide c by .* would cut", [("c", P("model"))])]
    for kind, words, rules in mistakes:
        with pytest.raises(kind, match=words):
            parallel.fsdp(params, rules=rules, smallest=0, **where)


@pytest.mark.parametrize("rules", [P("data"), {"a": P("data"), "b": P(None, "data")}], ids=repr)
def test_gathered_takes_every_form_of_rules(rules):
    params, x = pair(), normal(16, 64)
    there = parallel.shard(params, MESH, rules)
    run = parallel.gathered(fn, rules, mesh=MESH)
    np.testing.assert_allclose(run(there, x), fn(params, x), atol=1e-3)
