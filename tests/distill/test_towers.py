import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import accepts_half, batched, finite, kl, log_softmax, normal, traced

from jaxopt_models.distill import affinity, cross_modal, image_text

RNG = np.random.default_rng(0)
WHERE = np.array([True, True, False, True, False])


def cosines(images, texts, temperature):
    images, texts = np.float64(images), np.float64(texts)
    return np.array(
        [
            [i @ t / np.linalg.norm(i) / np.linalg.norm(t) / temperature for t in texts]
            for i in images
        ]
    )


def towers():
    return [normal(RNG, 5, d) for d in (3, 3, 7, 7)]


def mimic(si, st, ti, tt, *, where, weights, temperature):
    return affinity(
        si,
        st,
        ti,
        tt,
        temperature=temperature,
        teacher_temperature=0.5,
        where=where,
        weights=weights,
    )


def test_affinity_against_float64():
    arrays = towers()
    weights = np.float32([1, 2, 100, 0.5, 100])
    total = norm = 0.0
    student, teacher = (
        cosines(*(x[WHERE] for x in pair), t) for pair, t in ((arrays[:2], 0.2), (arrays[2:], 0.5))
    )
    for i, w in enumerate(weights[WHERE]):
        total += w * (kl(teacher[i], student[i]) + kl(teacher[:, i], student[:, i])) / 2
        norm += w
    for x in arrays:
        x[~WHERE] = np.nan
    value, grads = finite(
        mimic, *arrays, where=WHERE, weights=weights, temperature=jnp.float32(0.2)
    )
    np.testing.assert_allclose(value, total / norm, rtol=1e-4)
    for grad in grads:
        np.testing.assert_array_equal(grad[~WHERE], 0)
        assert np.abs(grad[WHERE]).min() > 0


def sharp(si, st, ti, tt, *, where):
    return affinity(si, st, ti, tt, where=where)


@pytest.mark.parametrize("case", ["equal", "longer", "zero", "opposite", "one pair", "no pair"])
def test_degenerate_affinities(case):
    images, texts = normal(RNG, 2, 5, 3)
    student, where = [images, texts], np.ones(5, bool)
    if case == "longer":
        student = [images * 8, texts / 4]
    if case == "zero":
        images[1] = texts[1] = texts[2] = 0
    if case == "opposite":
        student = [-images, texts]
    if case == "one pair":
        student, where = [texts, images], np.arange(5) == 3
    if case == "no pair":
        student, where = [texts, images], np.zeros(5, bool)
    value, grads = finite(sharp, *student, images, texts, where=where)
    if case == "opposite":
        assert value > 10
    else:
        assert value == 0
        for grad in grads:
            np.testing.assert_array_equal(grad, 0)


def find(images, texts, *, where, temperature):
    return image_text(images, texts, temperature=temperature, where=where)


def test_pairs_against_float64():
    images, texts = normal(RNG, 2, 5, 3)
    scores = cosines(images[WHERE], texts[WHERE], 0.1)
    expected = -np.mean(
        [(log_softmax(scores[i])[i] + log_softmax(scores[:, i])[i]) / 2 for i in range(3)]
    )
    images[~WHERE] = np.inf
    heat = jnp.float32(0.1)
    value, grads = finite(find, images, texts, where=WHERE, temperature=heat)
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    np.testing.assert_array_equal(grads[0][~WHERE], 0)
    value, grads = finite(find, 0 * texts, texts, where=WHERE, temperature=heat)
    np.testing.assert_allclose(value, np.log(3), rtol=1e-6)
    np.testing.assert_array_equal(grads[0], 0)
    value, _ = finite(find, -texts, texts, where=WHERE, temperature=jnp.float32(1e-4))
    assert value > 1e3
    value, _ = finite(find, images, texts, where=0 * WHERE, temperature=heat)
    assert value == 0
    slope = jax.jit(jax.grad(lambda t: find(texts, texts, where=WHERE, temperature=t)))(heat)
    assert np.isfinite(slope) and slope != 0


def point(student, teacher, *, where):
    return cross_modal(student, teacher, where=where)


def test_directions_against_float64():
    student, teacher = normal(RNG, 2, 5, 2, 3)
    rows = [
        (s, t) for i in range(5) if WHERE[i] for s, t in zip(student[i], teacher[i], strict=True)
    ]
    expected = np.mean([1 - cosines([s], [t], 1)[0, 0] for s, t in rows])
    student[~WHERE] = np.nan
    value, grads = finite(point, student, teacher, where=WHERE)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for grad in grads:
        np.testing.assert_array_equal(grad[~WHERE], 0)


def test_equal_and_zero_directions():
    student = normal(RNG, 5, 2, 3)
    value, grads = finite(point, 1e-7 * student, -1e-9 * student, where=WHERE)
    np.testing.assert_allclose(value, 2, rtol=1e-6)
    for teacher, expected in ((student, 0), (-student, 2), (0 * student, 0.5)):
        value, grads = finite(point, student, teacher, where=WHERE)
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-12)
        if expected == 0:
            np.testing.assert_allclose(grads[0], 0, atol=1e-6)
    value, _ = finite(point, 0 * student, 0 * student, where=WHERE)
    assert value == 0


def test_towers_under_vmap_and_in_half():
    arrays = towers()
    batched(affinity, *arrays)
    accepts_half(affinity, *arrays, where=WHERE)
    accepts_half(image_text, *arrays[:2])
    accepts_half(cross_modal, *arrays[:2])


@traced
def test_towers_name_what_does_not_fit():
    x = jnp.zeros((5, 3))
    with pytest.raises(
        ValueError, match=r"student_images has shape \(5, 3\), student_texts \(4, 3\)"
    ):
        affinity(x, x[:4], x, x)
    with pytest.raises(ValueError, match=r"the student has 5 pairs, the teacher 4"):
        affinity(x, x, x[:4], x[:4])
    with pytest.raises(ValueError, match=r"teacher_temperature=-1.0 must be positive"):
        affinity(x, x, x, x, teacher_temperature=-1)
    with pytest.raises(TypeError, match=r"temperature='low' is no number"):
        image_text(x, x, temperature="low")
    with pytest.raises(ValueError, match=r"images have shape \(5, 3, 1\); give \[B, D\]"):
        image_text(x[..., None], x[..., None])
    with pytest.raises(ValueError, match=r"where= has shape \(4,\); give \(5,\)"):
        image_text(x, x, where=jnp.ones(4, bool))
    with pytest.raises(ValueError, match=r"where= has shape \(3,\)"):
        cross_modal(x, x, where=jnp.ones(3, bool))
    with pytest.raises(TypeError, match="student is int32"):
        cross_modal(x.astype(int), x)
