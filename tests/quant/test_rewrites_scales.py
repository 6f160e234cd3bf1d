"""Channels smoothed between activations and weights, and equalised between layers."""

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

RNG = np.random.default_rng(11)


def normal(*shape):
    return np.float32(RNG.normal(size=shape))


def relative(a, b):
    return np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(a)


TOKENS = RNG.integers(0, 11, (4, 6))


@functools.cache
def transformer():
    model = models.Transformer(vocab=11, width=128, heads=4, layers=1, length=6)
    fn, params = jom.functional((model, jax.jit(model.init)(jax.random.key(0), TOKENS)))
    return jax.jit(fn), params


def planted(params):
    """Makes one channel of every norm 50 times as large, and what takes it in as much smaller."""
    new = jax.tree.map(np.array, params)
    block = new["layer1"]
    for norm, readers in (
        ("norm1", [block["attention"][k] for k in ("query", "key", "value")]),
        ("norm2", [block["up"]]),
    ):
        channel = RNG.integers(128)
        for part in block[norm].values():
            part[channel] *= 50
        for reader in readers:
            reader["kernel"][channel] /= 50
    return new


W8A8 = [jom.Rule(".*/kernel", jom.chain(quant.Int(bits=8), quant.Input(bits=8, per="tensor")))]


def test_outliers_of_a_transformer():
    fn, params = transformer()
    params = planted(params)
    stats = jom.calibrate(fn, params, [(TOKENS,)])
    new = quant.smooth(fn, params, stats=stats, args=(TOKENS,))
    out = fn(params, TOKENS)
    assert relative(out, fn(new, TOKENS)) < 1e-5
    run = jom.simulate(fn)
    compress = jax.jit(lambda p: jom.compress(p, W8A8))
    naive, smoothed = (relative(out, run(compress(p), TOKENS)) for p in (params, new))
    assert smoothed < naive / 5


def test_the_formula_and_what_is_left():
    fn, params = transformer()
    stats = jom.calibrate(fn, params, [(TOKENS,)])
    new = quant.smooth(fn, params, stats=stats, args=(TOKENS,), alpha=0.75)
    old, layer = params["layer1"], new["layer1"]
    qkv = [np.asarray(old["attention"][k]["kernel"]) for k in ("query", "key", "value")]
    w = np.max([np.abs(k).max((1, 2)) for k in qkv], axis=0)
    s = np.asarray(stats["layer1/attention/key/kernel"].absmax) ** 0.75 / w**0.25
    np.testing.assert_allclose(layer["norm1"]["scale"], old["norm1"]["scale"] / s, rtol=1e-5)
    np.testing.assert_allclose(
        layer["attention"]["value"]["kernel"],
        # The value also makes the channels of the output's kernel.
        qkv[2] * s[:, None, None] / out_scale(stats, old, 0.75),
        rtol=1e-4,
    )
    assert layer["down"]["kernel"] is old["down"]["kernel"]
    only = quant.smooth(fn, params, stats=stats, args=(TOKENS,), only="layer1/up/kernel")
    assert only["layer1"]["attention"]["query"]["kernel"] is old["attention"]["query"]["kernel"]
    assert not np.array_equal(only["layer1"]["up"]["kernel"], old["up"]["kernel"])
    with pytest.raises(ValueError, match=r"layer1/down/kernel: its input cannot be scaled"):
        quant.smooth(fn, params, stats=stats, args=(TOKENS,), only="layer1/.*")
    with pytest.raises(ValueError, match="matches no kernel that takes channels in"):
        quant.smooth(fn, params, stats=stats, args=(TOKENS,), only="layer9/.*")
    with pytest.raises(ValueError, match="has no statistics 'absmax'"):
        quant.smooth(fn, params, stats={}, args=(TOKENS,))
    with pytest.raises(ValueError, match="alpha=2"):
        quant.smooth(fn, params, stats=stats, args=(TOKENS,), alpha=2)


def out_scale(stats, old, alpha):
    kernel = np.abs(np.asarray(old["attention"]["out"]["kernel"])).max(2)
    x = np.asarray(stats["layer1/attention/out/kernel"].absmax).reshape(kernel.shape)
    return (x**alpha / kernel ** (1 - alpha))[None]


def test_a_scanned_stack():
    sizes = {"vocab": 11, "width": 16, "heads": 2, "layers": 2, "length": 6}
    fn, params = linen(models.Transformer(**sizes, scan=True), TOKENS)
    stats = jom.calibrate(fn, params, [(TOKENS,)])
    new = quant.smooth(fn, params, stats=stats, args=(TOKENS,))
    run = jax.jit(fn)
    assert relative(run(params, TOKENS), run(new, TOKENS)) < 1e-5
    # Each layer of the stack has factors of its own: the bias of norm2 is zero, its scale one.
    up = np.max(np.abs(new["layers"]["up"]["kernel"]), axis=2)
    x = stats["layers/up/kernel"].absmax * new["layers"]["norm2"]["scale"]
    np.testing.assert_allclose(up, x, rtol=1e-4)


class Twin(nnx.Module):
    """A norm and a dense layer."""

    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(6, rngs=rngs)
        self.dense = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.dense(self.norm(x))


def test_nnx():
    fn, params = jom.functional(Twin(nnx.Rngs(0)))
    x = normal(5, 6)
    stats = jom.calibrate(fn, params, [(x,)])
    new = quant.smooth(fn, params, stats=stats, args=(x,), alpha=1)
    run = jax.jit(fn)
    assert relative(run(params, x), run(new, x)) < 1e-5
    # All of it moves: every channel that the kernel sees is at most one.
    seen = jom.calibrate(fn, new, [(x,)])["dense/kernel"].absmax
    np.testing.assert_allclose(seen, np.ones(6), rtol=1e-5)


def linen(model, *args):
    return jom.functional((model, jax.jit(model.init)(jax.random.key(0), *args)))


class PostNorm(nn.Module):
    """A layer whose norm comes after, so that the residual reads what the kernels read."""

    @nn.compact
    def __call__(self, x):
        x = nn.LayerNorm(name="first")(x)
        q, k, v = (nn.Dense(8, name=n)(x).reshape(2, 5, 2, 4) for n in "qkv")
        scores = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        y = jnp.einsum("bhqk,bkhd->bqhd", scores, v).reshape(2, 5, 8)
        return nn.LayerNorm(name="second")(x + nn.Dense(8, name="o")(y))


def test_a_norm_that_the_residual_reads():
    x = normal(2, 5, 8)
    fn, params = linen(PostNorm(), x)
    notes = {r["consumer"]: r["note"] for r in quant.links(fn, params, x)}
    assert "cannot be scaled: it goes through square (PostNorm/second)" in notes["q/kernel"]
    stats = jom.calibrate(fn, params, [(x,)])
    new = quant.smooth(fn, params, stats=stats, args=(x,))
    run = jax.jit(fn)
    assert relative(run(params, x), run(new, x)) < 1e-5
    changed = {p for p in params for k in params[p] if not np.array_equal(params[p][k], new[p][k])}
    assert changed == {"v", "o"}


def conv(x, w, **kwargs):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs
    )


def mobile(p, x, step=jax.nn.relu):
    """Wide, depthwise, narrow, as in a mobile network; a grouped one, and a dense layer."""
    h = step(conv(x, p["wide"]) + p["b1"][None, None, None])
    h = step(conv(h, p["deep"], feature_group_count=6) + p["b2"][None, None, None])
    h = x + conv(h, p["narrow"])
    h = jax.nn.relu(conv(h, p["grouped"], feature_group_count=2))
    return jnp.mean(h, axis=(1, 2)) @ p["dense"]


MOBILE = {
    "wide": normal(1, 1, 4, 6) * np.exp(3 * normal(1, 1, 1, 6)),
    "b1": normal(6),
    "deep": normal(3, 3, 1, 6) * np.exp(3 * normal(1, 1, 1, 6)),
    "b2": normal(6),
    "narrow": normal(1, 1, 6, 4),
    "grouped": normal(3, 3, 2, 6) * np.exp(3 * normal(1, 1, 1, 6)),
    "dense": normal(6, 3),
}


run_mobile = jax.jit(mobile, static_argnums=2)


def ranges(w, axes):
    return np.abs(np.asarray(w)).max(axes)


def test_ranges_are_equal():
    x = normal(2, 5, 5, 4)
    new = quant.equalize(mobile, MOBILE, x)
    assert relative(run_mobile(MOBILE, x), run_mobile(new, x)) < 1e-5
    close = functools.partial(np.testing.assert_allclose, rtol=0.01)
    close(ranges(new["wide"], (0, 1, 2)), ranges(new["deep"], (0, 1, 2)))
    close(ranges(new["deep"], (0, 1, 2)), ranges(new["narrow"], (0, 1, 3)))
    close(ranges(new["grouped"], (0, 1, 2)), ranges(new["dense"], 1))
    assert new["narrow"] is not MOBILE["narrow"]
    # Nothing moves any more.
    again = quant.equalize(mobile, new, x)
    close(again["wide"], new["wide"], atol=1e-3)


def test_a_grid_for_the_whole_kernel_suffices():
    x = normal(2, 5, 5, 4)
    new = quant.equalize(mobile, MOBILE, x)
    rules = [jom.Rule("wide|deep|narrow|grouped|dense", quant.Int(bits=8, per="tensor"))]
    out = run_mobile(MOBILE, x)
    rounded = jax.jit(lambda p: mobile(jom.materialize(jom.compress(p, rules)), x))
    errors = [relative(out, rounded(p)) for p in (MOBILE, new)]
    assert errors[1] < errors[0] / 2


def test_weights_that_are_not_finite_and_arguments_that_are_no_tuple_raise():
    def fn(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    params = {"a": jnp.eye(2).at[0, 0].set(jnp.nan), "b": jnp.eye(2)}
    stats = jom.calibrate(fn, {"a": jnp.eye(2), "b": jnp.eye(2)}, [(jnp.ones(2),)])
    with pytest.raises(ValueError, match="equalize: a: 1 of 4 entries are NaN or Inf"):
        quant.equalize(fn, params, jnp.ones(2))
    with pytest.raises(ValueError, match="smooth: a: 1 of 4 entries are NaN or Inf"):
        quant.smooth(fn, params, stats=stats, args=(jnp.ones(2),))
    with pytest.raises(TypeError, match=r"smooth: args is .*Array.*; give the tuple .*args=\(x,\)"):
        quant.smooth(fn, params, stats=stats, args=jnp.ones(2))


def test_relu6_does_not_commute():
    x, step = normal(2, 5, 5, 4), jax.nn.relu6
    fn = functools.partial(mobile, step=step)
    fn.__name__ = "mobile6"
    new = quant.equalize(fn, MOBILE, x)
    assert new["wide"] is MOBILE["wide"] and new["deep"] is MOBILE["deep"]
    assert relative(run_mobile(MOBILE, x, step), run_mobile(new, x, step)) < 1e-5
    with pytest.raises(ValueError, match="deep: its input cannot be scaled: it is clipped by"):
        quant.equalize(fn, MOBILE, x, only="deep")
    with pytest.raises(ValueError, match="iterations=0"):
        quant.equalize(fn, MOBILE, x, iterations=0)


def test_through_batch_normalization_and_a_residual_trunk():
    model = models.ResNet(stages=(2,), classes=3, width=8)
    x = normal(1, 16, 16, 3)
    fn, params = linen(model, x)
    params = jax.tree.map(lambda a: a * np.exp(normal(*a.shape)) if a.ndim == 1 else a, params)
    new = quant.equalize(fn, params, x)
    run = jax.jit(fn)
    assert relative(run(params, x), run(new, x)) < 1e-5
    p = new["params"]["stage1_block1"]
    np.testing.assert_allclose(
        ranges(p["conv1"]["kernel"], (0, 1, 2)), ranges(p["conv2"]["kernel"], (0, 1, 3)), rtol=0.01
    )
    scale = params["params"]["stage1_block1"]["bn1"]["scale"]
    assert p["bn1"]["scale"] is scale
