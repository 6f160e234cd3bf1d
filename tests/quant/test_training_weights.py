"""Derivatives of learned and squashed weights against NumPy float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import Axes, Rule, quant
from jaxopt_models.testing import bits

RNG = np.random.default_rng(11)
W, G = RNG.normal(size=(12, 5)) * 0.4, RNG.normal(size=(12, 5))


def f32(x):
    return np.asarray(x, np.float32)


def latent_of(encoder, w, axes=None):
    w = w if isinstance(w, jom.Encoded) else f32(w)
    return jom.prepare({"w": w}, [Rule("w", encoder, axes)])["w"]


def pulled(latent, g):
    """Derivatives of ``sum(g * shown)`` by the tensor and by what is learned."""

    def loss(w, learned):
        shown = dataclasses.replace(latent, w=w, learned=learned).materialize()
        return jnp.sum(shown * jnp.asarray(g, jnp.float32))

    return jax.jit(jax.grad(loss, (0, 1)))(latent.w, latent.learned)


def lsq(w, step, low, high, offset=0.0):
    """The definition: value, and derivatives by w, step and offset; float64, entry by entry."""
    place = (w - offset) / step
    inside = (low < place) & (place < high)
    code = np.clip(np.round(place), low, high)
    return code * step + offset, inside, np.where(inside, code - place, code), ~inside


@pytest.mark.parametrize(
    ("width", "group", "per"), [(4, None, "channel"), (2, 4, "channel"), (3, None, "tensor")]
)
def test_lsq(width, group, per):
    encoder = quant.LSQ(bits=width, group=group, per=per)
    top = 2 ** (width - 1) - 1
    w = W.reshape(60, 1) if per == "tensor" else W
    g = G.reshape(w.shape)
    groups = len(w) // (group or len(w))
    runs = w.reshape(groups, -1, w.shape[1])
    first = 2 * np.abs(runs).mean(1) / np.sqrt(top)  # [groups, columns]
    latent = latent_of(encoder, W if per == "tensor" else w)
    np.testing.assert_allclose(latent.learned["step"].T.reshape(first.shape), first, rtol=2e-5)
    steps = 0.4 * first  # away from the start, so that some are clipped
    learned = {"step": jnp.asarray(steps.T.reshape(latent.learned["step"].shape), jnp.float32)}
    latent = dataclasses.replace(latent, learned=learned)
    value, dw, ds, _ = lsq(runs, steps[:, None], -top - 1, top)
    shown = np.asarray(latent.materialize()).reshape(runs.shape)
    np.testing.assert_allclose(shown, value, rtol=1e-6, atol=1e-7)
    by_w, by_learned = pulled(latent, G)
    g = g.reshape(runs.shape)
    np.testing.assert_allclose(np.asarray(by_w).reshape(runs.shape), g * dw, rtol=1e-6)
    want = (g * ds).sum(1) / np.sqrt(runs.shape[1] * top)
    got = np.asarray(by_learned["step"]).T.reshape(want.shape)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    assert 0 < dw.mean() < 1


def test_lsq_with_an_offset():
    encoder, top = quant.LSQ(bits=2, symmetric=False), 3
    latent = latent_of(encoder, W + 0.1)
    step, offset = (
        np.float64([0.3, 0.25, 0.2, 0.35, 0.4]),
        np.float64([-0.45, -0.25, 0, -0.7, -0.6]),
    )
    # Zero points are kept in float16; these are exact.
    latent = dataclasses.replace(
        latent,
        learned={
            "step": jnp.asarray(step[:, None], jnp.float32),
            "offset": jnp.asarray(offset[:, None], jnp.float32),
        },
    )
    value, dw, ds, db = lsq(np.float64(np.float32(W + 0.1)), step, 0, top, offset)
    np.testing.assert_allclose(latent.materialize(), value, rtol=2e-3, atol=2e-4)
    by_w, by_learned = pulled(latent, G)
    np.testing.assert_allclose(by_w, G * dw, rtol=1e-6)
    share = 1 / np.sqrt(12 * top)
    want = {"step": share * (G * ds).sum(0), "offset": share * (G * db).sum(0)}
    for name, x in want.items():
        np.testing.assert_allclose(by_learned[name][:, 0], x, rtol=5e-3, atol=5e-3)
    assert 0 < db.mean() < 1
    small = jom.compress({"w": latent}, [Rule("w", encoder)])["w"]
    assert small.zero_point.dtype == jnp.float16
    assert bits(small.materialize()) == bits(latent.materialize())


def test_a_step_counts_by_its_magnitude_and_forward_mode_agrees():
    latent = latent_of(quant.LSQ(bits=3), W)
    turned = dataclasses.replace(latent, learned={"step": -latent.learned["step"]})
    assert bits(turned.materialize()) == bits(latent.materialize())
    one, two = pulled(latent, G)[1]["step"], pulled(turned, G)[1]["step"]
    np.testing.assert_array_equal(one, -two)

    def shown(w, step):
        return dataclasses.replace(latent, w=w, learned={"step": step}).materialize()

    at = (latent.w, latent.learned["step"])
    along = tuple(jnp.asarray(RNG.normal(size=a.shape), jnp.float32) for a in at)
    _, pushed = jax.jvp(shown, at, along)
    back = pulled(latent, G)
    want = jnp.sum(back[0] * along[0]) + jnp.sum(back[1]["step"] * along[1])
    np.testing.assert_allclose(jnp.sum(pushed * G), want, rtol=1e-4)


STEPS = RNG.uniform(0.001, 0.01, size=(1, 64))
HALVES = np.append(np.arange(-127, 127) + 0.5, [127, -127])[:, None]
TIES = {
    quant.LSQ(bits=8): HALVES * STEPS,
    quant.Int(bits=8): HALVES * STEPS,
    quant.DoReFa(bits=8): np.arctanh(0.9 * np.append((np.arange(255) - 127) / 127.5, [1, -1])),
}


@pytest.mark.parametrize("encoder", TIES, ids=repr)
def test_values_between_two_codes_round_alike_in_every_program(encoder):
    # XLA divides in one program and multiplies by the reciprocal in another, if it may.
    latent = latent_of(encoder, TIES[encoder])
    if latent.learned:
        latent = dataclasses.replace(latent, learned={"step": f32(STEPS.T)})

    @jax.jit
    def step_of_training(w):
        def loss(w):
            shown = dataclasses.replace(latent, w=w).materialize()
            return jnp.sum(jnp.tanh(shown.T @ shown)), shown

        return jax.value_and_grad(loss, has_aux=True)(w)

    (_, shown), _ = step_of_training(latent.w)
    assert bits(shown) == bits(latent.ship().materialize())


def test_dropped_entries_have_no_say_in_the_grid():
    keep = jnp.asarray(RNG.random((12, 5)) < 0.5)
    pruned = jom.prune.Magnitude(sparsity=0.0)(jnp.asarray(W, jnp.float32), keep=keep)
    latent = latent_of(quant.LSQ(bits=4, symmetric=False), pruned)
    by_w, by_learned = pulled(latent, G)
    other = pulled(latent, np.where(keep, G, 100.0))
    assert bits(by_w) == bits(other[0])
    for name in by_learned:
        assert bits(by_learned[name]) == bits(other[1][name])


@pytest.mark.parametrize("width", [2, 4])
def test_dorefa(width):
    latent, top = latent_of(quant.DoReFa(bits=width), W), 2**width - 1
    t = np.tanh(W)
    most = np.abs(t).max()
    value = 2 / top * np.round(top * (t / (2 * most) + 0.5)) - 1
    np.testing.assert_allclose(latent.materialize(), value, atol=1e-6)
    # dW = 2 dt, and the maximum moves with the entry that attains it.
    slope = (1 - t**2) / most
    want = G * slope
    i = np.unravel_index(np.abs(t).argmax(), t.shape)
    want[i] -= np.sign(t[i]) * (1 - t[i] ** 2) * np.sum(G * t) / most**2
    by_w, _ = pulled(latent, G)
    np.testing.assert_allclose(by_w, want, rtol=1e-4, atol=1e-5)


def test_one_bit_of_dorefa_has_one_scale_for_the_layer():
    stack = np.stack([W, 2 * W])
    latent = latent_of(quant.DoReFa(bits=1), stack, Axes(stack=1))
    want = np.where(stack >= 0, 1, -1) * np.abs(stack).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(latent.materialize(), want, rtol=2e-5)
    assert bits(pulled(latent, np.stack([G, G]))[0]) == bits(np.float32(np.stack([G, G])))


def test_gradients_of_few_bits_are_those_of_the_paper_and_right_in_the_mean():
    x, g = jnp.asarray(W, jnp.float32), np.float32(G)

    @jax.jit
    def back(key):
        def loss(x):
            return jnp.sum(quant.round_gradient(x, bits=3, key=key) * g)

        return jax.grad(loss)(x)

    most = 2 * np.abs(G).max(1, keepdims=True)
    got = np.asarray(back(jax.random.key(0)), np.float64)
    place = 7 * (got / most + 0.5)
    np.testing.assert_allclose(place, np.round(place), atol=1e-5)
    assert (np.abs(got - g) <= most / 7 * (1 + 1e-5)).all()  # half a step, and half one of noise
    keys = jax.random.split(jax.random.key(1), 1000)
    mean = np.asarray(jax.vmap(back)(keys), np.float64).mean(0)
    inside = np.abs(g) < 0.9 * most / 2
    np.testing.assert_allclose(mean[inside], g[inside], atol=0.06)
    value = quant.round_gradient(x, bits=1, key=jax.random.key(0))
    assert bits(value) == bits(x)
    zero = jax.grad(lambda x: jnp.sum(0 * quant.round_gradient(x, bits=2, key=keys[0])))(x)
    assert bool(jnp.all(jnp.isfinite(zero)))


def test_errors():
    with pytest.raises(ValueError, match="LSQ: bits=9 is not a width of 2 to 8"):
        quant.LSQ(bits=9)
    with pytest.raises(ValueError, match="DoReFa: bits=0 is not a width of 1 to 8"):
        quant.DoReFa(bits=0)
    with pytest.raises(ValueError, match="round_gradient: bits=9"):
        quant.round_gradient(jnp.ones(3), bits=9, key=jax.random.key(0))
