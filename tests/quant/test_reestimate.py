"""Statistics of batch normalization estimated anew."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from batchnorm_nets import net
from jax import lax

import jaxopt_models as jom
from jaxopt_models import quant


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
    h = jax.jit(nn.Conv(8, (3, 3)).apply)({"params": params["params"]["plain"]}, x)
    h = np.asarray(h)
    np.testing.assert_allclose(found["mean"], h.mean((0, 1, 2)), atol=1e-5)
    np.testing.assert_allclose(found["var"], h.var((0, 1, 2)), rtol=1e-4)


def test_quantized_weights_are_the_ones_measured():
    model, variables, x = net()
    fn, params = jom.functional((model, variables))
    params = quant.reestimate_batchnorm(fn, params, [(x,)])
    recipe = [jom.Rule(".*/kernel", quant.Int(bits=3))]
    small = jax.jit(lambda p: jom.compress(p, recipe))(params)
    new = quant.reestimate_batchnorm(fn, small, [(x,)])
    dense = quant.reestimate_batchnorm(fn, jax.jit(jom.materialize)(small), [(x,)])
    assert type(new["params"]["plain"]["kernel"]).__name__ == "Quantized"
    np.testing.assert_allclose(
        new["batch_stats"]["n5"]["var"], dense["batch_stats"]["n5"]["var"], rtol=1e-4
    )


def small_net(p, x):
    h = (x @ p["a"] - p["m1"][None]) * lax.rsqrt(p["v1"][None] + 1e-3) * p["g"][None] + p["c"][None]
    y = (jax.nn.relu(h) @ p["b"] - p["m2"][None]) * lax.rsqrt(p["v2"][None] + 1e-3)
    return h, y


def test_small_returns_the_moments_of_the_float_model():
    # Drawn here, in whatever order tests run: no channel varies as little as epsilon.
    rng = np.random.default_rng(0)

    def normal(*shape):
        return np.float32(rng.normal(size=shape))

    x = normal(40, 6)
    p = {"a": normal(6, 5), "b": normal(5, 4), "m1": normal(5), "m2": normal(4), "g": normal(5)}
    p |= {"c": normal(5), "v1": np.abs(normal(5)) + 0.1, "v2": np.abs(normal(4)) + 0.1}
    run = jax.jit(lambda p, x: small_net(jom.materialize(p), x))
    for params in (p, quant.fold_batchnorm(small_net, p, x)):
        small = jom.compress(params, [jom.Rule("a|b", quant.Int(bits=3))])
        new = quant.reestimate_batchnorm(small_net, params, [(x,)], small=small)
        assert type(new["a"]).__name__ == "Quantized"
        for before, after in zip(run(params, x), run(new, x), strict=True):
            before, after = np.asarray(before), np.asarray(after)
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
        quant.reestimate_batchnorm(fn, params, [(x * np.float32(np.nan),)])
    extra = {**params, "batch_stats": {**params["batch_stats"], "old": {"mean": jnp.ones(2)}}}
    with pytest.raises(ValueError, match="subtracts or divides by batch_stats/old/mean"):
        quant.reestimate_batchnorm(fn, extra, [(x,)])
