"""Binary weights and inputs: gradients of the papers, packed products, training."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxopt_models as jom
from jaxopt_models import Rule, quant
from jaxopt_models.testing import bits

RNG = np.random.default_rng(13)
W, X, G = (RNG.normal(size=s) for s in ((12, 5), (7, 12), (7, 5)))
NHWC = ("NHWC", "HWIO", "NHWC")


def f32(x):
    return np.asarray(x, np.float32)


def product(p, x):
    return x @ p["w"]


def sign(x):
    return np.where(x >= 0, 1.0, -1.0)


def test_the_gradient_of_binary_weights():
    latent = jom.prepare({"w": f32(W)}, [Rule("w", quant.BWN())])["w"]
    alpha = np.abs(W).mean(0)
    np.testing.assert_allclose(latent.materialize(), alpha * sign(W), rtol=2e-5)
    g = RNG.normal(size=W.shape)

    def loss(w):
        return jnp.sum(dataclasses.replace(latent, w=w).materialize() * f32(g))

    want = g * (1 / 12 + (np.abs(W) <= 1) * alpha)
    np.testing.assert_allclose(jax.grad(loss)(f32(W)), want, rtol=5e-5)
    shipped = jom.compress({"w": latent}, [Rule("w", quant.BWN())])["w"]
    assert bits(shipped.materialize()) == bits(latent.materialize())


def test_binary_inputs_of_a_product():
    leaf = quant.XNOR()(f32(W))
    run = jom.simulate(product)
    scale = np.abs(X).mean(1, keepdims=True)
    want = scale * (sign(X) @ (np.abs(W).mean(0) * sign(W)))
    np.testing.assert_allclose(run({"w": leaf}, f32(X)), want, rtol=1e-4, atol=1e-5)
    turned = jom.simulate(lambda p, x: p["w"].T @ x.T)({"w": leaf}, f32(X))
    np.testing.assert_allclose(turned, want.T, rtol=1e-4, atol=1e-5)
    batched = jom.simulate(lambda p, x: jnp.einsum("abi,io->aob", x, p["w"]))
    got = batched({"w": leaf}, f32(X)[:, None])
    np.testing.assert_allclose(got[..., 0], want, rtol=1e-4, atol=1e-5)
    slope = jax.grad(lambda x: jnp.sum(run({"w": leaf}, x) * f32(G)))(f32(X))
    back = scale * G @ (np.abs(W).mean(0) * sign(W)).T
    np.testing.assert_allclose(slope, np.where(np.abs(X) <= 1, back, 0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("groups", "stride"), [(1, 1), (2, 2), (4, 1)])
def test_binary_inputs_of_a_convolution(groups, stride):
    x, w = RNG.normal(size=(2, 5, 5, 4)), RNG.normal(size=(3, 3, 4 // groups, 8))

    def fn(p, x):
        return lax.conv_general_dilated(
            x,
            p["w"],
            (stride, stride),
            "SAME",
            dimension_numbers=NHWC,
            feature_group_count=groups,
        )

    got = jom.simulate(fn)({"w": quant.XNOR()(f32(w))}, f32(x))
    alpha = np.abs(w).mean((0, 1, 2))
    plain = fn({"w": f32(alpha * sign(w))}, f32(sign(x)))
    size = np.abs(x).reshape(2, 5, 5, groups, -1).mean(-1)  # over the channels a filter sees
    size = np.pad(size, ((0, 0), (1, 1), (1, 1), (0, 0)))
    n = plain.shape[1]
    scale = np.zeros((2, n, n, groups))
    for i in range(n):
        for j in range(n):
            window = size[:, i * stride : i * stride + 3, j * stride : j * stride + 3]
            scale[:, i, j] = window.mean((1, 2))
    want = np.asarray(plain, np.float64) * np.repeat(scale, 8 // groups, axis=-1)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_a_row_over_several_devices_has_one_scale():
    mesh = jax.make_mesh((2,), ("m",), axis_types=(AxisType.Auto,))
    specs = (P("m"), P(None, "m"))
    f = jax.shard_map(lambda w, x: lax.psum(x @ w, "m"), mesh=mesh, in_specs=specs, out_specs=P())
    small = {"w": quant.Sign()(f32(W))}
    one = jom.simulate(product)(small, f32(X))
    two = jom.simulate(lambda p, x: f(p["w"], x))(small, f32(X))
    np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [1, 31, 32, 33, 200])
def test_packed_products_equal_the_float_simulation_exactly(n):
    x, w = RNG.normal(size=(4, n)), RNG.normal(size=(n, 6))
    x[0, 0] = 0.0

    @jax.jit
    def both(x, w):
        leaf = quant.Sign(scaled=False)(quant.BinaryConnect()(w))
        packed = quant.binary_dot(quant.pack_signs(x), quant.pack_signs(w.T), n)
        return packed, jom.simulate(product)({"w": leaf}, x)

    got, simulated = both(f32(x), f32(w))
    np.testing.assert_array_equal(got, (sign(x) @ sign(w)).astype(int))
    np.testing.assert_array_equal(np.asarray(simulated), np.asarray(got, np.float32))


def test_packed_words_are_a_bit_a_sign():
    words = quant.pack_signs(f32(RNG.normal(size=(3, 2, 65))))
    assert words.shape == (3, 2, 3) and words.dtype == jnp.uint32
    assert bool(jnp.all(words[..., 2] <= 1))
    stored = quant.BinaryConnect()(f32(RNG.normal(size=(100, 64))))
    assert stored.bits_by_part()["codes"] == 100 * 64
    with pytest.raises(TypeError, match="binary_dot: a is int32"):
        quant.binary_dot(words[0].astype(jnp.int32), words[0], 65)
    with pytest.raises(ValueError, match="for 64 signs in a row"):
        quant.binary_dot(words[0], words[0], 64)


def test_stochastic_signs_have_the_chance_of_the_paper():
    w = f32(np.linspace(-1.5, 1.5, 13))
    encoder = quant.BinaryConnect(stochastic=True)
    show = jom.straight_through([Rule("w", encoder)])
    keys = jax.random.split(jax.random.key(0), 2000)
    drawn = np.asarray(jax.vmap(lambda k: show({"w": w}, k)["w"])(keys))
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    chance = np.clip((np.asarray(w, np.float64) + 1) / 2, 0, 1)
    np.testing.assert_allclose((drawn == 1).mean(0), chance, atol=0.05)
    with pytest.raises(ValueError, match=r"straight_through: w: .* draws; give key="):
        show({"w": w})
    with pytest.raises(ValueError, match="unit=False; use Binary"):
        quant.BinaryConnect(unit=False)


def test_latents_stay_in_range():
    recipe = [Rule("w", quant.XNOR()), Rule("v", quant.LSQ(bits=4))]
    trainable, _ = jom.partition(jom.prepare({"w": f32(W), "v": f32(W), "b": f32(W)}, recipe))
    tx = optax.chain(optax.sgd(1.0), quant.clip_latents(-0.5, 0.5))
    grads = jax.tree.map(lambda x: x * 0 - 9.0, trainable)
    updates, _ = tx.update(grads, tx.init(trainable), trainable)
    new = optax.apply_updates(trainable, updates)
    for latent in (new["w"].values, new["v"]):
        np.testing.assert_allclose(latent.w, 0.5, rtol=1e-6)
    np.testing.assert_allclose(new["b"], W + 9, rtol=1e-6)
    np.testing.assert_allclose(new["v"].learned["step"], trainable["v"].learned["step"] + 9)
    with pytest.raises(ValueError, match="clip_latents: nothing is kept in range; paths are: b"):
        quant.clip_latents().init({"b": f32(W)})
    with pytest.raises(ValueError, match=r"the range from 1\.0 to 0\.0 is empty"):
        quant.clip_latents(1, 0)
    with pytest.raises(ValueError, match="update needs params"):
        tx.update(grads, tx.init(trainable))


class Blocks(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(32, name="first")(x)
        x = nn.Dense(32, name="inner")(nn.LayerNorm()(x))
        return nn.Dense(2, name="last")(nn.LayerNorm()(x))


@pytest.mark.parametrize("name", ["XNOR", "BinaryConnect", "stochastic"])
def test_the_loss_falls_and_what_was_trained_is_shipped(name, descend):
    rng = np.random.default_rng(1)
    x = f32(rng.normal(size=(64, 8)))
    target = f32(np.sign(np.asarray(x)[:, :2]))
    model = Blocks()
    fn, params = jom.functional((model, jax.jit(model.init)(jax.random.key(0), x)))
    encoder = (
        quant.XNOR() if name == "XNOR" else quant.BinaryConnect(stochastic=name == "stochastic")
    )
    recipe, key = [Rule("inner/kernel", encoder)], jax.random.key(0)
    connect = name != "XNOR"
    trainable, rest = jom.partition(params if connect else jom.prepare(params, recipe))
    run = fn if connect else jom.simulate(fn)
    show = jom.straight_through(recipe)
    clip = quant.clip_latents(only="inner/kernel") if connect else quant.clip_latents()
    tx = optax.chain(optax.adam(1e-2), clip)

    def loss(t, key):
        tree = jom.combine(t, rest)
        return jnp.mean((run(show(tree, key) if connect else tree, x) - target) ** 2)

    trained, values = descend(loss, tx, trainable, jax.random.split(key, 150))
    values = np.asarray(values)
    assert values[-10:].mean() < 0.5 * values[:10].mean()
    if connect:
        assert np.max(np.abs(trained["inner"]["kernel"])) <= 1 + 1e-6
        return
    latents = jom.combine(trained, rest)
    small = jom.compress(latents, recipe)
    assert bits(small["inner"]["kernel"].materialize()) == bits(
        latents["inner"]["kernel"].materialize()
    )
    np.testing.assert_allclose(run(small, x), run(latents, x), rtol=1e-5, atol=1e-5)
