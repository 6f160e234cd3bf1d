import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import accepts_half, batched, finite, kl, log_softmax, normal, softmax, traced

from jaxopt_models.distill import ctc_frames, ctc_sequence, transducer

RNG = np.random.default_rng(0)
FRAMES = np.arange(5) < np.array([5, 3, 4])[:, None]


def frames(student, teacher, *, where, weights):
    return ctc_frames(student, teacher, temperature=2.0, where=where, weights=weights)


def spoken(student, teacher, *, where, weights):
    return ctc_frames(
        student, teacher, temperature=2.0, blank=1, drop_blank=True, where=where, weights=weights
    )


@pytest.mark.parametrize("loss", [frames, spoken])
def test_frames_against_float64(loss):
    student, teacher = normal(RNG, 2, 3, 5, 3)
    weights = np.float32([1, 2, 0.5])
    student[~FRAMES] = np.nan
    value, grads = finite(loss, student, teacher, where=FRAMES, weights=weights)
    total = norm = dropped = 0.0
    for b, t in zip(*np.nonzero(FRAMES), strict=True):
        if loss is spoken and teacher[b, t].argmax() == 1:
            np.testing.assert_array_equal(grads[0][b, t], 0)
            dropped += 1
            continue
        total += weights[b] * 4 * kl(teacher[b, t] / 2, student[b, t] / 2)
        norm += weights[b]
    assert dropped > 0 or loss is frames
    np.testing.assert_allclose(value, total / norm, rtol=1e-5)


def test_frames_that_are_all_blank():
    student, teacher = normal(RNG, 2, 3, 5, 3)
    teacher[..., 1] = 1e4
    value, grads = finite(spoken, student, teacher, where=FRAMES, weights=np.ones(3, np.float32))
    assert value == 0
    np.testing.assert_array_equal(grads[0], 0)
    value, _ = finite(frames, -teacher, teacher, where=FRAMES, weights=np.ones(3, np.float32))
    assert value > 1e4


def spellings(labels, frames, classes, blank):
    """All alignments that spell a transcript."""
    for path in itertools.product(range(classes), repeat=frames):
        merged = [c for i, c in enumerate(path) if i == 0 or c != path[i - 1]]
        if [c for c in merged if c != blank] == list(labels):
            yield path


def likelihood(student, labels, blank):
    log_p = log_softmax(student)
    paths = spellings(labels, *student.shape, blank)
    return np.log(sum(np.exp(sum(log_p[t, c] for t, c in enumerate(p))) for p in paths))


@jax.jit
def best(student, hypotheses, scores, where, weights):
    def loss(student):
        return ctc_sequence(
            student, hypotheses, scores=scores, blank=2, where=where, weights=weights
        )

    return jax.value_and_grad(loss)(student)


HYPOTHESES = np.array([[[0, 1, 3], [1, 1, 2]], [[3, 2, 2], [2, 2, 2]], [[0, 0, 2], [0, 2, 2]]])


def test_transcripts_against_all_alignments():
    student, scores = normal(RNG, 3, 5, 4), normal(RNG, 3, 2)
    weights = np.float32([1, 2, 0.5])
    expected = 0.0
    for b in range(3):
        for k in range(2):
            labels = [c for c in HYPOTHESES[b, k] if c != 2]
            frames = student[b][FRAMES[b]]
            share = softmax(scores[b])[k]
            expected -= weights[b] * share * likelihood(frames, labels, 2)
    student[~FRAMES] = np.nan
    value, grad = best(student, HYPOTHESES, scores, FRAMES, weights)
    np.testing.assert_allclose(value, expected / weights.sum(), rtol=1e-5)
    assert np.isfinite(grad).all() and np.abs(grad[FRAMES]).min() > 0
    # An example of padding alone does not count, whatever its transcript is.
    where = FRAMES & (np.arange(3) < 2)[:, None]
    value, _ = best(student, HYPOTHESES, scores, where, weights)
    fewer, _ = best(student[:2], HYPOTHESES[:2], scores[:2], FRAMES[:2], weights[:2])
    np.testing.assert_allclose(value, fewer, rtol=1e-6)


def test_extreme_logits_of_transcripts():
    path = [0, 1, 3, 2, 2]
    student = np.full((3, 5, 4), -1e4, np.float32)
    student[:, range(5), path] = 1e4
    scores, weights = np.zeros((3, 2), np.float32), np.float32([1, 0, 0])
    scores[0, 1] = -1e4
    value, grad = best(student, HYPOTHESES, scores, FRAMES, weights)
    assert value == 0 and np.isfinite(grad).all()
    # Two frames must say what they least want to, at 1e5 each: no alignment is cheaper.
    student = np.full((3, 5, 4), -5e4, np.float32)
    student[:, range(5), [1, 0, 3, 2, 2]] = 5e4
    value, grad = best(student, HYPOTHESES, scores, FRAMES, weights)
    np.testing.assert_allclose(value, 2e5, rtol=1e-6)
    assert np.isfinite(grad).all()


@pytest.mark.parametrize("label", [4, -1])
def test_wrong_labels_are_seen(label):
    student, hypotheses = normal(RNG, 3, 5, 4), HYPOTHESES.copy()
    hypotheses[0, 0, 1] = label
    scores, weights = np.zeros((3, 2), np.float32), np.ones(3, np.float32)
    assert np.isnan(best(student, hypotheses, scores, FRAMES, weights)[0])
    hypotheses[0, 0, 1] = 2  # a gap
    assert np.isnan(best(student, hypotheses, scores, FRAMES, weights)[0])
    hypotheses[0, 0, 1] = 1
    assert np.isfinite(best(student, hypotheses, scores, FRAMES, weights)[0])


def test_one_transcript_with_a_mask_of_labels():
    student, labels = normal(RNG, 3, 5, 4), HYPOTHESES[:, 0]
    where = np.arange(3) < np.array([3, 1, 2])[:, None]

    def loss(student, labels):
        return ctc_sequence(student, labels, blank=2, where_labels=where)

    value = jax.jit(loss)(student, np.where(where, labels, 0))
    expected = [likelihood(student[b], labels[b][where[b]], 2) for b in range(3)]
    np.testing.assert_allclose(value, -np.mean(expected), rtol=1e-5)
    accepts_half(lambda s: loss(s, labels), student)


NODES = np.array([[1, 3], [3, 0], [0, 0]])


def lattice(student, teacher, *, labels, where, weights):
    return transducer(student, teacher, labels, where=where, weights=weights)


def test_lattice_against_float64():
    student, teacher = normal(RNG, 2, 3, 5, 3, 4)
    weights = np.float32([1, 2, 0.5])
    student[~FRAMES] = np.nan
    value, grads = finite(lattice, student, teacher, labels=NODES, where=FRAMES, weights=weights)

    def collapsed(logits, following):
        p = softmax(logits)
        kept = [p[0]] if following is None else [p[following], p[0]]
        return np.log([*kept, 1 - sum(kept)])

    total = norm = 0.0
    for b in range(3):
        labels = [c for c in NODES[b] if c != 0]
        for t in range(FRAMES[b].sum()):
            for u in range(len(labels) + 1):
                following = labels[u] if u < len(labels) else None
                p, q = (collapsed(x[b, t, u], following) for x in (teacher, student))
                total += weights[b] * kl(p, q)
                norm += weights[b]
        for grad in grads:
            np.testing.assert_array_equal(grad[b, :, len(labels) + 1 :], 0)
    np.testing.assert_allclose(value, total / norm, rtol=1e-5)
    for grad in grads:
        np.testing.assert_array_equal(grad[~FRAMES], 0)


@pytest.mark.parametrize("case", ["equal", "one-hot", "rest", "opposite", "empty"])
def test_degenerate_lattices(case):
    teacher = normal(RNG, 3, 5, 3, 4)
    if case == "one-hot":
        teacher = np.where(np.eye(4)[RNG.integers(0, 4, (3, 5, 3))] > 0, 1e4, -1e4)
    if case == "rest":
        teacher[..., 2] = 1e4
    student = -1e4 * teacher if case == "opposite" else teacher
    where = FRAMES & (case != "empty")
    value, grads = finite(
        lattice,
        student.astype(np.float32),
        teacher.astype(np.float32),
        labels=NODES,
        where=where,
        weights=np.ones(3, np.float32),
    )
    if case == "opposite":
        assert value > 1e2
    else:
        assert value == 0
        np.testing.assert_array_equal(grads[0], 0)


def test_two_classes_are_not_collapsed():
    """Before the label nothing is left but blank, behind it blank and the rest are all."""
    student, teacher = normal(RNG, 2, 1, 2, 2, 2)
    value = jax.jit(transducer)(student, teacher, np.array([[1]]))
    expected = [kl(teacher[0, t, u], student[0, t, u]) for t in range(2) for u in range(2)]
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)


def test_a_label_that_is_blank_or_unknown_is_seen():
    logits = np.zeros((3, 5, 3, 4), np.float32)
    options = {"where": FRAMES, "weights": np.ones(3, np.float32)}
    grade = jax.jit(lattice)
    assert grade(logits, logits, labels=NODES, **options) == 0
    for wrong in ([4, 0], [-1, 0], [0, 1]):
        labels = NODES.copy()
        labels[1] = wrong
        assert np.isnan(grade(logits, logits, labels=labels, **options))
    every = jax.jit(lambda x: transducer(x, x, NODES, where_labels=np.ones((3, 2), bool)))
    assert np.isnan(every(logits))


def test_speech_under_vmap_and_in_half():
    student, teacher = normal(RNG, 2, 3, 5, 3, 4)
    batched(lambda s, t: transducer(s, t, NODES), student, teacher)
    accepts_half(lambda s, t: transducer(s, t, NODES), student, teacher)
    accepts_half(lambda s, t: ctc_frames(s, t, drop_blank=True), student[:, :, 0], teacher[:, :, 0])


@traced
def test_speech_names_what_does_not_fit():
    x = jnp.zeros((2, 5, 4))
    with pytest.raises(ValueError, match=r"ctc_frames: blank=4 is none of the 4 classes"):
        ctc_frames(x, x, blank=4)
    with pytest.raises(ValueError, match=r"blank=-1 must be at least 0"):
        ctc_sequence(x, jnp.ones((2, 3), int), blank=-1)
    with pytest.raises(ValueError, match=r"temperature=0.0 must be positive"):
        ctc_frames(x, x, temperature=0)
    with pytest.raises(TypeError, match=r"drop_blank=1 is neither"):
        ctc_frames(x, x, drop_blank=1)
    with pytest.raises(ValueError, match=r"hypotheses have shape \(3, 3\).*B = 2"):
        ctc_sequence(x, jnp.ones((3, 3), int))
    with pytest.raises(ValueError, match=r"scores= are of hypotheses"):
        ctc_sequence(x, jnp.ones((2, 3), int), scores=jnp.ones((2, 3)))
    with pytest.raises(TypeError, match=r"hypotheses is float32"):
        ctc_sequence(x, jnp.ones((2, 3)))
    with pytest.raises(ValueError, match=r"where_labels= has shape \(2,\); give \(2, 3\)"):
        ctc_sequence(x, jnp.ones((2, 3), int), where_labels=jnp.ones(2, bool))
    with pytest.raises(ValueError, match=r"labels has shape \(2, 3\); give \(2, 2\)"):
        transducer(jnp.zeros((2, 5, 3, 4)), jnp.zeros((2, 5, 3, 4)), jnp.ones((2, 3), int))
    with pytest.raises(ValueError, match=r"must be equal"):
        transducer(jnp.zeros((2, 5, 3, 4)), jnp.zeros((2, 5, 3, 5)), jnp.ones((2, 2), int))
