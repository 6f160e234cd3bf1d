"""Learned inputs: their derivatives against NumPy float64, their leaves, their training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, chain, quant
from jaxopt_models.testing import bits, leaf_bits

RNG = np.random.default_rng(7)
X, W, G = (RNG.normal(size=s) for s in ((16, 6), (6, 5), (16, 5)))


def f32(x):
    return np.asarray(x, np.float32)


def product(p, x):
    return x @ p["w"]


def pulled(encoder, changes, x=X, fn=product, g=G, w=W):
    """Value, and derivatives of ``sum(g * fn)`` by the input and by what is learned."""
    leaf = jom.prepare({"w": f32(w)}, [Rule("w", encoder)])["w"]
    leaf = dataclasses.replace(leaf, **{n: f32(v) for n, v in changes.items()})
    run = jom.simulate(fn)

    @jax.jit
    def all_of(x, learned):
        def loss(x, learned):
            y = run({"w": dataclasses.replace(leaf, **learned)}, x)
            return jnp.sum(y * f32(g)), y

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(x, learned)

    (_, y), grads = all_of(f32(x), {n: getattr(leaf, n) for n in changes})
    return y, *grads


CASES = {
    "signed": (quant.LearnedInput(bits=3, start=1.0), -4, 3, 0.0),
    "unsigned": (quant.LearnedInput(bits=2, start=1.0, signed=False), 0, 3, 0.0),
    "offset": (quant.LearnedInput(bits=2, start=1.0, offset=True), 0, 3, -0.8),
}


@pytest.mark.parametrize("name", CASES)
def test_learned_steps(name):
    encoder, low, high, offset = CASES[name]
    step = 0.4
    changes = {"scale": step} | ({"offset": offset} if offset else {})
    y, by_x, learned = pulled(encoder, changes)
    place = (X - offset) / step
    inside, code = (low < place) & (place < high), np.clip(np.round(place), low, high)
    np.testing.assert_allclose(y, (code * step + offset) @ W, rtol=1e-4, atol=1e-5)
    back = G @ W.T
    np.testing.assert_allclose(by_x, np.where(inside, back, 0), rtol=1e-4, atol=1e-5)
    share = 1 / np.sqrt(6 * high)  # six features of a sample
    want = share * np.sum(back * np.where(inside, code - place, code))
    np.testing.assert_allclose(learned["scale"], want, rtol=1e-4)
    if offset:
        np.testing.assert_allclose(learned["offset"], share * np.sum(back * ~inside), rtol=1e-4)
    assert 0 < inside.mean() < 1


def test_pact():
    y, by_x, learned = pulled(quant.PACT(bits=3, start=1.0), {"scale": 0.9})
    clipped = np.clip(X, 0, 0.9)
    np.testing.assert_allclose(y, np.round(clipped * 7 / 0.9) * 0.9 / 7 @ W, rtol=1e-4, atol=1e-5)
    back = G @ W.T
    np.testing.assert_allclose(by_x, np.where((X >= 0) & (X < 0.9), back, 0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(learned["scale"], np.sum(back[X >= 0.9]), rtol=1e-4)
    recipe = [Rule("a", quant.PACT(bits=4, start=3.0)), Rule("b", quant.DoReFaInput(bits=4))]
    trainable, _ = jom.partition(jom.prepare({"a": f32(W), "b": f32(W)}, recipe))
    slope = jax.grad(quant.clip_penalty)(trainable)
    assert float(quant.clip_penalty(trainable)) == 9 and float(slope["a"].scale) == 6


@pytest.mark.parametrize("width", [1, 4])
def test_dorefa(width):
    y, by_x, _ = pulled(quant.DoReFaInput(bits=width), {})
    top = 2**width - 1
    np.testing.assert_allclose(y, np.round(top * np.clip(X, 0, 1)) / top @ W, rtol=1e-4, atol=1e-5)
    inside = (X >= 0) & (X < 1)
    np.testing.assert_allclose(by_x, np.where(inside, G @ W.T, 0), rtol=1e-4, atol=1e-5)


def test_a_sample_of_a_convolution_is_all_of_its_features():
    images, kernel = RNG.normal(size=(2, 4, 4, 3)), RNG.normal(size=(1, 1, 3, 5))
    g = RNG.normal(size=(2, 4, 4, 5))

    def conv(p, x):
        return lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    encoder = quant.LearnedInput(bits=4, start=1.0)
    _, _, learned = pulled(encoder, {"scale": 0.15}, images, conv, g, kernel)
    place = images / 0.15
    code = np.clip(np.round(place), -8, 7)
    back = g @ kernel[0, 0].T
    slope = np.where((place > -8) & (place < 7), code - place, code)
    want = np.sum(back * slope) / np.sqrt(4 * 4 * 3 * 7)
    np.testing.assert_allclose(learned["scale"], want, rtol=1e-3)


def test_the_first_grid_comes_from_statistics():
    params, x = {"w": f32(W)}, np.abs(X)
    for encoder, want in (
        (quant.LearnedInput(bits=4, signed=False), 2 * x.mean() / np.sqrt(15)),
        (quant.LearnedInput(bits=4), 2 * x.mean() / np.sqrt(7)),
        (quant.PACT(bits=4, observer=quant.MinMax()), x.max()),
        (quant.LearnedInput(bits=4, offset=True, observer=quant.MinMax()), x.max() / 15),
    ):
        recipe = [Rule("w", encoder)]
        stats = jom.calibrate(product, params, [(f32(x),)], recipe)
        leaf = jom.prepare(params, recipe, stats=stats)["w"]
        np.testing.assert_allclose(leaf.scale, want, rtol=2e-3)
        with pytest.raises(ValueError, match=r"prepare: w: .* needs the statistics"):
            jom.prepare(params, recipe)
        # What was learned stays, with and without statistics.
        changed = {"w": dataclasses.replace(leaf, scale=leaf.scale * 2)}
        for again in (jom.compress(changed, recipe), jom.compress(changed, recipe, stats=stats)):
            assert bits(again["w"].scale) == bits(changed["w"].scale)


def branches(p, x):
    return lax.cond(x.sum() > 0, lambda x: x @ p["w"], lambda x: x @ p["c"], x)


UNHIT = {
    "static": (quant.Input(bits=8, per="static"), "per='row'"),
    "histogram": (quant.Input(bits=8, per="static", observer=quant.MSE()), "per='row'"),
    "chained": (chain(quant.Int(bits=8), quant.Input(bits=8, per="static")), "per='row'"),
    "pact": (quant.PACT(bits=4), "start="),
    "learned": (quant.LearnedInput(bits=4), "start="),
}


@pytest.mark.parametrize("name", UNHIT)
def test_a_layer_that_calibration_did_not_reach_is_named(name):
    encoder, fix = UNHIT[name]
    params, recipe = {"w": f32(W), "c": f32(W)}, [Rule("[wc]", encoder)]
    stats = jom.calibrate(branches, params, [(np.abs(f32(X)),)], recipe)
    for call in (jom.compress, jom.prepare):
        with pytest.raises(ValueError, match=f"{call.__name__}: c: calibration did not .* {fix}"):
            call(params, recipe, stats=stats)
    both = jom.calibrate(branches, params, [(s * np.abs(f32(X)),) for s in (1, 0, -1)], recipe)
    assert jom.compress(params, recipe, stats=both)["c"].scale > 0


def test_a_member_of_a_stack_that_calibration_did_not_reach_is_named():
    def experts(p, x):
        return lax.cond(x.sum() > 0, lambda x: x @ p["v"][0], lambda x: x @ p["v"][1], x)

    params, recipe = {"v": f32(np.stack([W, W]))}, [Rule("v", quant.PACT(bits=4), Axes(stack=1))]
    stats = jom.calibrate(experts, params, [(np.abs(f32(X)),)], recipe)
    with pytest.raises(ValueError, match=r"v: calibration did not reach 1 of its stack \(2,\)"):
        jom.compress(params, recipe, stats=stats)
    # Zeros that were seen are no reason to raise, and under jit nothing can be seen.
    zeros = jom.calibrate(experts, params, [(0 * f32(X) + s,) for s in (0, 1)], recipe)
    assert jom.compress(params, recipe, stats=zeros)["v"].scale.shape == (2,)
    compiled = jax.jit(lambda stats: jom.compress(params, recipe, stats=stats)["v"].scale)
    assert np.isfinite(compiled(stats)).all()


def test_layers_one_after_another_need_data_too():
    params, recipe = {"w": f32(W), "c": f32(W)}, [Rule("[wc]", quant.Input(8, per="static"))]
    with pytest.raises(ValueError, match="sequential: c: calibration did not reach it"):
        quant.sequential(branches, params, recipe, [(np.abs(f32(X)),)], correct=False)


def test_a_static_grid_stays_around_what_is_trained():
    both = chain(quant.LSQ(bits=4), quant.Input(bits=8, per="static"))
    recipe, params = [Rule("w", both)], {"w": f32(W)}
    stats = jom.calibrate(product, params, [(f32(X),)], recipe)
    latents = jom.prepare(params, recipe, stats=stats)
    small = jom.compress(latents, recipe)
    assert small["w"].kind() == "WithInput(Quantized)"
    assert bits(small["w"].scale) == bits(latents["w"].scale)


def test_stacked_layers_learn_steps_of_their_own(tmp_path):
    recipe = [Rule("v", chain(quant.LSQ(bits=4), quant.LearnedInput(bits=4)), Axes(stack=1))]

    def fn(p, x):
        return lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["v"])[0]

    params = {"v": f32(RNG.normal(size=(3, 6, 6)) * 0.5)}
    stats = jom.calibrate(fn, params, [(f32(X),)], recipe)
    latents = jom.prepare(params, recipe, stats=stats)
    assert latents["v"].scale.shape == (3,) and len(set(np.asarray(latents["v"].scale))) == 3
    trainable, rest = jom.partition(latents)

    @jax.jit
    def slope(t):
        return jax.grad(lambda t: jnp.sum(jom.simulate(fn)(jom.combine(t, rest), f32(X)) ** 2))(t)

    found = slope(trainable)["v"]
    assert found.scale.shape == (3,) and bool(jnp.all(found.scale != 0))
    small = jom.compress(latents, recipe)
    jom.save(tmp_path / "v.jom", small)
    back = jom.load(tmp_path / "v.jom")
    assert leaf_bits(back) == leaf_bits(small) and back["v"].kind() == small["v"].kind()
    with pytest.raises(ValueError, match=r"an input scale for each of \(3,\) stacked tensors"):
        jom.simulate(lambda p, x: jnp.einsum("bi,lij->lbj", x, p["v"]))(small, f32(X))


def test_gradients_of_few_bits_without_a_change_of_the_model():
    encoder = quant.DoReFaInput(bits=4, gradient_bits=3)
    recipe, params = [Rule("w", encoder)], {"w": f32(W)}
    latents = jom.prepare(params, recipe, key=jax.random.key(0))

    def back(latents):
        def loss(w):
            leaf = dataclasses.replace(latents["w"], values=w)
            return jnp.sum(jom.simulate(product)({"w": leaf}, f32(X)) * f32(G))

        return jax.grad(loss)(f32(W))

    by_w = jax.jit(back)(latents)
    x = np.round(15 * np.clip(X, 0, 1)) / 15
    key = latents["w"].key
    wide = quant.round_gradient  # the same noise, by hand
    g = jax.grad(lambda y: jnp.sum(wide(y, bits=3, key=key) * f32(G)))(jnp.zeros((16, 5)))
    np.testing.assert_allclose(by_w, x.T @ np.asarray(g, np.float64), rtol=1e-4, atol=1e-5)
    again = jax.jit(back)(quant.renew_keys(latents, jax.random.key(1)))
    assert bits(again) != bits(by_w)
    small = jom.compress(latents, recipe)
    assert small["w"].key is None
    with pytest.raises(ValueError, match="gradients of few bits need random numbers"):
        back(jom.prepare(params, recipe))


LAYERS = {
    "lsq": chain(quant.LSQ(bits=4), quant.LearnedInput(bits=4)),
    "lsq2": chain(quant.LSQ(bits=2), quant.LearnedInput(bits=2)),
    "plus": chain(quant.LSQ(bits=3, symmetric=False), quant.LearnedInput(bits=3, offset=True)),
    "pact": chain(quant.LSQ(bits=4), quant.PACT(bits=4)),
    "dorefa": chain(quant.DoReFa(bits=2), quant.DoReFaInput(bits=2)),
    "xnor": quant.XNOR(),
}


def test_the_loss_falls_and_what_was_trained_is_shipped(descend):
    rng = np.random.default_rng(1)
    x, out = f32(rng.normal(size=(64, 8))), f32(rng.normal(size=(8, 2)))
    target = jnp.sin(x @ out)
    params = {name: f32(rng.normal(size=(8, 8)) / 3) for name in LAYERS} | {"out": out / 4}

    def normal(h):
        return h / jnp.sqrt(jnp.mean(h**2, axis=1, keepdims=True) + 0.1)

    def fn(p, x):
        for name in LAYERS:
            x = x + normal(x @ p[name])
        return x @ p["out"]

    recipe = [Rule(name, encoder) for name, encoder in LAYERS.items()]
    stats = jom.calibrate(fn, params, [(x,)], ["histogram"])
    prepare = jax.jit(lambda p, stats: jom.prepare(p, recipe, stats=stats))
    trainable, rest = jom.partition(prepare(params, dict(stats)))
    run, tx = jom.simulate(fn), optax.chain(optax.adam(1e-2), quant.clip_latents())

    def loss(t, _):
        tree = jom.combine(t, rest)
        return jnp.mean((run(tree, x) - target) ** 2) + 1e-4 * quant.clip_penalty(tree)

    trained, values = descend(loss, tx, trainable, jnp.arange(300))
    values = np.asarray(values)
    assert values[-10:].mean() < 0.5 * values[:10].mean()
    latents = jom.combine(trained, rest)
    small = jax.jit(lambda p: jom.compress(p, recipe))(latents)
    shown, rebuilt = (jax.jit(jom.materialize)(t) for t in (latents, small))
    for name in LAYERS:
        assert bits(rebuilt[name]) == bits(shown[name])
    np.testing.assert_allclose(run(small, x), run(latents, x), rtol=1e-5, atol=1e-5)


def test_errors():
    with pytest.raises(ValueError, match="LearnedInput: bits=1 is not a width of 2 to 8"):
        quant.LearnedInput(bits=1)
    with pytest.raises(TypeError, match="LearnedInput: signed=1 is neither"):
        quant.LearnedInput(bits=4, signed=1)
    with pytest.raises(ValueError, match=r"PACT: start=0\.0 must be positive"):
        quant.PACT(bits=4, start=0)
    with pytest.raises(TypeError, match="PACT: observer='mse' is no observer"):
        quant.PACT(bits=4, observer="mse")
    with pytest.raises(ValueError, match="DoReFaInput: gradient_bits=9"):
        quant.DoReFaInput(bits=4, gradient_bits=9)
