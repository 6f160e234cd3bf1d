import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import accepts_half, batched, finite, kl, log_softmax, normal, softmax, traced

from jaxopt_models.distill import attention_relation, self_relation, sequence

RNG = np.random.default_rng(0)
WHERE = np.array([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]], bool)


def qkv(width):
    return [normal(RNG, 3, 4, 2, width) for _ in range(2)]


def relation64(sq, sk, tq, tk, where, *, causal=False, weights=None):
    """Pair by pair: the tokens that each token may attend to, then one divergence."""
    batch, tokens, heads, _ = sq.shape
    weights = np.ones(batch) if weights is None else weights
    total = norm = 0.0
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                if not where[b, t]:
                    continue
                keys = [k for k in range(tokens) if where[b, k] and not (causal and k > t)]
                scores = [
                    [float(q[b, t, h] @ x[b, k, h]) / np.sqrt(q.shape[-1]) for k in keys]
                    for q, x in ((tq, tk), (sq, sk))
                ]
                total += weights[b] * kl(*scores)
                norm += weights[b]
    return total / norm


def plain(sq, sk, tq, tk, *, where, weights):
    return attention_relation(sq, sk, tq, tk, where=where, weights=weights)


def causal(sq, sk, tq, tk, *, where, weights):
    return attention_relation(sq, sk, tq, tk, causal=True, where=where, weights=weights)


RELATION = {False: plain, True: causal}


@pytest.mark.parametrize("causal", [False, True])
def test_attention_against_float64(causal):
    student, teacher = qkv(5), qkv(3)
    weights = np.array([0.5, 2.0, 1.0], np.float32)
    value, _ = finite(
        RELATION[causal], *student, *teacher, where=jnp.asarray(WHERE), weights=weights
    )
    expected = relation64(*student, *teacher, WHERE, causal=causal, weights=weights)
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_padding_has_no_part_in_attention():
    student, teacher = qkv(5), qkv(3)
    for x in (*student, *teacher):
        x[~WHERE] = np.nan
    where, weights = jnp.asarray(WHERE), np.ones(3, np.float32)
    value, grads = finite(RELATION[False], *student, *teacher, where=where, weights=weights)
    expected = relation64(*student, *teacher, WHERE)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad in grads:
        np.testing.assert_array_equal(grad[~WHERE], 0)


@pytest.mark.parametrize("case", ["equal", "zero", "huge", "empty"])
def test_degenerate_attention(case):
    student, teacher = qkv(5), qkv(3)
    where = WHERE
    if case == "equal":
        student = [np.concatenate([x, np.zeros((3, 4, 2, 2), np.float32)], -1) for x in teacher]
        student[0] *= np.float32(np.sqrt(5 / 3))
    if case == "zero":
        student, teacher = [0 * x for x in student], [0 * x for x in teacher]
    if case == "huge":
        student, teacher = [1e2 * x for x in student], [-1e2 * x for x in teacher]
    if case == "empty":
        where = np.zeros_like(WHERE)
    value, grads = finite(
        plain, *student, *teacher, where=jnp.asarray(where), weights=np.ones(3, np.float32)
    )
    assert {"equal": value < 1e-9, "huge": value > 1e3}.get(case, value == 0)
    if case in ("zero", "empty"):
        for grad in grads:
            np.testing.assert_array_equal(grad, 0)


@jax.jit
def relation_heads(student, teacher):
    return self_relation(student, teacher, heads=3)


def test_heads_are_joined_and_split_anew():
    student, teacher = normal(RNG, 2, 4, 6), normal(RNG, 2, 4, 2, 6)
    apart = [x.reshape(2, 4, 3, -1) for x in (student, teacher)]
    expected = relation64(apart[0], apart[0], apart[1], apart[1], np.ones((2, 4), bool))
    np.testing.assert_allclose(relation_heads(student, teacher), expected, rtol=1e-5)
    assert float(relation_heads(teacher, teacher)) == 0


def test_relations_under_vmap_and_in_half():
    student, teacher = normal(RNG, 2, 4, 6), normal(RNG, 2, 4, 2, 6)
    batched(self_relation, student, teacher, heads=3)
    accepts_half(self_relation, student, teacher, heads=3, where=np.ones((2, 4), bool))


@traced
def test_relations_name_what_does_not_fit():
    x = jnp.zeros((2, 4, 3, 6))
    with pytest.raises(ValueError, match=r"heads=4 does not divide the width 18"):
        self_relation(x, x, heads=4)
    with pytest.raises(ValueError, match=r"student's queries have shape \(2, 4, 18\).*set heads="):
        self_relation(x.reshape(2, 4, 18), x)
    with pytest.raises(ValueError, match=r"heads= where the numbers of heads differ"):
        self_relation(x, x[:, :, :2])
    with pytest.raises(ValueError, match=r"its keys \(2, 3, 3, 6\)"):
        attention_relation(x, x[:, :3], x, x)
    with pytest.raises(ValueError, match=r"where= has shape \(2,\); give \(2, 4\)"):
        self_relation(x, x, where=jnp.ones(2, bool))
    with pytest.raises(TypeError, match="where= is float32"):
        self_relation(x, x, where=jnp.ones((2, 4)))
    with pytest.raises(TypeError, match="causal=1 is neither"):
        self_relation(x, x, causal=1)


@jax.jit
def beams(student, tokens, scores, where, weights):
    def loss(student):
        return sequence(student, tokens, scores=scores, where=where, weights=weights)

    return jax.value_and_grad(loss)(student)


def sequence64(student, tokens, scores, where, weights):
    total = norm = 0.0
    for b in range(student.shape[0]):
        share = softmax(scores[b])
        for k, t in zip(*np.nonzero(where[b]), strict=True):
            w = weights[b] * share[k]
            total -= w * log_softmax(student[b, k, t])[tokens[b, k, t]]
            norm += w
    return total / norm


def test_beams_against_float64():
    student, scores = normal(RNG, 2, 3, 4, 5), 2 * normal(RNG, 2, 3)
    tokens = RNG.integers(0, 5, (2, 3, 4))
    where = np.arange(4) < np.array([[4, 2, 3], [1, 0, 4]])[..., None]
    tokens[~where] = -1  # what padding holds does not matter
    weights = np.array([1.0, 3.0], np.float32)
    value, grad = beams(student, tokens, scores, where, weights)
    np.testing.assert_allclose(
        value, sequence64(student, tokens, scores, where, weights), rtol=1e-5
    )
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(grad[~where], 0)
    # A token outside of the vocabulary is not passed over.
    tokens[0, 0, 0] = 5
    assert np.isnan(beams(student, tokens, scores, where, weights)[0])


def test_extreme_beams():
    student = np.full((2, 3, 4, 5), -1e4, np.float32)
    student[..., 1] = 1e4
    tokens, scores = np.ones((2, 3, 4), int), np.float32([[0, -1e4, -np.inf], [5, 5, 5]])
    where, weights = np.ones((2, 3, 4), bool), np.ones(2, np.float32)
    value, grad = beams(student, tokens, scores, where, weights)
    assert value == 0
    np.testing.assert_array_equal(grad, 0)
    value, grad = beams(student, 0 * tokens, scores, where, weights)
    np.testing.assert_allclose(value, 2e4, rtol=1e-6)
    assert np.isfinite(grad).all()
    value, grad = beams(student, tokens, scores, ~where, weights)
    assert value == 0 and np.isfinite(grad).all()


def test_one_sequence_is_the_cross_entropy_of_its_tokens():
    student, tokens = normal(RNG, 2, 4, 5), RNG.integers(0, 5, (2, 4))
    expected = -np.mean(
        [log_softmax(student[b, t])[tokens[b, t]] for b in range(2) for t in range(4)]
    )
    np.testing.assert_allclose(jax.jit(sequence)(student, tokens), expected, rtol=1e-5)
    accepts_half(lambda s: sequence(s, tokens), student)


@traced
def test_sequences_name_what_does_not_fit():
    student, tokens = jnp.zeros((2, 3, 4, 5)), jnp.zeros((2, 3, 4), int)
    with pytest.raises(ValueError, match=r"tokens has shape \(2, 4\); give \(2, 3, 4\)"):
        sequence(student, tokens[:, 0])
    with pytest.raises(ValueError, match=r"scores= are of beams.*\[B, K, T, V\]"):
        sequence(student[:, 0], tokens[:, 0], scores=jnp.zeros(2))
    with pytest.raises(ValueError, match=r"scores= has shape \(2, 4\); give \(2, 3\)"):
        sequence(student, tokens, scores=jnp.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"weights= has shape \(2, 3\); give \(2,\)"):
        sequence(student, tokens, scores=jnp.zeros((2, 3)), weights=jnp.ones((2, 3)))
    with pytest.raises(TypeError, match="tokens is float32"):
        sequence(student, tokens.astype(jnp.float32))
