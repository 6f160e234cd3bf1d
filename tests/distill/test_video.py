import jax
import jax.numpy as jnp
import numpy as np
import pytest
from losses import accepts_half, batched, finite, normal, traced

from jaxopt_models.distill import align_frames, motion

RNG = np.random.default_rng(0)
WHERE = np.arange(7) < np.array([7, 3])[:, None]
WHERE[0, 2] = False


def align64(x, frames, where):
    """Means over very short slices of time, each of which lies in one old frame."""
    batch, old = x.shape[:2]
    fine = np.repeat(np.asarray(x, np.float64), frames, axis=1)
    kept = np.repeat(where, frames, axis=1)
    out = np.zeros((batch, frames, *x.shape[2:]))
    for b in range(batch):
        for j in range(frames):
            part = fine[b, j * old : (j + 1) * old][kept[b, j * old : (j + 1) * old]]
            if len(part):
                out[b, j] = part.mean(0)
    return out


@pytest.mark.parametrize("frames", [1, 3, 7, 9])
def test_frames_against_slices_of_time(frames):
    x = normal(RNG, 2, 7, 2, 3)
    expected = align64(x, frames, WHERE)
    x[~WHERE] = np.nan

    def total(x):
        y = align_frames(x, frames, where=WHERE)
        return jnp.sum(y * expected.astype(np.float32)), y

    (_, y), grad = jax.jit(jax.value_and_grad(total, has_aux=True))(x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    assert np.isfinite(grad).all()
    np.testing.assert_array_equal(grad[~WHERE], 0)


def test_frames_that_fall_into_place_are_copied():
    x = normal(RNG, 2, 6, 3)
    same, twice = jax.jit(lambda x: (align_frames(x, 6), align_frames(x, 12)))(x)
    np.testing.assert_array_equal(same, x)
    np.testing.assert_array_equal(twice, np.repeat(x, 2, axis=1))


def masked(student, teacher, *, where, weights):
    return motion(student, teacher, where=where, weights=weights)


def test_motion_against_float64():
    student, teacher = normal(RNG, 2, 2, 7, 3)
    weights = np.float32([1, 2.5])
    total = norm = 0.0
    for b in range(2):
        for t in range(6):
            if WHERE[b, t] and WHERE[b, t + 1]:
                for c in range(3):
                    s, r = (np.float64(x[b, t + 1, c]) - x[b, t, c] for x in (student, teacher))
                    total += weights[b] * (s - r) ** 2
                    norm += weights[b]
    student[~WHERE] = np.nan
    value, grads = finite(masked, student, teacher, where=WHERE, weights=weights)
    np.testing.assert_allclose(value, total / norm, rtol=1e-5)
    for grad in grads:
        np.testing.assert_array_equal(grad[~WHERE], 0)


def test_motion_of_what_moves_alike():
    teacher = normal(RNG, 2, 7, 3)
    options = {"weights": np.ones(2, np.float32)}
    for student, where in ((teacher, WHERE), (-teacher, 0 * WHERE)):
        value, grads = finite(masked, student, teacher, where=where, **options)
        assert value == 0
        np.testing.assert_array_equal(grads[0], 0)
    value, _ = finite(masked, teacher + np.float32([5, -3, 1]), teacher, where=WHERE, **options)
    assert value < 1e-12
    assert float(motion(teacher[:, :1], 2 * teacher[:, :1])) == 0


def test_motion_under_vmap_and_in_half():
    student, teacher = normal(RNG, 2, 2, 7, 3)
    batched(motion, student, teacher)
    accepts_half(motion, student, teacher, where=WHERE)
    accepts_half(lambda x: align_frames(x, 3).sum(), student)


@traced
def test_video_names_what_does_not_fit():
    x = jnp.zeros((2, 6, 3))
    with pytest.raises(ValueError, match=r"of other frames: distill.align_frames"):
        motion(x[:, :2], x)
    with pytest.raises(ValueError, match=r"where= has shape \(2, 5\); give \(2, 6\)"):
        motion(x, x, where=jnp.ones((2, 5), bool))
    with pytest.raises(ValueError, match=r"frames=0 must be at least 1"):
        align_frames(x, 0)
    with pytest.raises(TypeError, match=r"frames=2.5 is no whole number"):
        align_frames(x, 2.5)
    with pytest.raises(ValueError, match=r"x has shape \(6,\); give at least 2 axes"):
        align_frames(x[0, :, 0], 2)
