import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from parallel_layouts import mesh_of, transfers

import jaxopt_models as jom
from jaxopt_models import Rule, models, parallel, quant

RNG = np.random.default_rng(0)
MESH = mesh_of((2, 4))


def net(params, x):
    with jax.named_scope("first"):
        x = jnp.tanh(x @ params["a"])
    with jax.named_scope("second"):
        return x @ params["b"]


def weights():
    return {n: jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32) for n in "ab"}


def shardings(fn, params, x):
    """Returns the partitions of all constraints of a program."""
    text = str(jax.make_jaxpr(fn)(params, x))
    return [
        line.split("spec=")[1].split(", mem")[0] for line in text.splitlines() if "spec=" in line
    ]


@pytest.mark.parametrize(
    ("name", "count"),
    [("first", 1), ("f.*t|second", 2), ("path:a", 1), ("input:b", 1), ("eqn:dot_general:.*", 2)],
)
def test_names(name, count):
    params, x = weights(), jnp.ones((4, 8))
    fn = parallel.constrain(net, {name: P("data")}, mesh=MESH)
    found = shardings(fn, params, x)
    assert len(found) == count and all("data" in spec for spec in found)
    np.testing.assert_allclose(jax.jit(fn)(params, x), net(params, x), rtol=1e-5)


def test_the_first_name_decides():
    fn = parallel.constrain(net, [("first", P("data")), ("first|second", P("model"))], mesh=MESH)
    assert ["data" in s for s in shardings(fn, weights(), jnp.ones((4, 8)))] == [True, False]


def test_inside_loops_with_compressed_parameters():
    def fn(params, x):
        def body(x, w):
            with jax.named_scope("layer"):
                y = jnp.tanh(x @ w)
            return y + x, None

        return jax.lax.scan(body, x, params["stack"])[0]

    params = {"stack": jnp.asarray(RNG.normal(size=(3, 8, 8)), jnp.float32)}
    recipe = [Rule("stack", quant.Int(bits=8), axes=jom.Axes(stack=1))]
    small = jom.compress(params, recipe)
    run = parallel.constrain(fn, {"layer": P("data", "model")}, mesh=MESH)
    x = jnp.asarray(RNG.normal(size=(4, 8)), jnp.float32)
    np.testing.assert_allclose(jax.jit(run)(small, x), jom.accelerate(fn)(small, x), atol=1e-6)
    grad = jax.grad(lambda x: run(small, x).sum())(x)
    want = jax.grad(lambda x: jom.accelerate(fn)(small, x).sum())(x)
    np.testing.assert_allclose(grad, want, atol=1e-5)


def test_a_sequence_divided_between_the_layers():
    recipe = [Rule(".*kernel", quant.Int(bits=8))]
    tokens = jnp.asarray(RNG.integers(0, 12, (4, 8)), jnp.int32)
    model = models.Transformer(vocab=12, width=16, heads=4, layers=1, length=8)
    fn, params = jom.functional((model, jax.jit(model.init)(jax.random.key(0), tokens)))
    params = jom.compress(params, recipe)
    rules = parallel.tensor(fn, params, tokens, mesh=MESH, smallest=0, sequence=1)
    step = jax.jit(jom.accelerate(parallel.constrain(fn, rules.inside, mesh=MESH)))
    there = (
        parallel.shard(params, MESH, rules),
        jax.device_put(tokens, NamedSharding(MESH, P("data"))),
    )
    compiled = step.lower(*there).compile()
    want = jom.accelerate(fn)(params, tokens)
    np.testing.assert_allclose(compiled(*there), want, atol=2e-5)
    foretold = collections.Counter(r["kind"] for r in rules.collectives)
    assert foretold == {"all-gather": 4, "reduce-scatter": 2}
    found = collections.Counter(transfers(compiled))
    # Two sums of a layer (reduce-scatters where XLA has them), two gathers before what follows,
    # and no weight: all that moves has the shape of an activation of half a batch.
    whole = (2, 8, 16)
    kinds = {kind for kind, _, shape in found if shape == whole}
    assert kinds <= {"all-reduce", "all-gather", "reduce-scatter"}
    assert found["all-gather", "float32", whole] >= 2
    sums = sum(n for (kind, _, _), n in found.items() if kind in ("all-reduce", "reduce-scatter"))
    assert sums == 2
    assert all(shape[-1] == 16 and len(shape) >= 2 for _, _, shape in found), found


def test_mistakes():
    params, x = weights(), jnp.ones((4, 8))
    with pytest.raises(ValueError, match=r"'third' matches no value of net: .* \['a', 'b'\]"):
        parallel.constrain(net, {"third": P()}, mesh=MESH)(params, x)
    with pytest.raises(ValueError, match=r"'first', a value of shape \(4, 8\) has fewer axes"):
        parallel.constrain(net, {"first": P(None, None, "data")}, mesh=MESH)(params, x)
    with pytest.raises(ValueError, match=r"'first', a value of shape \(3, 8\): axis 0"):
        parallel.constrain(net, {"first": P("data")}, mesh=MESH)(params, x[:3])
    with pytest.raises(TypeError, match="no pair of a name and a PartitionSpec"):
        parallel.constrain(net, {"first": "data"}, mesh=MESH)
    with pytest.raises(ValueError, match="no regular expression"):
        parallel.constrain(net, {"(": P()}, mesh=MESH)(params, x)
    assert parallel.constrain(net, {}, mesh=MESH) is net
    explicit = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with pytest.raises(ValueError, match=r"make it with axis_types=\(AxisType.Auto"):
        parallel.constrain(net, {}, mesh=explicit)
