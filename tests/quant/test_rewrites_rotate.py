"""Channels rotated inside the weights."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxopt_models as jom
from jaxopt_models import models, quant
from jaxopt_models.quant._rotate import orthogonal

RNG = np.random.default_rng(13)
KEY = jax.random.key(5)


def normal(*shape):
    return np.float32(RNG.normal(size=shape) / shape[0] ** 0.5)


def relative(a, b):
    return np.linalg.norm(np.subtract(a, b)) / np.linalg.norm(a)


@pytest.mark.parametrize("n", [1, 2, 7, 12, 40, 96, 64])
@pytest.mark.parametrize("ones", [False, True])
def test_the_matrix(n, ones):
    q = orthogonal(n, KEY, ones=ones)
    np.testing.assert_allclose(q @ q.T, np.eye(n), atol=1e-12)
    if ones:
        np.testing.assert_allclose(np.ones(n) @ q, np.ones(n), atol=1e-12)
    if not ones and n in (2, 12, 40, 96, 64):
        np.testing.assert_allclose(np.abs(q), n**-0.5, rtol=1e-9)


def rms(p, ids):
    """A decoder with RMS norms, a gate, and a scale of the norm that is one more than stored."""

    def norm(h, scale):
        return h * lax.rsqrt(jnp.mean(h * h, -1, keepdims=True) + 1e-6) * (1 + scale)[None, None]

    def layer(h, one):
        y = norm(h, one["n1"])
        q, k, v = (jnp.einsum("btc,chd->bthd", y, one[n]) for n in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k)
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)
        h = h + jnp.einsum("bthd,hdc->btc", y, one["o"])
        y = norm(h, one["n2"])
        return h + (jax.nn.silu(y @ one["gate"]) * (y @ one["up"])) @ one["down"], None

    h = lax.scan(layer, p["embed"][ids], p["layers"])[0]
    return norm(h, p["n"]) @ p["head"]


def stack(*shape):
    return np.stack([normal(*shape), normal(*shape)])


RMS = {
    "embed": normal(9, 24),
    "layers": {
        **{n: stack(24, 2, 4) for n in "qkv"},
        **{n: 0.3 * stack(24) for n in ("n1", "n2")},
        **{n: stack(24, 32) for n in ("gate", "up")},
        "down": stack(32, 24),
        "o": stack(2, 4, 24),
    },
    "n": 0.3 * normal(24),
    "head": normal(24, 9),
}
IDS = RNG.integers(0, 9, (2, 5))


def test_a_scanned_decoder_with_rms_norms():
    new = quant.rotate(rms, RMS, IDS, key=KEY)
    run = jax.jit(rms)
    assert relative(run(RMS, IDS), run(new, IDS)) < 1e-5
    np.testing.assert_allclose(new["n"], np.zeros(24), atol=1e-7)
    rows = {r["parameters"].split(", ")[0]: r for r in quant.rotations(rms, RMS, IDS)}
    stream = rows["embed"]
    assert (stream["channels"], stream["order"], stream["keeps ones"]) == (24, 24, False)
    assert stream["scales"] == "layers/n1, layers/n2, n"
    assert {"layers/o", "layers/down", "layers/gate", "head"} <= set(
        stream["parameters"].split(", ")
    )
    # Values by head; queries and keys, which only meet each other, too.
    assert (rows["layers/v"]["channels"], rows["layers/v"]["order"]) == (8, 4)
    assert rows["layers/q"]["parameters"] == "layers/q, layers/k"
    assert "logistic" in rows["layers/gate"]["note"] or "logistic" in rows["layers/up"]["note"]
    # The matrix of the stream is in the embedding and, transposed, in the head.
    want = RMS["embed"] * (1 + RMS["n"]) @ RMS["head"]
    np.testing.assert_allclose(np.asarray(new["embed"]) @ new["head"], want, atol=1e-4)
    again = quant.rotate(rms, RMS, IDS, key=KEY)
    assert np.array_equal(again["embed"], new["embed"])


def test_outliers_are_spread():
    grow = np.where(np.arange(24) == 3, np.float32(40), 1)
    p = {**RMS, "embed": RMS["embed"] * grow}
    new = quant.rotate(rms, p, IDS, key=KEY)
    rules = [jom.Rule("layers/([qkv]|up|gate)", quant.Input(bits=4), jom.Axes(stack=1))]
    out = jax.jit(rms)(p, IDS)
    small, run = [jom.compress(v, rules) for v in (p, new)], jom.simulate(rms)
    errors = [relative(out, run(s, IDS)) for s in small]
    assert errors[1] < 0.7 * errors[0]
    crest = [np.max(np.abs(v["embed"])) / np.std(v["embed"]) for v in (p, new)]
    assert crest[1] < crest[0] / 2


class Net(nn.Module):
    """Layers with a layer norm before each part, learned positions, and a head."""

    scale: bool = True

    @nn.compact
    def __call__(self, ids):
        norm = functools.partial(nn.LayerNorm, use_fast_variance=False)
        x = nn.Embed(9, 16, name="tokens")(ids)
        x = x + nn.Embed(7, 16, name="places")(jnp.arange(5)[None])
        y = norm(name="n1")(x)
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(y)
        y = nn.gelu(nn.Dense(8, name="up")(nn.LayerNorm(name="n2")(x)))
        x = x + nn.Dense(16, name="down")(y)
        x = norm(name="n3", use_scale=self.scale)(x)
        return nn.Dense(3, name="head")(x), x if self.scale is None else None


def made(model, *args):
    params = jax.jit(model.init)(KEY, *args)["params"]
    leaves, treedef = jax.tree.flatten(params)
    rich = [a + 0.2 * normal(*a.shape) if a.ndim == 1 else a for a in leaves]
    return jom.functional((model, {"params": treedef.unflatten(rich)}))


def test_layer_norms():
    fn, params = made(Net(), IDS)
    [stream] = [
        r for r in quant.rotations(fn, params, IDS) if "tokens/embedding" in r["parameters"]
    ]
    assert (stream["order"], stream["keeps ones"]) == (16, True)
    assert stream["scales"] == "n1/scale, n2/scale, n3/scale"
    assert "places/embedding" in stream["parameters"] and "n2/bias" in stream["parameters"]
    new = quant.rotate(fn, params, IDS, key=KEY)
    run = jax.jit(fn)
    assert relative(run(params, IDS)[0], run(new, IDS)[0]) < 1e-5
    np.testing.assert_allclose(new["n1"]["scale"], jnp.ones(16), rtol=1e-6)
    assert relative(params["tokens"]["embedding"], new["tokens"]["embedding"]) > 0.5
    # The mean over the channels stays.
    for table in ("tokens", "places"):
        sums = [np.sum(p[table]["embedding"], axis=1) for p in (params, new)]
        np.testing.assert_allclose(*sums, atol=1e-5)
    only = quant.rotate(fn, params, IDS, key=KEY, only="attention/value/kernel|attention/out/bias")
    assert relative(run(params, IDS)[0], run(only, IDS)[0]) < 1e-5


def test_what_is_not_rotated():
    model = models.Transformer(vocab=9, width=8, heads=2, layers=1, length=5)
    fn, params = made(model, IDS)
    new = quant.rotate(fn, params, IDS, key=KEY)
    assert relative(jax.jit(fn)(params, IDS), jax.jit(fn)(new, IDS)) < 1e-5
    # Its norm is what the function returns: only what is inside attention is rotated.
    assert new["tokens"]["embedding"] is params["tokens"]["embedding"]
    assert new["layer1"]["up"]["kernel"] is params["layer1"]["up"]["kernel"]
    changed = new["layer1"]["attention"]
    assert changed["out"]["kernel"] is not params["layer1"]["attention"]["out"]["kernel"]
    with pytest.raises(
        ValueError, match="cannot be rotated: tokens/embedding: it goes through mul"
    ):
        quant.rotate(fn, params, IDS, key=KEY, only="tokens/.*")
    with pytest.raises(ValueError, match="matches no parameter"):
        quant.rotate(fn, params, IDS, key=KEY, only="tokes/.*")


def test_weights_that_are_not_finite_and_what_is_no_key_raise():
    def fn(p, x):
        return x @ p["a"] @ p["b"]

    params = {"a": jnp.eye(4).at[0, 0].set(jnp.inf), "b": jnp.eye(4)}
    with pytest.raises(ValueError, match="rotate: a: 1 of 16 entries are NaN or Inf"):
        quant.rotate(fn, params, jnp.ones(4), key=jax.random.key(0))
    with pytest.raises(TypeError, match="rotate: key=0 is no random key; give jax"):
        quant.rotate(fn, params, jnp.ones(4), key=0)


def test_parts_that_see_single_channels():
    def fn(p, x, step):
        return step(x @ p["a"]) @ p["b"]

    p = {"a": normal(3, 4), "b": normal(4, 2)}
    single = (
        lambda h: h * jnp.arange(4.0)[None],
        lambda h: h.at[:, 0].set(0),
        lambda h: h[:, ::-1],
        lambda h: jnp.maximum(h, 0),
        lambda h: h + h[:1, :1] * jnp.arange(4.0)[None],
        lambda h: jnp.concatenate([h[:, :2], h[:, 2:]], 1),
        lambda h: jnp.where(jnp.arange(4)[None] > 1, h, 0),
        lambda h: h * h,
        lambda h: jnp.cumsum(h, 1),
    )
    for step in single:
        with pytest.raises(ValueError, match="cannot be rotated"):
            quant.rotate(functools.partial(fn, step=step), p, normal(5, 3), key=KEY)
    several = (
        lambda h: h - jnp.mean(h, 1, keepdims=True),
        lambda h: 2 * h / jnp.linalg.norm(h, axis=1, keepdims=True),
        lambda h: jnp.where(jnp.arange(5)[:, None] > 2, h, 0),
        lambda h: jnp.concatenate([h, 1 + h])[::-1].reshape(5, 2, 4).transpose(1, 2, 0)[1].T,
    )
    for step in several:
        new = quant.rotate(functools.partial(fn, step=step), p, normal(5, 3), key=KEY)
        assert not np.allclose(new["a"], p["a"])
