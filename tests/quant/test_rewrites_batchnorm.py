"""Folding of batch normalization, in loops and in nnx, too."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batchnorm_nets import drawn, net, normal, relative
from flax import nnx
from jax import lax

import jaxopt_models as jom
from jaxopt_models import models, quant


def test_every_kind_of_layer_and_norm():
    model, variables, x = net()
    fn, params = jom.functional((model, variables))
    rows = {r["mean"].split("/")[1]: r for r in quant.batchnorms(fn, params, x)}
    assert [rows[n]["epsilon"] for n in ("n1", "n2")] == [1e-3, 1e-5]
    assert rows["n1"]["into"] == "plain/kernel, plain/bias"
    assert "no layer is directly before it, but max" in rows["n4"]["note"]
    new = quant.fold_batchnorm(fn, params, x)
    run = jax.jit(fn)
    assert relative(run(params, x), run(new, x)) < 1e-6
    stats, p, old = new["batch_stats"], new["params"], params["params"]
    for name, row in rows.items():
        if row["note"]:
            assert stats[name]["var"] is params["batch_stats"][name]["var"]
            continue
        assert jnp.all(lax.rsqrt(stats[name]["var"] + row["epsilon"]) == 1)
        assert np.all(np.asarray(p.get(name, {}).get("scale", 1)) == 1)
    # A bias of the layer takes everything; else the norm's; else the mean.
    assert not np.any(p["n1"]["bias"]) and not np.any(stats["n1"]["mean"])
    assert not np.array_equal(p["n3"]["bias"], old["n3"]["bias"])
    assert np.any(stats["n2"]["mean"]) and not np.any([*stats["n3"]["mean"], *stats["n5"]["mean"]])


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
    "v": np.abs(normal(5)),
    "o": normal(5, 2),
}


def test_a_function_and_a_dict():
    x = normal(7, 4)
    new = quant.fold_batchnorm(plain, PLAIN, x)
    run = jax.jit(plain)
    assert relative(run(PLAIN, x), run(new, x)) < 1e-6
    assert not np.any(new["c"]) and np.all(np.asarray(new["g"]) == 1)

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


def test_statistics_that_are_none_raise():
    def fn(p, x):
        return (x @ p["w"] - p["mean"]) * (jax.lax.rsqrt(p["var"] + 0.25) * p["g"])

    params = {"w": jnp.eye(2), "mean": jnp.ones(2), "var": jnp.array([1.0, -0.5]), "g": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"fold_batchnorm: var holds -0.5, .* check the running"):
        quant.fold_batchnorm(fn, params, jnp.ones(2))
    params |= {"var": jnp.ones(2), "mean": jnp.array([jnp.nan, 0.0])}
    with pytest.raises(ValueError, match="fold_batchnorm: mean: 1 of 2 entries are NaN or Inf"):
        quant.fold_batchnorm(fn, params, jnp.ones(2))


def test_a_scanned_stack():
    p = {"w": normal(3, 4, 4), "m": normal(3, 4), "v": np.abs(normal(3, 4)), "g": normal(3, 4)}
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
    run = jax.jit(fn)
    assert relative(run(params, x), run(new, x)) < 1e-6
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
