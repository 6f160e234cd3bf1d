"""Labels, the label's class apart, correlations, teachers and offsets made of labels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from distill_oracles import softmax

from jaxopt_models import distill

RNG = np.random.default_rng(0)


def logits(*shape):
    return jnp.asarray(RNG.normal(size=shape) * 2, jnp.float32)


def test_distillation_is_two_decoupled_terms():
    s, t, labels = logits(1, 7), logits(1, 7), jnp.array([4])
    parts = jax.jit(
        lambda s, t, a, b: distill.decoupled(s, t, labels, alpha=a, beta=b, temperature=3.0)
    )
    sure = float(softmax(np.asarray(t[0], np.float64) / 3)[4])
    whole = float(jax.jit(lambda s, t: distill.kd(s, t, temperature=3.0))(s, t))
    assert float(parts(s, t, 1.0, 1 - sure)) == pytest.approx(whole, rel=1e-5)
    assert float(parts(s, t, 1.0, 0.0)) > 0 and float(parts(s, t, 0.0, 1.0)) > 0


def test_a_sure_teacher_still_teaches_the_other_classes():
    t = jnp.array([[90.0, 2.0, 0.0, -2.0]])
    loss = jax.jit(
        jax.value_and_grad(
            lambda s: distill.decoupled(s, t, jnp.array([0]), alpha=0.0, temperature=1.0)
        )
    )
    value, grad = loss(t)
    assert float(value) == 0 and not np.any(grad)
    value, grad = loss(t[:, jnp.array([0, 3, 2, 1])])
    p = softmax(np.array([2.0, 0, -2]))
    expected = 8 * np.sum(p * np.log(p / p[::-1]))
    assert float(value) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(grad[0], [0, *(8 * (p[::-1] - p))], atol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        distill.cross_entropy,
        lambda x, y, **k: distill.decoupled(x, x, y, **k),
        lambda x, y, **k: distill.kd(x, distill.virtual_teacher(y, 4), **k),
    ],
    ids=["cross_entropy", "decoupled", "virtual_teacher"],
)
def test_labels_outside_are_heard(loss):
    x, labels = logits(3, 4), jnp.array([0, -1, 4])
    run = jax.jit(jax.value_and_grad(lambda x, where: loss(x, labels, where=where)))
    for where in ([True, True, False], [True, False, True]):
        assert np.isnan(run(x, jnp.array(where))[0])
    value, grad = run(x, labels == 0)
    assert np.isfinite(value) and np.all(np.isfinite(grad)) and not np.any(grad[1:])


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_classes_are_one_hot_distributions(smoothing):
    z, labels = logits(2, 3, 4), jnp.array([[0, 1, 2], [3, 3, 0]])

    @jax.jit
    def loss(z, labels):
        return distill.cross_entropy(z, labels, smoothing=smoothing)

    y = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    p = np.apply_along_axis(softmax, -1, np.asarray(z, np.float64))
    expected = -np.mean(np.sum(y * np.log(p), axis=-1))
    assert float(loss(z, labels)) == pytest.approx(expected, rel=1e-5)
    assert float(loss(z, jax.nn.one_hot(labels, 4))) == pytest.approx(expected, rel=1e-5)


def test_virtual_teachers_are_right_as_often_as_told():
    teacher = distill.virtual_teacher(jnp.array([[2, 0]]), 5, confidence=0.9)
    expected = np.full((1, 2, 5), 0.025)
    expected[0, 0, 2] = expected[0, 1, 0] = 0.9
    np.testing.assert_allclose(jax.nn.softmax(teacher), expected, rtol=1e-6)


@jax.jit
def correlate(s, t, beta, gamma):
    return distill.dist(s, t, beta=beta, gamma=gamma)


def test_correlation_sees_no_scale_of_probabilities():
    # Two classes: a row of probabilities is one number, a column is its complement.
    s = jnp.log(jnp.array([[0.4, 0.6], [0.5, 0.5], [0.6, 0.4]]))
    t = jnp.log(jnp.array([[0.3, 0.7], [0.5, 0.5], [0.7, 0.3]]))
    assert float(correlate(s, t, 0.0, 1.0)) == pytest.approx(0, abs=1e-6)
    assert float(correlate(s, -t, 0.0, 1.0)) == pytest.approx(2, abs=1e-6)
    # The middle row has no correlation, on either side.
    assert float(correlate(s, -t, 1.0, 0.0)) == pytest.approx(4 / 3, abs=1e-6)


def means(z, b):
    return np.mean(np.apply_along_axis(softmax, -1, np.asarray(z + b[None], np.float64)), axis=0)


balance = jax.jit(distill.bias_correction)


@pytest.mark.parametrize("scale", [1, 20, 100])
@pytest.mark.parametrize(
    "prior", [(0.2,) * 5, (0.5, 0.3, 0.1, 0.099, 0.001), (0, 0.25, 0.25, 0.25, 0.25)]
)
def test_offsets_give_the_prior(scale, prior):
    z = logits(200, 5) * scale + jnp.array([[-3.0 * scale, 0, 0, scale, 0]])
    b = balance(z, jnp.array(prior))
    assert np.abs(means(z, b) - prior).max() < 1e-5
    assert abs(float(jnp.mean(b))) < 1e-5 * scale


def test_a_missing_class_is_found_again():
    labels = RNG.integers(4, size=400)
    z = logits(400, 4) + 4 * jax.nn.one_hot(labels, 4) - jnp.array([[0.0, 0, 0, 9]])

    def recall(z):
        return np.mean(np.argmax(z, axis=1)[labels == 3] == 3)

    b = balance(z, jnp.full(4, 0.25))
    assert recall(z) < 0.1 and recall(z + b[None]) > 0.75


def test_offsets_of_what_counts():
    z, prior = logits(6, 3), jnp.array([0.2, 0.3, 0.5])
    where = np.array([1, 1, 0, 1, 1, 0], bool)
    b = balance(jnp.where(where[:, None], z, jnp.nan), prior, where=where)
    assert np.abs(means(z[where], b) - prior).max() < 1e-5
    tokens = balance(z.reshape(2, 3, 3), prior, where=where.reshape(2, 3))
    np.testing.assert_allclose(tokens, b, atol=1e-6)
    assert not np.any(jax.grad(lambda z: balance(z, prior)[0])(z))


def test_offsets_that_are_not_found_are_heard():
    z, prior = logits(8, 3), jnp.array([0.8, 0.1, 0.1])
    with pytest.raises(ValueError, match=r"after 1 steps a mean is .* off its prior; raise steps="):
        distill.bias_correction(z, prior, steps=1)
    assert np.all(np.isnan(jax.jit(lambda z: distill.bias_correction(z, prior, steps=1))(z)))
    assert np.all(np.isnan(balance(z, prior, where=jnp.zeros(8, bool))))
    with pytest.raises(ValueError, match=r"prior sums to 1.5, .* 0.5; give probabilities"):
        distill.bias_correction(z, jnp.full(3, 0.5))
    with pytest.raises(ValueError, match=r"least entry is -1; give probabilities"):
        distill.bias_correction(z, jnp.array([1.0, 1.0, -1.0]))
    with pytest.raises(ValueError, match=r"give one probability a class, \(3,\)"):
        distill.bias_correction(z, jnp.full(2, 0.5))


def test_labels_are_checked():
    z = jnp.ones((2, 3))
    for labels in (jnp.ones((2, 3), int), jnp.ones(2), jnp.ones((2, 4))):
        with pytest.raises(ValueError, match=r"give whole numbers \(2,\), or floats \(2, 3\)"):
            distill.cross_entropy(z, labels)
    with pytest.raises(TypeError, match="labels is bool; give whole numbers"):
        distill.cross_entropy(z, z > 0)
    with pytest.raises(ValueError, match=r"smoothing=1\.0 is not in"):
        distill.cross_entropy(z, jnp.ones(2, int), smoothing=1)
    with pytest.raises(TypeError, match="decoupled: labels is float32; give whole numbers"):
        distill.decoupled(z, z, jnp.ones(2))
    with pytest.raises(ValueError, match=r"labels has shape \(3,\); give \(2,\)"):
        distill.decoupled(z, z, jnp.ones(3, int))
    with pytest.raises(ValueError, match=r"shape \(2, 1\); give two classes or more"):
        distill.decoupled(z[:, :1], z[:, :1], jnp.zeros(2, int))
    with pytest.raises(ValueError, match="classes=1 must be at least 2"):
        distill.virtual_teacher(jnp.zeros(2, int), 1)
    with pytest.raises(ValueError, match=r"confidence=0\.0 must be positive"):
        distill.virtual_teacher(jnp.zeros(2, int), 3, confidence=0)
