import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import kl as kl64
from losses import normal

from jaxopt_models.distill._divergence import FLOOR, kl, log_probabilities, pick

RNG = np.random.default_rng(0)


@jax.jit
def both(teacher, student, where):
    """The values, and derivatives of their sum by both."""

    def total(teacher, student):
        values = kl(teacher, student, where=where)
        return jnp.sum(values), values

    (_, values), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(teacher, student)
    return values, grads


EVERY = np.ones((4, 5), bool)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_against_float64(scale):
    teacher, student = scale * normal(RNG, 2, 4, 5)
    values, grads = both(teacher, student, EVERY)
    expected = [kl64(t, s) for t, s in zip(teacher, student, strict=True)]
    np.testing.assert_allclose(values, expected, rtol=1e-4)
    assert all(np.isfinite(g).all() for g in grads)


def test_nearly_equal_logits_lose_nothing():
    teacher = 5 * normal(RNG, 4, 5)
    student = teacher + 1e-3 * normal(RNG, 4, 5)
    values, _ = both(teacher, student, EVERY)
    # The usual sum of p (log p - log q) has an error of 1e-7 here, against values of 1e-7.
    expected = [kl64(t, s) for t, s in zip(teacher, student, strict=True)]
    np.testing.assert_allclose(values, expected, rtol=2e-2)


@pytest.mark.parametrize("case", ["random", "one-hot", "constant", "infinite"])
def test_equal_logits_give_exact_zeros(case):
    x = normal(RNG, 4, 5)
    if case == "one-hot":
        x = np.where(np.eye(4, 5) > 0, 1e4, -1e4).astype(np.float32)
    if case == "constant":
        x = np.full_like(x, 7.0)
    if case == "infinite":
        x[:, 1:3] = -np.inf
    values, grads = both(x, x, EVERY)
    np.testing.assert_array_equal(values, np.zeros(4))
    for grad in grads:
        np.testing.assert_array_equal(grad, np.zeros((4, 5)))


def test_classes_that_are_masked_are_not_there():
    teacher, student = normal(RNG, 2, 4, 5)
    there = np.array([True, False, True, True, False])
    teacher[:, 1] = np.nan
    values, grads = both(teacher, student, np.broadcast_to(there, (4, 5)))
    expected = [kl64(t[there], s[there]) for t, s in zip(teacher, student, strict=True)]
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    for grad in grads:
        np.testing.assert_array_equal(grad[:, ~there], 0)
        assert np.abs(grad[:, there]).min() > 0
    values, grads = both(teacher, student, np.zeros((4, 5), bool))
    np.testing.assert_array_equal(values, np.zeros(4))
    np.testing.assert_array_equal(grads[1], np.zeros((4, 5)))


def test_gradient_is_the_difference_of_the_distributions():
    teacher, student = normal(RNG, 2, 4, 5)
    _, grads = both(teacher, student, EVERY)
    difference = jax.nn.softmax(student) - jax.nn.softmax(teacher)
    np.testing.assert_allclose(grads[1], difference, atol=1e-6)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=20, max_size=20),
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=20, max_size=20),
)
def test_never_negative(teacher, student):
    teacher, student = (np.float32(x).reshape(4, 5) for x in (teacher, student))
    values, grads = both(teacher, student, EVERY)
    assert (np.asarray(values) > -1e-6).all()
    assert all(np.isfinite(g).all() for g in grads)


def test_logits_of_minus_infinity_are_finite():
    x = jnp.array([0.0, -jnp.inf, 0.0])
    np.testing.assert_allclose(log_probabilities(x)[0], -np.log(2), rtol=1e-6)
    assert log_probabilities(x)[1] <= FLOOR / 2


def test_labels_outside_are_nan():
    log_p = jnp.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(pick(log_p, jnp.array([2, 0])), [2, 3])
    np.testing.assert_array_equal(pick(log_p, jnp.array([3, -1])), [np.nan, np.nan])
