"""Values from the inside of a program."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import models, quant

RNG = np.random.default_rng(5)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {"a": normal(4, 4), "v": normal(3, 4, 4) / 2, "b": normal(4, 2)}
X = normal(5, 4)


def model(p, x):
    with jax.named_scope("first"):
        h = jnp.sin(x @ p["a"])

    def layer(h, w):
        with jax.named_scope("layer"):
            h = jnp.tanh(h @ w)
        return h, None

    h, _ = lax.scan(layer, h, p["v"])
    h = checkpoint_name(h, "features")
    return jax.jit(lambda h: h @ p["b"])(h)


def values(p, x):
    """The same by hand: hidden, layers, features."""
    h = jnp.sin(x @ p["a"])
    layers = []
    for w in p["v"]:
        layers.append(jnp.tanh((layers or [h])[-1] @ w))
    return h, jnp.stack(layers), layers[-1]


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_scopes_parameters_equations_and_names():
    names = ["first", "layer", "features", "a", "v", "eqn:sin:0", "path:b"]
    out, found = jom.taps(model, names)(PARAMS, X)
    first, layers, features = values(PARAMS, X)
    close(out, model(PARAMS, X))
    close(found["first"], first)
    close(found["eqn:sin:0"], first)
    close(found["a"], X @ PARAMS["a"])
    close(found["layer"], layers)
    close(found["v"], jnp.arctanh(layers.astype(jnp.float32)))
    close(found["features"], features)
    close(found["path:b"], out)


def test_under_jit_vmap_and_with_compressed_parameters():
    small = jom.compress(PARAMS, [jom.Rule("a|b", quant.Int(bits=8))])
    tapped = jom.taps(model, ["first", "layer"])
    want = values(jom.materialize(small), X)
    for run in (tapped, jax.jit(tapped)):
        _, found = run(small, X)
        close(found["first"], want[0])
        close(found["layer"], want[1])
    _, found = jax.vmap(tapped, in_axes=(None, 0))(small, X[:, None])
    close(found["first"][:, 0], want[0])


def test_values_can_be_differentiated():
    def distance(x, read):
        first, layers = read(x)
        return jnp.sum(first**3) + jnp.sum(layers[1] ** 2)

    def tapped(x):
        found = jom.taps(model, ["first", "layer"])(PARAMS, x)[1]
        return found["first"], found["layer"]

    close(
        jax.grad(lambda x: distance(x, tapped))(X),
        jax.grad(lambda x: distance(x, lambda x: values(PARAMS, x)[:2]))(X),
    )


def test_loops_branches_and_several_values():
    def fn(p, x):
        x = lax.while_loop(
            lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["a"])), (0, x)
        )[1]
        x = lax.cond(x[0, 0] > 9, lambda: jnp.cos(x), lambda: jnp.sin(x))
        return jnp.exp(x) + jnp.exp(2 * x)

    _, found = jom.taps(fn, ["tanh:0", "cos:0", "sin:0", "a"])(PARAMS, X)
    last = X
    for _ in range(3):
        last = jnp.tanh(last @ PARAMS["a"])
    close(found["tanh:0"], last)
    close(found["cos:0"], jnp.zeros((5, 4)))
    close(found["sin:0"], jnp.sin(last))
    both = jom.taps(lambda p, x: x @ p["a"], ["a", "path:a"])(PARAMS, X)[1]
    close(both["a"], both["path:a"])
    twice = jom.taps(lambda p, x: jnp.tanh(x @ p["a"]) @ p["a"], ["a"])(PARAMS, X)[1]["a"]
    assert isinstance(twice, tuple) and len(twice) == 2
    close(twice[0], X @ PARAMS["a"])


def test_remat_and_custom_rules_keep_what_they_are():
    def fn(p, x):
        return jax.checkpoint(lambda h: jax.nn.relu(jnp.sin(h @ p["a"])))(x)

    tapped = jom.taps(fn, ["sin:0"])
    close(tapped(PARAMS, X)[1]["sin:0"], jnp.sin(X @ PARAMS["a"]))
    assert "remat" in str(jax.make_jaxpr(tapped)(PARAMS, X))
    with pytest.raises(ValueError, match="'max:0' is no parameter"):
        jom.taps(fn, ["max:0"])(PARAMS, X)  # inside relu, which has a rule of its own


def test_shard_map_gives_one_for_each_device():
    mesh = jax.make_mesh((5,), ("d",), axis_types=(AxisType.Auto,), devices=jax.devices()[:5])
    f = jax.shard_map(
        lambda w, x: jnp.sin(x @ w), mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d")
    )
    out, found = jom.taps(lambda p, x: f(p["a"], x), ["sin:0"])(PARAMS, X)
    assert found["sin:0"].shape == (5, 1, 4)
    close(found["sin:0"].reshape(5, 4), out)


def test_modules_of_both_frameworks():
    images = jnp.asarray(RNG.integers(0, 256, (2, 28, 28)), jnp.uint8)
    linen = models.LeNet300()
    fn, params = jom.functional((linen, linen.init(jax.random.key(0), images)))
    names = ["ip2", "ip1/kernel"]
    _, found = jom.taps(fn, names)(params, images)
    captured = linen.apply({"params": params}, images, capture_intermediates=True, mutable=True)[1]
    close(found["ip2"], captured["intermediates"]["ip2"]["__call__"][0])
    from flax import nnx

    fn, params = jom.functional(models.nnx.LeNet300(rngs=nnx.Rngs(0)))
    assert jom.taps(fn, ["ip1/kernel"])(params, images)[1]["ip1/kernel"].shape == (2, 300)


def test_the_table_lists_what_there_is():
    table = jom.taps(model, []).table(PARAMS, X)
    rows = {(r["kind"], r["name"]): r["shape"] for r in table}
    assert rows["scope", "first"] == [[5, 4]]
    assert rows["path", "b"] == [4, 2]
    assert rows["eqn", "dot_general:1"] == [[5, 4]]
    assert ("scope", "features") in rows


def test_errors_list_the_names():
    with pytest.raises(ValueError, match=r"'second' is no parameter, .*scopes are .*'first'"):
        jom.taps(model, ["second"])(PARAMS, X)

    class Two(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Block(name="one")(Block(name="two")(x))

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="dense")(x)

    module = Two()
    fn, params = jom.functional((module, module.init(jax.random.key(0), X)))
    with pytest.raises(ValueError, match="'dense' ends several scopes"):
        jom.taps(fn, ["dense"])(params, X)
    with pytest.raises(ValueError, match=r"'eqn:sin:9' is no such name .*equations are .*dot_gen"):
        jom.taps(fn, ["eqn:sin:9"])(params, X)
    with pytest.raises(TypeError, match="1 is no name"):
        jom.taps(fn, [1])
    with pytest.raises(TypeError, match="fn is NoneType"):
        jom.taps(None, [])
    assert jom.taps(fn, "one/dense")(params, X)[1]["one/dense"].shape == (5, 4)


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint])
def test_what_only_the_caller_gets_is_no_tap_in_any_body(around):
    def fn(params, x):
        def inner(w, x):
            with jax.named_scope("enc"):
                return x @ w, jnp.tanh(x) @ w, jnp.mean(x, axis=0)

        q, v, statistic = around(inner)(params["w"], x)
        return jnp.sum(q * 2 + v), statistic

    x = jnp.ones((8, 3))
    found = jax.eval_shape(jom.taps(fn, ["enc"]), {"w": jnp.ones((3, 6))}, x)[1]["enc"]
    assert [v.shape for v in found] == [(8, 6), (8, 6)]
