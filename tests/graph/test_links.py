"""Which parameters can be scaled: every chain that is found is tried with random factors."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jaxopt_models as jom
from jaxopt_models import models, quant
from jaxopt_models._graph import Links, like, traced

RNG = np.random.default_rng(5)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def relative(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(jnp.linalg.norm(x - y) / jnp.linalg.norm(x)) for x, y in pairs)


def chains(fn, params, *args):
    """Returns ``{consumer: channels}`` after every chain was tried by itself."""
    t = traced(fn, params, args, "test")
    links = Links(t)
    before = t.run(t.values)
    for chain in links.chains:
        scale = np.exp(RNG.normal(size=chain.channels))
        new = {p: like(t.values[p], w) for p, w in chain.scaled(t.values, scale).items()}
        assert relative(before, t.run(t.values | new)) < 1e-5, [m.path for m in chain.members]
    found = {}
    for path, (every, why) in links.consumers().items():
        assert bool(every) != bool(why)
        found[path] = sum(c.channels for c in every)
    return found


def conv(x, w, **kwargs):
    return lax.conv_general_dilated(
        x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), **kwargs
    )


def flat(p, x):
    """A depthwise, a grouped and a padded convolution, pooling, and a flattened image."""
    h = jax.nn.relu(conv(x, p["a"]) + p["ab"][None, None, None])
    h = jax.nn.leaky_relu(conv(h, p["d"], feature_group_count=4) + p["db"][None, None, None])
    h = nn.max_pool(h, (2, 2), (2, 2))
    h = jax.nn.relu(conv(h, p["g"], feature_group_count=2))
    h = nn.avg_pool(jnp.pad(h, ((0, 0), (1, 1), (0, 0), (0, 0))), (2, 1), (1, 1))
    return h.reshape(h.shape[0], -1) @ p["f"]


FLAT = {
    "a": normal(3, 3, 3, 4),
    "ab": normal(4),
    "d": normal(3, 3, 1, 4),
    "db": normal(4),
    "g": normal(1, 1, 2, 6),
    "f": normal(5 * 4 * 6, 2),
}


def test_convolutions_and_a_flattened_image():
    assert chains(flat, FLAT, normal(2, 8, 8, 3)) == {"a": 0, "d": 4, "g": 4, "f": 6}


def odd(p, x):
    """Parts of one kernel's output go different ways; parts of others meet in one."""
    q, k, v = jnp.split(x @ p["qkv"], 3, axis=1)
    h = jnp.concatenate([jax.nn.relu(v), x @ p["w"]], axis=1) * p["mask"][None]
    kernel = jnp.concatenate([p["up"], p["gate"]], axis=1)
    up, gate = jnp.split(h @ kernel, 2, axis=1)
    return jnp.tanh(q + k) @ p["t"] + (jax.nn.silu(gate) * up)[:, ::-1] @ p["down"].T


def test_parts_of_kernels():
    p = {
        "qkv": normal(3, 12),
        "w": normal(3, 2),
        "mask": jnp.asarray([1.0, 1, 0, 1, 1, 1]),
        "up": normal(6, 5),
        "gate": normal(6, 5),
        "t": normal(4, 2),
        "down": normal(2, 5),
    }
    found = chains(odd, p, normal(7, 3))
    # `up` and `gate` take in what `v` and `w` make; the scale of the mask makes channels, too.
    assert found == {"qkv": 0, "w": 0, "up": 6, "gate": 6, "t": 0, "down": 5}


def loops(p, x):
    """A residual stream in a loop whose norm and kernel are one of a stack, and a branch."""

    def layer(h, one):
        y = h * lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6) * (1 + one["s"][None])
        y = lax.cond(
            h[0, 0] > 0, lambda y: jax.nn.relu(y @ one["w"]), lambda y: 2 * y @ one["w"], y
        )
        return h + y @ one["v"], jnp.max(y, axis=0)

    h, ys = lax.scan(layer, x @ p["in"], p["stack"])
    h = lax.fori_loop(0, 2, lambda i, h: jax.nn.relu(h @ p["again"]), h)
    return h @ p["out"], jnp.einsum("lc,cd->ld", ys, p["peak"])


def test_loops_and_branches():
    p = {
        "in": normal(3, 4),
        "stack": {"s": 0.1 * normal(2, 4), "w": normal(2, 4, 5), "v": normal(2, 5, 4)},
        "again": normal(4, 4),
        "out": normal(4, 3),
        "peak": normal(5, 3),
    }
    found = chains(loops, p, normal(2, 3))
    # `peak` is one for all iterations, so `w` has five factors and not two times five.
    none = dict.fromkeys(("in", "again", "out"), 0)
    assert found == {"stack/w": 8, "stack/v": 5, "peak": 5, **none}


def test_tied_weights_and_what_is_returned_are_left_alone():
    def fn(p, ids):
        h = p["embed"][ids]
        y = jax.nn.relu(h @ p["up"])
        return y @ p["down"] @ p["embed"].T, y

    p = {"embed": normal(9, 4), "up": normal(4, 6), "down": normal(6, 4)}
    ids = jnp.arange(5)
    assert chains(fn, p, ids) == {"up": 0, "down": 0, "embed": 0}
    notes = {row["consumer"]: row["note"] for row in quant.links(fn, p, ids)}
    assert "embed is used in several ways" in notes["up"]
    assert "it is returned" in notes["down"]
    assert chains(lambda p, i: fn(p, i)[0], p, ids) == {"up": 0, "down": 6, "embed": 0}


def test_a_transformer_in_a_loop():
    tokens = jnp.asarray(RNG.integers(0, 11, (2, 5)))
    model = models.Transformer(vocab=11, width=8, heads=2, layers=2, length=7, scan=True)
    fn, p = jom.functional((model, jax.jit(model.init)(jax.random.key(0), tokens)))
    found = {k.removeprefix("layers/"): n // 2 for k, n in chains(fn, p, tokens).items()}
    heads = {f"attention/{k}/kernel": 8 for k in ("query", "key", "value", "out")}
    assert found == {"up/kernel": 8, "down/kernel": 0, **heads}


def test_a_dropout_mask_is_no_reader():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, key):
            h = nn.relu(nn.Dense(6, name="a")(x))
            h = nn.Dropout(0.5, deterministic=False)(h, rng=key)
            return nn.Dense(2, name="b")(h)

    x, key = normal(4, 3), jax.random.key(1)
    fn, p = jom.functional((Net(), jax.jit(Net().init)(key, x, key)))
    assert chains(fn, p, x, key) == {"a/kernel": 0, "b/kernel": 6}


@pytest.mark.parametrize("step", [jax.nn.relu6, jax.nn.gelu, jax.nn.softmax, lambda h: h**2])
def test_what_does_not_commute(step):
    p = {"a": normal(3, 4), "b": normal(4, 2)}
    fn = lambda p, x: step(x @ p["a"]) @ p["b"]  # noqa: E731
    assert chains(fn, p, normal(5, 3)) == {"a": 0, "b": 0}
    assert "cannot be scaled" in quant.links(fn, p, normal(5, 3))[1]["note"]
