"""Several teachers as one, stored teachers, and generations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distill_networks import CLASSES, batch, near, plain

from jaxopt_models import distill

RNG = np.random.default_rng(0)
LOGITS = [RNG.normal(size=(5, 4)).astype(np.float32) * 3 for _ in range(3)]


def softmax(z):
    e = np.exp(np.float64(z) - np.float64(z).max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("rows", [False, True])
def test_a_blend_is_the_weighted_mean_of_probabilities(rows):
    weights = RNG.uniform(size=(5, 3) if rows else 3)
    w = np.broadcast_to(weights / weights.sum(-1, keepdims=True), (5, 3))
    expected = sum(w[:, j, None] * softmax(z / 2) for j, z in enumerate(LOGITS))
    got = distill.blend(LOGITS, weights=jnp.float32(weights), temperature=2.0)
    np.testing.assert_allclose(softmax(np.asarray(got) / 2), expected, atol=1e-6)


def test_absent_teachers_do_not_count():
    present = np.array([[1, 1, 0], [0, 1, 0], [0, 0, 0], [1, 1, 1], [0, 0, 1]], bool)
    got = softmax(distill.blend(LOGITS, present=present, temperature=1.0))
    for i, row in enumerate(present):
        rows = [
            softmax(z[i]) for z, there in zip(LOGITS, row, strict=True) if there or not any(row)
        ]
        np.testing.assert_allclose(got[i], np.mean(rows, axis=0), atol=1e-6)

    def loss(weights):
        z = distill.blend([jnp.float32([[9e3, -9e3]]), jnp.float32([[-9e3, 9e3]])], weights=weights)
        return distill.kd(jnp.zeros((1, 2)), z)

    assert np.isfinite(jax.grad(loss)(jnp.array([1.0, 0.0]))).all()
    with pytest.raises(ValueError, match=r"present has shape \(5, 2\)"):
        distill.blend(LOGITS, present=present[:, :2])
    with pytest.raises(ValueError, match="weights have shape"):
        distill.blend(LOGITS, weights=jnp.ones(2))
    with pytest.raises(ValueError, match="no logits"):
        distill.blend([])


def test_confidence_falls_with_the_cross_entropy():
    labels = np.array([0, 3, 1, 2, 2])
    costs = np.stack([-np.log(softmax(z)[np.arange(5), labels]) for z in LOGITS], 1)
    expected = (1 - np.exp(costs) / np.exp(costs).sum(1, keepdims=True)) / 2
    got = distill.confidence(LOGITS, labels)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(got).sum(1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        distill.confidence(LOGITS[:1], labels)


@pytest.mark.parametrize("k", [1, 3, 4])
def test_top_k_keeps_probabilities_and_spreads_the_rest(k):
    got = softmax(distill.top_k(LOGITS[0], k).logits())
    p = softmax(LOGITS[0])
    largest = np.sort(p, axis=1)[:, ::-1]
    np.testing.assert_allclose(np.sort(got, 1)[:, ::-1][:, :k], largest[:, :k], atol=1e-5)
    if k < 4:
        rest = np.sort(got, 1)[:, : 4 - k]
        wanted = (1 - largest[:, :k].sum(1)) / (4 - k)
        np.testing.assert_allclose(rest, np.broadcast_to(wanted[:, None], rest.shape), atol=1e-5)
    sure = distill.top_k(jnp.float32([[1e4, 0, 0, 0]]), 1).logits()
    assert np.isfinite(sure).all() and softmax(sure)[0, 0] > 0.999
    with pytest.raises(ValueError, match="k=5 of 4"):
        distill.top_k(LOGITS[0], 5)


def test_a_stored_teacher_is_read_back(tmp_path):
    fn, params = plain((6, 16, 300))
    x = batch(size=40)[0]
    path = tmp_path / "teacher.jom"
    sizes = {}
    for top in (None, 8):
        sizes[top] = distill.store(
            path, fn, params, [x[:32], x[32:]], top=top, dtype=np.float32, progress=False
        )
        found = distill.load_stored(path)
        assert len(found) == 40
        rows = found[np.array([39, 0])]
        z = fn(params, x[[39, 0]])
        if top is None:
            np.testing.assert_allclose(rows, z, atol=1e-6)
        else:
            near(rows, distill.top_k(z, 8), atol=1e-5)
    assert sizes[8] < sizes[None] / 10
    with pytest.raises(ValueError, match="not finite in float16"):
        distill.store(path, lambda p, x: 1e6 * x, params, [x], progress=False)
    with pytest.raises(TypeError, match="one array of floats"):
        distill.store(path, lambda p, x: (x, x), params, [x], progress=False)
    with pytest.raises(ValueError, match="no batches"):
        distill.store(path, fn, params, [], progress=False)
    assert len(distill.load_stored(path)) == 40, "what was there before is lost"


def test_generations_teach_one_another():
    chain = [plain((6, width, CLASSES), seed=width) for width in (8, 5, 5)]
    x = batch()[0]
    loss = distill.classification(hard=0, soft=1, temperature=1.0)
    options = {"steps": 60, "progress": False}
    found = distill.succession(
        *chain[0], chain[1:], loss, lambda i: optax.adam(0.05), lambda step: x, **options
    )
    assert len(found) == 2
    outs = [softmax(fn(p, x)) for (fn, _), p in zip(chain, [chain[0][1], *found], strict=True)]
    apart = [np.abs(a - b).mean() for a, b in itertools.pairwise(outs)]
    start = np.abs(softmax(chain[1][0](chain[1][1], x)) - outs[0]).mean()
    assert max(apart) < 0.3 * start
    with pytest.raises(ValueError, match="no successors"):
        distill.succession(*chain[0], [], loss, optax.sgd(0.1), [x], **options)
