"""Soft targets: limits, digits, tokens."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distill_oracles import softmax
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxopt_models import distill

RNG = np.random.default_rng(0)


@functools.cache
def compiled(divergence):
    def loss(s, t, temperature):
        return distill.kd(s, t, temperature=temperature, divergence=divergence)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))


def logits(*shape):
    return jnp.asarray(RNG.normal(size=shape) * 3, jnp.float32)


@pytest.mark.parametrize(("divergence", "share"), [("forward", 2), ("reverse", 2), ("js", 8)])
def test_limit_of_high_temperatures(divergence, share):
    s, t = logits(4, 10) / 3, logits(4, 10) / 3
    value, (grad, _) = compiled(divergence)(s, t, 1e3)
    d = np.asarray(s, np.float64) - np.asarray(t, np.float64)
    d -= d.mean(axis=1, keepdims=True)
    assert float(value) == pytest.approx(np.mean(d**2) / share, rel=1e-3)
    assert np.abs(grad - d * 2 / (40 * share)).max() < 3e-3 * np.abs(grad).max()
    centred = distill.logit_mse(s, t, centred=True)
    assert float(value) == pytest.approx(float(centred) / share, rel=1e-3)


@pytest.mark.parametrize(
    ("temperature", "apart", "offset"),
    [(1.0, 1.0, 7.0), (1.0, 1e-3, 0.0), (1e3, 1.0, 7.0), (1e3, 1e-3, 0.0), (1e6, 1.0, 7.0)],
)
def test_keeps_its_digits(temperature, apart, offset):
    t = logits(4, 10)
    s = t + apart * logits(4, 10) + offset
    value, grads = compiled("forward")(s, t, temperature)
    gs, gt = map(np.asarray, grads)
    s, t = (np.asarray(x, np.longdouble) / temperature for x in (s, t))
    p, q = (np.array([softmax(row) for row in x]) for x in (t, s))
    ratio = t - s - np.log(np.exp(t).sum(1) / np.exp(s).sum(1))[:, None]
    expected = temperature**2 * np.mean(np.sum(p * ratio, axis=1))
    assert float(value) == pytest.approx(float(expected), rel=2e-5)
    slope = temperature * (q - p) / 4
    assert np.abs(gs - slope).max() < 2e-5 * np.abs(slope).max()
    slope = temperature * p * (ratio - np.sum(p * ratio, axis=1)[:, None]) / 4
    assert np.abs(gt - slope).max() < 2e-5 * np.abs(slope).max()


rows = hnp.arrays(np.float32, (4, 10), elements=st.floats(-300, 300, width=32))


@settings(max_examples=30, deadline=None)
@given(rows, rows)
def test_is_a_distance_of_distributions(s, t):
    for divergence in ("forward", "reverse", "js"):
        value, (gs, gt) = compiled(divergence)(s, t, 2.0)
        assert float(value) >= 0
        assert np.all(np.isfinite(gs)) and np.all(np.isfinite(gt))
        # Nothing changes along equal logits.
        assert np.abs(np.sum(gs, axis=1)).max() < 1e-3
        back = compiled({"forward": "reverse", "reverse": "forward"}.get(divergence, "js"))(t, s, 2)
        assert float(back[0]) == pytest.approx(float(value), rel=1e-4, abs=1e-6)
    assert float(value) <= 4 * np.log(2) * (1 + 1e-6)


@pytest.mark.parametrize("divergence, share", [("forward", 1), ("reverse", 1), ("js", 0.25)])
def test_the_second_derivative_at_equal_logits_is_that_of_the_entropy(divergence, share):
    z = jnp.zeros((1, 3))
    loss = functools.partial(distill.kd, teacher=z, temperature=1.0, divergence=divergence)
    found = jax.jit(jax.hessian(loss))(z).reshape(3, 3)
    np.testing.assert_allclose(found, share * (np.eye(3) / 3 - 1 / 9), atol=1e-6)


def test_tokens_and_their_masks():
    s, t = logits(2, 3, 5), logits(2, 3, 5)
    where = np.array([[1, 1, 0], [1, 0, 0]])
    weights = np.array([2.0, 0.5])
    loss = jax.jit(lambda s, t: distill.kd(s, t, where=where, weights=weights))
    p, q = (np.apply_along_axis(softmax, -1, np.asarray(x, np.float64) / 4) for x in (t, s))
    each = 16 * np.sum(p * np.log(p / q), axis=-1)
    scale = where * weights[:, None]
    assert float(loss(s, t)) == pytest.approx(np.sum(scale * each) / scale.sum(), rel=1e-5)


def test_weights_of_what_is_masked_are_never_seen():
    s, t, where = logits(3, 5), logits(3, 5), jnp.array([True, False, True])
    # Not compiled: XLA makes a product with a mask a choice.
    weights = jnp.array([2.0, jnp.nan, 1.0])
    value, slope = jax.value_and_grad(lambda w: distill.logit_mse(s, t, where=where, weights=w))(
        weights
    )
    expected = distill.logit_mse(s, t, weights=jnp.array([2.0, 0, 1]))
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert slope[1] == 0 and np.all(np.isfinite(slope))
    assert np.isnan(distill.logit_mse(s, t, weights=weights))


def test_options_are_checked():
    x = jnp.ones((2, 3))
    for error, message, options in (
        (ValueError, "divergence='kl' is none of 'forward'", {"divergence": "kl"}),
        (ValueError, "kd: temperature=0.0 must be positive", {"temperature": 0}),
        (TypeError, "kd: temperature='4' is no number", {"temperature": "4"}),
        (ValueError, r"weights= has shape \(3,\)", {"weights": jnp.ones(3)}),
    ):
        with pytest.raises(error, match=message):
            distill.kd(x, x, **options)
    with pytest.raises(TypeError, match="centred=1 is neither True nor False"):
        distill.logit_mse(x, x, centred=1)
