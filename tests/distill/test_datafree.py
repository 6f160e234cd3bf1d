import functools

import jax.numpy as jnp
import numpy as np
import pytest
from losses import accepts_half, batched, finite, kl, log_softmax, normal, softmax, traced

from jaxopt_models.distill import (
    activation,
    adversarial_js,
    batchnorm_statistics,
    disagreement,
    information_entropy,
    one_hot,
    total_variation,
)

RNG = np.random.default_rng(0)
WHERE = np.array([True, True, False, True])
WEIGHTS = np.float32([1, 2, 100, 0.5])
KEPT = WEIGHTS[WHERE] / WEIGHTS[WHERE].sum()


def js(student, teacher, temperature):
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    middle = np.log((p + q) / 2)
    return (kl(np.log(p), middle) + kl(np.log(q), middle)) / 2 / np.log(2)


def mean_of(loss):
    """The weighted mean of a loss of one example."""
    return lambda *arrays: sum(
        w * loss(*(np.float64(a[b]) for a in arrays))
        for w, b in zip(KEPT, np.flatnonzero(WHERE), strict=True)
    )


def entropy64(logits):
    p = sum(w * softmax(z) for w, z in zip(KEPT, logits[WHERE], strict=True))
    return sum(x * np.log(x) for x in p)


warm_js = functools.partial(adversarial_js, temperature=3.0)
ORACLES = {
    one_hot: mean_of(lambda z: -log_softmax(z).max()),
    information_entropy: entropy64,
    activation: mean_of(lambda f: -np.abs(f).mean()),
    disagreement: mean_of(lambda s, t: np.abs(s - t).mean()),
    warm_js: mean_of(lambda s, t: 1 - js(s, t, 3.0)),
}
COUNT = {one_hot: 1, information_entropy: 1, activation: 1, disagreement: 2, warm_js: 2}
LOSSES = pytest.mark.parametrize(
    "loss", ORACLES, ids=lambda loss: getattr(loss, "__name__", "adversarial_js")
)


@LOSSES
def test_against_float64(loss):
    arrays = [2 * normal(RNG, 4, 5) for _ in range(COUNT[loss])]
    expected = ORACLES[loss](*arrays)
    for x in arrays:
        x[~WHERE] = np.nan
    value, grads = finite(loss, *arrays, where=WHERE, weights=WEIGHTS)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad in grads:
        np.testing.assert_array_equal(grad[~WHERE], 0)
        assert np.abs(grad[WHERE]).max() > 1e-4


EXTREMES = {  # all equal and constant, all sure of one class, sure of different ones
    one_hot: (np.log(5), 0, 0),
    information_entropy: (-np.log(5), 0, -sum(w * -np.log(w) for w in KEPT)),
    activation: (-3, -1e4, -1e4),
    disagreement: (0, 0, 0),
    warm_js: (1, 1, 1),
}


@LOSSES
def test_extremes(loss):
    constant = np.full((4, 5), 3, np.float32)
    same = np.where(np.arange(5) == 2, 1e4, -1e4)[None].repeat(4, 0).astype(np.float32)
    other = np.where(np.eye(4, 5) > 0, 1e4, -1e4).astype(np.float32)
    for x, expected in zip((constant, same, other), EXTREMES[loss], strict=True):
        value, grads = finite(loss, *[x] * COUNT[loss], where=WHERE, weights=WEIGHTS)
        np.testing.assert_allclose(value, expected, rtol=1e-5, atol=1e-6)
        if loss in (disagreement, warm_js):
            np.testing.assert_array_equal(grads[0], 0)
    value, grads = finite(loss, *[other] * COUNT[loss], where=0 * WHERE, weights=WEIGHTS)
    assert value == 0
    np.testing.assert_array_equal(grads[0], 0)


def test_models_that_exclude_each_other():
    sure = np.where(np.eye(4, 5) > 0, 1e4, -1e4).astype(np.float32)
    apart = sure[:, ::-1].copy()
    value, _ = finite(warm_js, apart, sure, where=WHERE, weights=WEIGHTS)
    np.testing.assert_allclose(value, 0, atol=1e-6)
    value, _ = finite(disagreement, apart, sure, where=WHERE, weights=WEIGHTS)
    np.testing.assert_allclose(value, 2e4 * 2 / 5, rtol=1e-6)


def test_extra_axes_under_vmap_and_in_half():
    x = normal(RNG, 4, 3, 5)
    batched(lambda x: one_hot(x) + information_entropy(x) + adversarial_js(x, -x), x)
    for loss in ORACLES:
        accepts_half(loss, *[x] * COUNT[loss])
    accepts_half(lambda x: batchnorm_statistics(x, jnp.zeros(5), jnp.ones(5)), x)
    accepts_half(total_variation, x[..., None])


def statistics(first, second, means, variances, *, where, weights):
    features = {"a": first, "b": [second]}
    means, variances = ({"a": x[0], "b": [x[1]]} for x in (means, variances))
    return batchnorm_statistics(features, means, variances, where=where, weights=weights)


def statistics64(x, mu, variance):
    lengths = 0.0
    moments = []
    for c in range(x.shape[-1]):
        columns = [np.float64(x[b, ..., c]).ravel() for b in np.flatnonzero(WHERE)]
        center = sum(w * v.mean() for w, v in zip(KEPT, columns, strict=True))
        spread = sum(w * ((v - center) ** 2).mean() for w, v in zip(KEPT, columns, strict=True))
        moments.append((center, spread))
    for found, wanted in zip(zip(*moments, strict=True), (mu, variance), strict=True):
        lengths += np.sqrt(sum((f - w) ** 2 for f, w in zip(found, wanted, strict=True)))
    return lengths


def test_statistics_against_float64():
    first, second = normal(RNG, 4, 2, 3, 5), 2 * normal(RNG, 4, 5) + 1
    means, variances = normal(RNG, 2, 5), np.abs(normal(RNG, 2, 5))
    expected = sum(statistics64(x, means[i], variances[i]) for i, x in enumerate((first, second)))
    first[~WHERE] = np.nan
    value, grads = finite(
        lambda *a, **k: statistics(*a, jnp.asarray(means), jnp.asarray(variances), **k),
        first,
        second,
        where=WHERE,
        weights=WEIGHTS,
    )
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad in grads:
        np.testing.assert_array_equal(grad[~WHERE], 0)


def alone(x, mu, variance):
    return batchnorm_statistics(x, mu, variance)


def test_equal_statistics():
    x = np.float32([[1, 4], [3, 4]])
    value, grads = finite(alone, x, np.float32([2, 4]), np.float32([1, 0]))
    assert value == 0
    for grad in grads:
        np.testing.assert_array_equal(grad, 0)
    value, _ = finite(alone, x[[0, 0]], np.float32([1, 4]), np.float32([3, 4]))
    assert value == 5


def test_statistics_of_nothing_and_of_nan():
    x, mu = np.ones((4, 5), np.float32), np.full(5, 2, np.float32)
    kept = np.stack([mu, mu])
    value, grads = finite(statistics, x, x, kept, kept, where=0 * WHERE, weights=WEIGHTS)
    assert value == 0 and not any(map(np.any, grads))
    assert np.isnan(alone(x * np.nan, mu, mu))


def rough(images, *, where, weights):
    return total_variation(images, where=where, weights=weights)


def test_variation_against_float64():
    images = normal(RNG, 4, 3, 4, 2)

    def one(image):
        down = [abs(image[i + 1, j] - image[i, j]) for i in range(2) for j in range(4)]
        right = [abs(image[i, j + 1] - image[i, j]) for i in range(3) for j in range(3)]
        return np.mean(down) + np.mean(right)

    expected = mean_of(one)(images)
    images[~WHERE] = np.nan
    value, grads = finite(rough, images, where=WHERE, weights=WEIGHTS)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(grads[0][~WHERE], 0)
    value, grads = finite(rough, 0 * images + 3, where=0 * WHERE, weights=WEIGHTS)
    assert value == 0
    value, grads = finite(rough, np.full_like(images, 3), where=WHERE, weights=WEIGHTS)
    assert value == 0
    np.testing.assert_array_equal(grads[0], 0)
    assert float(total_variation(jnp.ones((2, 1, 1, 3)))) == 0


@traced
def test_what_does_not_fit_is_named():
    x = jnp.zeros((4, 5))
    with pytest.raises(ValueError, match=r"disagreement: student has shape \(4, 5\)"):
        disagreement(x, x[:2])
    with pytest.raises(ValueError, match=r"temperature=0.0 must be positive"):
        adversarial_js(x, x, temperature=0)
    with pytest.raises(ValueError, match=r"one_hot: logits has shape \(5,\); give at least 2"):
        one_hot(x[0])
    with pytest.raises(ValueError, match=r"where= has shape \(5,\)"):
        information_entropy(x, where=jnp.ones(5, bool))
    with pytest.raises(ValueError, match=r"weights= has shape \(5,\)"):
        activation(x, weights=jnp.ones(5))
    with pytest.raises(ValueError, match=r"variances have the structure .*'b'"):
        batchnorm_statistics({"a": x}, {"a": x[0]}, {"b": x[0]})
    with pytest.raises(ValueError, match=r"means \(4,\), variances \(5,\).*, \(5,\)"):
        batchnorm_statistics(x, x[:, 0], x[0])
    with pytest.raises(ValueError, match=r"\(1, 1, 1, 4, 5\); give \[B, H, W, C\]"):
        total_variation(x[None, None, None])
