import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from losses import accepts_half, batched, finite, normal, traced

from jaxopt_models.distill import (
    fool_loss,
    gradient_penalty,
    judge,
    judge_accuracy,
    judge_loss,
    judged,
)

RNG = np.random.default_rng(0)
KINDS = ["logistic", "hinge", "squares"]
WHERE = np.array([True, True, False, True, False])
WEIGHTS = np.float32([1, 2, 100, 0.5, 100])


def of_teacher(score, kind):
    if kind == "logistic":
        return np.log1p(np.exp(-score))
    return max(0, 1 - score) if kind == "hinge" else (score - 1) ** 2 / 2


def of_student(score, kind):
    if kind == "logistic":
        return np.log1p(np.exp(score))
    return max(0, 1 + score) if kind == "hinge" else score**2 / 2


def fooling(score, kind):
    return -score if kind == "hinge" else of_teacher(score, kind)


def averaged(loss, scores, kind):
    kept = [(w, loss(float(x), kind)) for w, x, m in zip(WEIGHTS, scores, WHERE, strict=True) if m]
    return sum(w * x for w, x in kept) / sum(w for w, _ in kept)


LOSSES = {}
for _kind in KINDS:

    def _both(real, fake, kind=_kind):
        loss = judge_loss(real, fake, kind=kind, where=WHERE, weights=WEIGHTS)
        return loss, fool_loss(fake, kind=kind, where=WHERE, weights=WEIGHTS)

    LOSSES[_kind] = jax.jit(jax.jacrev(_both, (0, 1))), jax.jit(_both)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_against_float64(kind):
    real, fake = 2 * normal(RNG, 2, 5)
    expected = (
        averaged(of_teacher, real, kind) + averaged(of_student, fake, kind),
        averaged(fooling, fake, kind),
    )
    real[~WHERE] = fake[~WHERE] = np.nan
    slopes, losses = LOSSES[kind]
    np.testing.assert_allclose(losses(real, fake), expected, rtol=1e-5)
    for slope in jax.tree.leaves(slopes(real, fake)):
        assert np.isfinite(slope).all()
        np.testing.assert_array_equal(slope[~WHERE], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_have_a_sense_and_are_finite(kind):
    """The judge raises the teacher's scores and lowers the student's, who raises its own."""
    slopes, losses = LOSSES[kind]
    (real, fake), (_, own) = slopes(jnp.full(5, 0.3), jnp.full(5, 0.3))
    assert (real[WHERE] < 0).all() and (fake[WHERE] > 0).all() and (own[WHERE] < 0).all()
    for a, b in ((1e4, -1e4), (-1e4, 1e4), (0, 0)):
        real, fake = jnp.full(5, a, jnp.float32), jnp.full(5, b, jnp.float32)
        assert all(np.isfinite(x) for x in losses(real, fake))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes(real, fake)))


def test_batches_of_other_sizes_and_half():
    real, fake = jnp.array([1.0, 3.0, 5.0]), jnp.array([-1.0])
    assert float(judge_loss(real, fake, kind="hinge")) == 0
    accepts_half(judge_loss, real, fake)
    accepts_half(fool_loss, fake, kind="hinge")
    accepts_half(judge_accuracy, real, fake)


def test_accuracy():
    real, fake = jnp.array([1.0, -1.0, 0.4, 2.0]), jnp.array([-1.0, 0.3, -2.0, 0.2])
    assert float(judge_accuracy(real, fake)) == (3 / 4 + 2 / 4) / 2
    assert float(judge_accuracy(real, fake, kind="squares")) == (2 / 4 + 4 / 4) / 2
    where = jnp.array([True, False, True, False])
    assert float(judge_accuracy(real, fake, where=where)) == 1
    assert float(judge_accuracy(0 * real, 0 * fake)) == 0.5


def test_penalty_of_a_quadratic():
    x = normal(RNG, 5, 2, 3)
    w = normal(RNG, 2, 3)

    def penalty(w, x):
        def score(x):
            return jnp.sum(w[None] * x**2, axis=(1, 2))

        return gradient_penalty(score, x, where=WHERE, weights=WEIGHTS)

    norms = [((2 * np.float64(w) * x[b]) ** 2).sum() / 2 for b in range(5)]
    expected = np.average(np.array(norms)[WHERE], weights=WEIGHTS[WHERE])
    x[~WHERE] = np.nan
    value, grads = finite(penalty, w, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert np.abs(grads[0]).min() > 0
    np.testing.assert_array_equal(grads[1][~WHERE], 0)
    value, _ = finite(penalty, w, 0 * normal(RNG, 5, 2, 3))
    assert value == 0


def forward64(params, x, condition):
    """The judge, unit by unit."""
    out = []
    for b in range(len(x)):
        h = np.float64(x[b]).ravel()
        if condition is not None and "classes" not in params:
            h = np.concatenate([h, condition[b].ravel()])
        for name in ("layer_0", "layer_1"):
            h = h @ np.float64(params[name]["kernel"]) + params[name]["bias"]
            h = np.where(h > 0, h, 0.2 * h)
        score = (h @ np.float64(params["score"]["kernel"]) + params["score"]["bias"])[0]
        if "classes" in params:
            score += np.float64(params["classes"])[condition[b]] @ h
        out.append(score)
    return out


def noisy(params, seed=1):
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    return treedef.unflatten([x + 0.1 * normal(rng, *x.shape) for x in leaves])


CONDITIONS = {
    "none": ({}, None),
    "classes": ({"classes": 4}, np.array([0, 3, 1, 1, 2])),
    "features": ({"conditions": 6}, normal(np.random.default_rng(3), 5, 2, 3)),
}


@pytest.mark.parametrize("condition", CONDITIONS)
def test_judge_against_float64(key, condition):
    options, condition = CONDITIONS[condition]
    params = noisy(judge(key, 4, hidden=(7, 3), **options))
    x = normal(RNG, 5, 2, 2)
    np.testing.assert_allclose(
        jax.jit(judged)(params, x, condition), forward64(params, x, condition), rtol=1e-4, atol=1e-5
    )


def test_judge_in_half_and_under_vmap(key):
    params = judge(key, 4, hidden=(7, 3), classes=4)
    labels = CONDITIONS["classes"][1]
    half = jax.eval_shape(judged, params, jnp.zeros((5, 4), jnp.bfloat16), labels)
    assert half.dtype == jnp.float32 and half.shape == (5,)
    batched(lambda x: judged(params, x, labels).sum(), normal(RNG, 5, 4))
    unknown = np.array([0, 4, -1, 1, 2])
    np.testing.assert_array_equal(
        np.isnan(jax.jit(judged)(params, np.ones((5, 4), np.float32), unknown)), [0, 1, 1, 0, 0]
    )


def test_a_judge_of_classes_learns(key, descend):
    """It tells apart what differs for one class alone."""
    labels = jnp.arange(64) % 2
    noise = jax.random.normal(jax.random.key(1), (40, 2, 64, 2))

    def batch(noise):
        shift = jnp.where(labels == 1, 3.0, -3.0)[:, None]
        return noise[0] + shift, noise[1] - shift

    def loss(params, noise):
        real, fake = batch(noise)
        penalty = gradient_penalty(lambda x: judged(params, x, labels), real)
        return judge_loss(judged(params, real, labels), judged(params, fake, labels)) + penalty

    params, values = descend(loss, optax.adam(2e-2), judge(key, 2, hidden=(16,), classes=2), noise)
    real, fake = batch(noise[0])
    assert values[-1] < values[0] / 2
    assert judge_accuracy(judged(params, real, labels), judged(params, fake, labels)) > 0.95
    # Without the label nothing is left to tell by: the scores of the wrong class are the reverse.
    assert judge_accuracy(judged(params, real, 1 - labels), judged(params, fake, 1 - labels)) < 0.05


@traced
def test_judges_name_what_is_wrong(key):
    with pytest.raises(ValueError, match=r"kind='wasserstein' is none of"):
        judge_loss(jnp.zeros(2), jnp.zeros(2), kind="wasserstein")
    with pytest.raises(ValueError, match=r"kind='' is none of"):
        fool_loss(jnp.zeros(2), kind="")
    with pytest.raises(ValueError, match=r"where= has shape \(3,\)"):
        judge_loss(jnp.zeros(2), jnp.zeros(2), where=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"score gave \(2, 1\); give \(2,\)"):
        gradient_penalty(lambda x: x, jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match="not both"):
        judge(key, 4, classes=3, conditions=2)
    with pytest.raises(ValueError, match="hidden= is empty"):
        judge(key, 4, hidden=())
    with pytest.raises(TypeError, match=r"hidden=2.5 is no whole number"):
        judge(key, 4, hidden=(2.5,))
    by_class = judge(key, 4, hidden=(3,), classes=3)
    with pytest.raises(ValueError, match=r"the judge has classes; give labels, shape \(2,\)"):
        judged(by_class, jnp.zeros((2, 4)))
    with pytest.raises(TypeError, match="condition is float32"):
        judged(by_class, jnp.zeros((2, 4)), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"has 5 values, its condition included.*made for 4"):
        judged(judge(key, 4, hidden=(3,)), jnp.zeros((2, 4)), jnp.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"condition has 3 examples, x has 2"):
        judged(judge(key, 4, hidden=(3,)), jnp.zeros((2, 4)), jnp.zeros((3, 1)))
