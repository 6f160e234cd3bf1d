"""Folding of batch normalization, and its statistics estimated anew."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jaxopt_models as jom
from jaxopt_models import models, quant

RNG = np.random.default_rng(3)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))


def drawn(tree):
    """Returns parameters as after training: no variance is one, no mean zero, a scale negative."""

    def draw(path, a):
        last = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
        if not jnp.issubdtype(a.dtype, jnp.floating) or "kernel" in last:
            return a
        return jnp.abs(normal(*a.shape)) + 0.1 if "var" in last else normal(*a.shape)

    return jax.tree_util.tree_map_with_path(draw, tree)


class Net(nn.Module):
    """Convolutions of every kind, with and without bias, and norms with and without parts."""

    @nn.compact
    def __call__(self, x, train=False):
        norm = functools.partial(nn.BatchNorm, use_running_average=not train, momentum=0.5)
        x = nn.relu(norm(epsilon=1e-3, name="n1")(nn.Conv(8, (3, 3), name="plain")(x)))
        x = nn.Conv(8, (3, 3), feature_group_count=8, use_bias=False, name="depthwise")(x)
        x = norm(use_scale=False, use_bias=False, name="n2")(x)
        x = nn.Conv(6, (1, 1), feature_group_count=2, use_bias=False, name="grouped")(x)
        x = nn.relu(norm(use_scale=False, name="n3")(x))
        x = norm(name="n4")(x)  # after ReLU: it stays
        x = norm(use_bias=False, name="n5")(nn.Dense(5, name="dense")(x.reshape(x.shape[0], -1)))
        return nn.Dense(3, name="head")(nn.relu(x))


@functools.cache
def net():
    x = normal(6, 4, 4, 3)
    model = Net()
    variables = drawn(jax.jit(model.init)(jax.random.key(0), x))
    return model, variables, x


def test_every_kind_of_layer_and_norm():
    model, variables, x = net()
    fn, params = jom.functional((model, variables))
    rows = {r["mean"].split("/")[1]: r for r in quant.batchnorms(fn, params, x)}
    assert [rows[n]["epsilon"] for n in ("n1", "n2")] == [1e-3, 1e-5]
    assert rows["n1"]["into"] == "plain/kernel, plain/bias"
    assert "no layer is directly before it, but max" in rows["n4"]["note"]
    new = quant.fold_batchnorm(fn, params, x)
    assert relative(fn(params, x), fn(new, x)) < 1e-6
    stats, p, old = new["batch_stats"], new["params"], params["params"]
    for name, row in rows.items():
        if row["note"]:
            assert stats[name]["var"] is params["batch_stats"][name]["var"]
            continue
        assert jnp.all(lax.rsqrt(stats[name]["var"] + row["epsilon"]) == 1)
        assert jnp.all(p.get(name, {}).get("scale", jnp.ones(1)) == 1)
    # A bias of the layer takes everything; else the norm's; else the mean.
    assert not jnp.any(p["n1"]["bias"]) and not jnp.any(stats["n1"]["mean"])
    assert jnp.any(p["n3"]["bias"] != old["n3"]["bias"]) and not jnp.any(stats["n3"]["mean"])
    assert jnp.any(stats["n2"]["mean"]) and not jnp.any(stats["n5"]["mean"])


def oracle(p, s, name, eps, kernel):
    """One norm folded in float64."""
    f = lambda a: np.asarray(a, np.float64)  # noqa: E731
    factor = f(p[name]["scale"]) / np.sqrt(f(s[name]["var"]) + eps)
    return f(p[kernel]["kernel"]) * factor, (f(p[kernel]["bias"]) - f(s[name]["mean"])) * factor


def test_the_numbers():
    model, variables, x = net()
    fn, params = jom.functional((model, variables))
    new = quant.fold_batchnorm(fn, params, x, only="n1/.*")["params"]
    kernel, bias = oracle(params["params"], params["batch_stats"], "n1", 1e-3, "plain")
    bias = bias + np.asarray(params["params"]["n1"]["bias"])
    np.testing.assert_allclose(new["plain"]["kernel"], kernel, rtol=1e-6)
    np.testing.assert_allclose(new["plain"]["bias"], bias, rtol=1e-5, atol=1e-6)
    assert new["dense"]["kernel"] is params["params"]["dense"]["kernel"]


def test_what_cannot_be_folded_raises_if_asked_for():
    model, variables, x = net()
    fn, params = jom.functional((model, variables))
    with pytest.raises(ValueError, match="cannot be folded: batch_stats/n4/var: no layer"):
        quant.fold_batchnorm(fn, params, x, only=".*n4.*")
    with pytest.raises(ValueError, match="matches no parameter of a norm"):
        quant.fold_batchnorm(fn, params, x, only="n9")
    with pytest.raises(ValueError, match="no normalization by running statistics"):
        quant.fold_batchnorm(lambda p, x: x @ p["w"], {"w": normal(3, 2)}, normal(1, 3))
    with pytest.raises(TypeError, match="outside of jit"):
        jax.jit(lambda p: quant.fold_batchnorm(fn, p, x))(params)
    small = jom.compress(params, [jom.Rule("plain/kernel", quant.Int(bits=8))])
    with pytest.raises(TypeError, match="plain/kernel is Quantized; rewrite the dense"):
        quant.fold_batchnorm(fn, small, x)


def plain(p, x, *, both=False):
    y = x @ p["w"] + p["b"][None]
    h = p["g"][None] * ((y - p["m"][None]) / jnp.sqrt(p["v"][None] + 1e-3)) + p["c"][None]
    h = jax.nn.relu(h) @ p["o"]
    return (h, y) if both else h


PLAIN = {
    "w": normal(4, 5),
    **{k: normal(5) for k in "bmgc"},
    "v": jnp.abs(normal(5)),
    "o": normal(5, 2),
}


def test_a_function_and_a_dict():
    x = normal(7, 4)
    new = quant.fold_batchnorm(plain, PLAIN, x)
    assert relative(plain(PLAIN, x), plain(new, x)) < 1e-6
    assert not jnp.any(new["c"]) and jnp.all(new["g"] == 1)

    def read(p, x):
        return plain(p, x, both=True)

    def twice(p, x):
        return plain(p, x) + plain(p, 2 * x)

    for fn, why in ((read, "is returned"), (twice, "is used elsewhere, too")):
        with pytest.raises(ValueError, match=why):
            quant.fold_batchnorm(fn, PLAIN, x)


def stacked(p, x):
    def layer(x, one):
        h = (x @ one["w"] - one["m"][None]) * (lax.rsqrt(one["v"][None] + 1e-5) * one["g"][None])
        return x + jax.nn.relu(h), None

    return lax.scan(layer, x, p)[0]


def test_a_scanned_stack():
    p = {"w": normal(3, 4, 4), "m": normal(3, 4), "v": jnp.abs(normal(3, 4)), "g": normal(3, 4)}
    x = normal(5, 4)
    new = quant.fold_batchnorm(stacked, p, x)
    assert relative(stacked(p, x), stacked(new, x)) < 1e-6
    factor = np.asarray(p["g"]) / np.sqrt(np.asarray(p["v"]) + 1e-5)
    np.testing.assert_allclose(new["w"], np.asarray(p["w"]) * factor[:, None], rtol=1e-5)
    # The statistics of each layer of the stack, by a loop in NumPy.
    found, h = quant.reestimate_batchnorm(stacked, p, [(x,)]), np.asarray(x, np.float64)
    for i in range(3):
        y = h @ np.asarray(p["w"][i], np.float64)
        np.testing.assert_allclose(found["m"][i], y.mean(0), atol=1e-5)
        np.testing.assert_allclose(found["v"][i], y.var(0), rtol=1e-4)
        y = (y - y.mean(0)) / np.sqrt(y.var(0) + 1e-5) * np.asarray(p["g"][i])
        h = h + np.maximum(y, 0)


class Twin(nnx.Module):
    """A convolution without bias, and its norm."""

    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.norm(self.conv(x)))


def test_nnx():
    model = Twin(nnx.Rngs(0))
    model.eval()
    x = normal(2, 5, 5, 3)
    fn, params = jom.functional(model)
    params = drawn(params)
    new = quant.fold_batchnorm(fn, params, x)
    assert relative(fn(params, x), fn(new, x)) < 1e-6
    assert not jnp.any(new["norm"]["mean"][...]) and jnp.any(params["norm"]["mean"][...])
    found = quant.reestimate_batchnorm(fn, params, [(x,)])
    assert not np.array_equal(found["norm"]["mean"][...], params["norm"]["mean"][...])


@pytest.mark.full
def test_inverted_bottlenecks():
    model = models.EfficientNetLite0(
        stages=((1, 3, 1, 1, 8), (2, 5, 2, 6, 12)), stem=8, head=24, classes=5
    )
    x = normal(2, 32, 32, 3)
    fn, params = jom.functional((model, drawn(jax.jit(model.init)(jax.random.key(0), x))))
    new = quant.fold_batchnorm(fn, params, x)
    run = jax.jit(fn)
    assert relative(run(params, x), run(new, x)) < 1e-5
    even = quant.equalize(fn, new, x)
    assert relative(run(params, x), run(even, x)) < 1e-5
    notes = {row["consumer"]: row["note"] for row in quant.links(fn, new, x)}
    # ReLU6 clips what a factor would move; where a block narrows there is none.
    assert "clipped by a constant (min" in notes["blocks_1/depthwise/kernel"]
    assert "clipped by a constant (min" in notes["blocks_1/project/kernel"]
    assert not notes["blocks_2/expand/kernel"]
    p = even["params"]
    assert p["blocks_0"]["depthwise"]["kernel"] is new["params"]["blocks_0"]["depthwise"]["kernel"]
    small = jom.compress(even, [jom.Rule(".*/kernel", quant.Int(bits=4))])
    found = quant.reestimate_batchnorm(fn, even, [(x,)], small=small)
    errors = [relative(run(params, x), run(jom.materialize(v), x)) for v in (small, found)]
    assert errors[1] < errors[0]


def test_statistics_are_those_of_training():
    model, variables, x = net()
    fn, params = jom.functional((model, variables))
    run = jax.jit(lambda v, x: model.apply(v, x, train=True, mutable="batch_stats"))
    _, seen = run(variables, x)
    kept = quant.reestimate_batchnorm(fn, params, [(x,)], momentum=0.5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5),
        kept["batch_stats"],
        seen["batch_stats"],
    )
    # All batches count as much as they have entries.
    parts = [(x[:1],), (x[1:],)]
    found = quant.reestimate_batchnorm(fn, params, parts)["batch_stats"]["n1"]
    h = nn.Conv(8, (3, 3)).apply({"params": params["params"]["plain"]}, x)
    np.testing.assert_allclose(found["mean"], h.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found["var"], h.var((0, 1, 2)), rtol=1e-4)


def test_quantized_weights_are_the_ones_measured():
    model, variables, x = net()
    fn, params = jom.functional((model, variables))
    params = quant.reestimate_batchnorm(fn, params, [(x,)])
    small = jom.compress(params, [jom.Rule(".*/kernel", quant.Int(bits=3))])
    new = quant.reestimate_batchnorm(fn, small, [(x,)])
    dense = quant.reestimate_batchnorm(fn, jom.materialize(small), [(x,)])
    assert type(new["params"]["plain"]["kernel"]).__name__ == "Quantized"
    np.testing.assert_allclose(
        new["batch_stats"]["n5"]["var"], dense["batch_stats"]["n5"]["var"], rtol=1e-4
    )


def small_net(p, x):
    h = (x @ p["a"] - p["m1"][None]) * lax.rsqrt(p["v1"][None] + 1e-3) * p["g"][None] + p["c"][None]
    y = (jax.nn.relu(h) @ p["b"] - p["m2"][None]) * lax.rsqrt(p["v2"][None] + 1e-3)
    return h, y


def test_small_returns_the_moments_of_the_float_model():
    x = normal(40, 6)
    p = {"a": normal(6, 5), "b": normal(5, 4), "m1": normal(5), "m2": normal(4), "g": normal(5)}
    p |= {"c": normal(5), "v1": jnp.abs(normal(5)) + 0.1, "v2": jnp.abs(normal(4)) + 0.1}
    for params in (p, quant.fold_batchnorm(small_net, p, x)):
        small = jom.compress(params, [jom.Rule("a|b", quant.Int(bits=3))])
        new = quant.reestimate_batchnorm(small_net, params, [(x,)], small=small)
        assert type(new["a"]).__name__ == "Quantized"
        for before, after in zip(
            small_net(params, x), small_net(jom.materialize(new), x), strict=True
        ):
            np.testing.assert_allclose(after.mean(0), before.mean(0), atol=1e-4)
            np.testing.assert_allclose(after.std(0), before.std(0), rtol=2e-3)
    # What did not change is not corrected, on whatever data.
    same = quant.reestimate_batchnorm(small_net, params, [(x[:9],), (x[9:],)], small=params)
    for name in ("m1", "v1", "m2", "v2"):
        np.testing.assert_allclose(same[name], params[name], atol=1e-5)
    # One norm after the other in several batches is one batch of all.
    parts = [(x[:9],), (x[9:],)]
    whole = quant.reestimate_batchnorm(small_net, params, [(x,)], small=small)
    found = quant.reestimate_batchnorm(small_net, params, parts, small=small, sequential=True)
    for name in ("m1", "v1", "m2", "v2"):
        np.testing.assert_allclose(found[name], whole[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="not sequential=True"):
        quant.reestimate_batchnorm(small_net, params, parts, sequential=True, momentum=0.5)
    with pytest.raises(ValueError, match=r"m1 and v1 are those of a norm that is folded"):
        quant.reestimate_batchnorm(small_net, params, [(x,)])


def test_statistics_refuse_what_they_do_not_understand():
    model, variables, x = net()
    fn, params = jom.functional((model, variables))
    with pytest.raises(ValueError, match="there is no batch"):
        quant.reestimate_batchnorm(fn, params, [])
    with pytest.raises(TypeError, match="give the tuple"):
        quant.reestimate_batchnorm(fn, params, [x])
    with pytest.raises(ValueError, match=r"momentum=1\.5"):
        quant.reestimate_batchnorm(fn, params, [(x,)], momentum=1.5)
    with pytest.raises(ValueError, match="NaN or Inf"):
        quant.reestimate_batchnorm(fn, params, [(x * jnp.nan,)])
    extra = {**params, "batch_stats": {**params["batch_stats"], "old": {"mean": jnp.ones(2)}}}
    with pytest.raises(ValueError, match="subtracts or divides by batch_stats/old/mean"):
        quant.reestimate_batchnorm(fn, extra, [(x,)])
