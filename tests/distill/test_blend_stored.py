"""Several teachers as one, stored teachers, and generations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from distill_networks import CLASSES, batch, near, plain, same

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
    with pytest.raises(ValueError, match=r"present= has shape \(5, 2\); give \(5, 3\)"):
        distill.blend(LOGITS, present=present[:, :2])
    with pytest.raises(ValueError, match="weights have shape"):
        distill.blend(LOGITS, weights=jnp.ones(2))
    with pytest.raises(ValueError, match="no logits"):
        distill.blend([])


def test_nothing_of_an_absent_teacher_matters():
    present = jnp.array([[True, True], [True, False]])

    @jax.jit
    def run(z, w):
        def loss(z, w):
            return jnp.sum(distill.blend(list(z), weights=w, present=present, temperature=2.0) ** 2)

        return jax.value_and_grad(loss, (0, 1))(z, w)

    z, w = np.stack(LOGITS)[:2, :2], np.float32([[0.3, 0.7], [0.5, 0.5]])
    value, (gz, gw) = run(z, w)
    bad = z.copy(), w.copy()
    bad[0][1, 1], bad[1][1, 1] = np.nan, np.nan
    again, (bz, bw) = run(*bad)
    assert again == value
    for g, b in ((gz, bz), (gw, bw)):
        np.testing.assert_array_equal(g, b)
    assert not gz[1, 1].any() and gw[1, 1] == 0
    assert np.isnan(run(z, np.float32([[0.3, np.nan], [0.5, 0.5]]))[0])


def test_weights_of_a_blend_are_checked():
    with pytest.raises(ValueError, match="blend: weights= has entries down to -1"):
        distill.blend(LOGITS, weights=jnp.array([1.0, -1.0, 1.0]))
    for temperature in (0, jnp.float32(-1)):
        with pytest.raises(ValueError, match=r"blend: temperature=.* must be positive"):
            distill.blend(LOGITS, temperature=temperature)
    with pytest.raises(TypeError, match="blend: present= is float32"):
        distill.blend(LOGITS, present=jnp.ones((5, 3)))
    present = np.repeat([[True, False, True]], 5, axis=0)
    got = distill.blend(LOGITS, weights=jnp.array([0.0, 1.0, 0.0]), present=present)
    near(got, distill.blend(LOGITS, present=present), atol=1e-6)
    impossible = [jnp.array([[0.0, 0.0, -jnp.inf]]), jnp.zeros((1, 3))]
    got = softmax(distill.blend(impossible, temperature=1.0))
    np.testing.assert_allclose(got, [[5 / 12, 5 / 12, 1 / 6]], atol=1e-6)
    impossible[1] = impossible[0]
    assert np.isfinite(distill.blend(impossible)).all()


def test_confidence_falls_with_the_cross_entropy():
    labels = np.array([0, 3, 1, 2, 2])
    costs = np.stack([-np.log(softmax(z)[np.arange(5), labels]) for z in LOGITS], 1)
    expected = (1 - np.exp(costs) / np.exp(costs).sum(1, keepdims=True)) / 2
    got = distill.confidence(LOGITS, labels)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    np.testing.assert_allclose(np.asarray(got).sum(1), 1, atol=1e-6)
    with pytest.raises(ValueError, match="at least two"):
        distill.confidence(LOGITS[:1], labels)
    with pytest.raises(ValueError, match=r"confidence: logits have shapes .*; give equal ones"):
        distill.confidence([LOGITS[0], LOGITS[1][:, :3]], labels)
    with pytest.raises(ValueError, match=r"confidence: logits have shape \(5, 2, 2\); give \[B, C"):
        distill.confidence([z.reshape(5, 2, 2) for z in LOGITS], labels)


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


def test_a_store_names_what_it_cannot_hold(tmp_path):
    x = np.float32([[1.0, 2.0, -np.inf], [0.0, 3.0, 1.0]])

    def store(teacher=lambda p, x: x, **options):
        return distill.store(tmp_path / "t.jom", teacher, None, [x], progress=False, **options)

    for error, message, options in (
        (TypeError, "dtype=int8 is no type of floats", {"dtype": np.int8}),
        (TypeError, "dtype='half a float' is no type", {"dtype": "half a float"}),
        (TypeError, "no float64 unless jax_enable_x64", {"dtype": np.float64}),
        (TypeError, "complex64 is no type of floats", {"dtype": np.complex64}),
        (ValueError, r"minus infinity, of impossible classes; give top=", {"dtype": np.float32}),
        (ValueError, r"top=3 keeps impossible classes.*give a smaller top=", {"top": 3}),
        (
            ValueError,
            r"outputs of 100 are not finite in float4_e2m1fn",
            {"dtype": jnp.float4_e2m1fn, "teacher": lambda p, x: 100 + 0 * x[:, :2]},
        ),
        (ValueError, r"store: top=0 must be at least 1", {"top": 0}),
        (ValueError, r"store: top=4 of 3 classes", {"top": 4}),
        (ValueError, r"returned shape \(\); give \[B, ", {"teacher": lambda p, x: x[0, 0]}),
        (ValueError, r"shape \(3,\); give .* for top=", {"teacher": lambda p, x: x[0], "top": 1}),
    ):
        with pytest.raises(error, match=message):
            store(**options)
    for dtype in (np.float16, jnp.bfloat16, jnp.float8_e5m2):
        store(dtype=dtype, top=2)
        found = distill.load_stored(tmp_path / "t.jom")
        assert found.values.dtype == dtype
        assert found.indices.tolist() == [[1, 0], [1, 2]]
    # In a wider type what is impossible is kept, and stays so.
    store(dtype=np.float32, top=3)
    p = softmax(distill.load_stored(tmp_path / "t.jom").logits())
    np.testing.assert_allclose(p[0], [1 / (1 + np.e), np.e / (1 + np.e), 0], atol=1e-6)


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
    scores = iter([2.0, 1.0])
    best = distill.succession(
        *chain[0],
        [(*chain[1], chain[1][0])],
        loss,
        optax.adam(0.05),
        lambda step: x,
        evaluate=lambda params: next(scores),
        every=30,
        **options,
    )
    assert not same(best[0], found[0]), "the first score is the best one"
    net = distill.Network(lambda p, x: (chain[1][0](p, x), p), stateful=True, fixed="layer0/bias")
    with pytest.raises(ValueError, match="successor 0 is stateful and teaches"):
        distill.succession(
            *chain[0], [(net, chain[1][1])] * 2, loss, optax.sgd(0.1), [x], **options
        )
    with pytest.raises(ValueError, match="no successors"):
        distill.succession(*chain[0], [], loss, optax.sgd(0.1), [x], **options)
