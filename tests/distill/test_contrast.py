"""Contrast: the loss by hand, what is drawn, what is remembered."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import distill

RNG = np.random.default_rng(0)


def draw(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def unit(x):
    x = np.asarray(x, np.float64)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@functools.partial(jax.jit, static_argnames=("negatives", "momentum"))
def contrast(s, t, at, memory, key, *, negatives, where=None, momentum=0.5):
    return distill.contrast(
        s, t, at, memory, key, negatives=negatives, where=where, momentum=momentum, temperature=0.5
    )


def test_the_loss_by_hand(key):
    # Of two examples the only negative of one is the other, however often it is drawn.
    n, k = 2, 3
    memory = distill.contrast_memory(key, n, 4)
    banks = [np.asarray(bank, np.float64) for bank in (memory.teacher, memory.student)]
    s, t, at = draw(2, 4), draw(2, 4), jnp.array([1, 0])
    constants = None
    for _ in range(2):
        agree = []
        for x, bank in zip((s, t), banks, strict=True):
            compared = np.array([[bank[i]] + [bank[1 - i]] * k for i in (1, 0)])
            agree.append(np.einsum("bkd,bd->bk", compared, unit(x)) / 0.5)
        if constants is None:
            constants = [np.mean(np.exp(a)) * n for a in agree]
        expected = 0
        for a, z in zip(agree, constants, strict=True):
            for row in np.exp(a) / z:
                expected -= math.log(row[0] / (row[0] + k / n))
                expected -= sum(math.log(k / n / (p + k / n)) for p in row[1:])
        loss, memory = contrast(s, t, at, memory, key, negatives=k)
        assert float(loss) == pytest.approx(expected / 2, rel=1e-5)
        np.testing.assert_allclose(memory.log_z, np.log(constants), rtol=1e-4, atol=1e-5)
        banks = [unit((b + unit(x)[[1, 0]]) / 2) for b, x in zip(banks, (t, s), strict=True)]
        np.testing.assert_allclose(memory.teacher, banks[0], atol=1e-6)
        np.testing.assert_allclose(memory.student, banks[1], atol=1e-6)
        s, t = draw(2, 4), draw(2, 4)


@jax.jit
def drawn(memory, at, key):
    """How often each example is one of 3000 negatives, from the derivative.

    Where constants are large and vectors orthogonal to the student's, each negative adds its
    vector, all by the same factor.
    """
    n, d = memory.student.shape
    memory = memory._replace(teacher=jnp.eye(n, d), log_z=jnp.full(2, 20.0))
    s = jnp.zeros((1, d)).at[0, -1].set(1.0)
    slope = jax.grad(lambda x: contrast(x, s, at[None], memory, key, negatives=3000)[0])(s)
    return slope[0, :n] * math.exp(20) * (3000 / n) * 0.5


@pytest.mark.parametrize("labels", [None, [0, 1, 0, 2, 1, 0]])
def test_negatives_are_of_other_classes_and_uniform(key, labels):
    memory = distill.contrast_memory(
        key, 6, 7, labels=None if labels is None else jnp.array(labels)
    )
    for at in (0, 3, 5):
        count = np.asarray(drawn(memory, jnp.array(at), jax.random.key(3)))
        own = [i for i in range(6) if (i == at if labels is None else labels[i] == labels[at])]
        others = [i for i in range(6) if i not in own]
        # The derivative of the example itself is that of the first term.
        assert not np.any(count[[i for i in own if i != at]])
        np.testing.assert_allclose(count[others], 3000 / len(others), rtol=0.15)
        assert sum(count[others]) == pytest.approx(3000, rel=1e-3)


def test_what_is_masked_is_not_remembered(key):
    memory = distill.contrast_memory(key, 6, 3)
    s, t, at = draw(3, 3), draw(3, 3), jnp.array([4, 9, 0])
    where = jnp.array([True, False, False])
    loss, after = contrast(s, t, at, memory, key, negatives=5, where=where)
    assert np.isfinite(loss)
    for old, new in ((memory.student, after.student), (memory.teacher, after.teacher)):
        assert np.flatnonzero(np.any(old != new, axis=1)).tolist() == [4]
    # Nothing counts: the constants are still to be found.
    _, same = contrast(s, t, at, memory, key, negatives=5, where=where & False)
    assert np.all(np.isneginf(same.log_z))
    np.testing.assert_array_equal(same.student, memory.student)
    # Outside of the memory, and not masked.
    loss, after = contrast(s, t, at, memory, key, negatives=5, where=~where)
    assert np.isnan(loss)
    assert np.flatnonzero(np.any(memory.student != after.student, axis=1)).tolist() == [0]


def test_no_derivative_passes_through_the_memory(key):
    memory = distill.contrast_memory(key, 6, 3)
    s, t, at = draw(3, 3), draw(3, 3), jnp.arange(3)

    @jax.jit
    @jax.grad
    def slope(s):
        _, after = distill.contrast(s, t, at, memory, key, negatives=5)
        return jnp.sum(after.student) + jnp.sum(after.log_z)

    assert not np.any(slope(s))


def test_arguments_are_checked(key):
    memory = distill.contrast_memory(key, 6, 3)
    x, at = jnp.ones((2, 3)), jnp.arange(2)
    for error, message, call in (
        (
            ValueError,
            r"give \[B, 3\]",
            lambda: distill.contrast(x[:, :2], x[:, :2], at, memory, key),
        ),
        (
            TypeError,
            "indices is float32; give whole",
            lambda: distill.contrast(x, x, x, memory, key),
        ),
        (
            ValueError,
            "negatives=0 must be at least 1",
            lambda: distill.contrast(x, x, at, memory, key, negatives=0),
        ),
        (
            ValueError,
            r"momentum=1\.0 is not in",
            lambda: distill.contrast(x, x, at, memory, key, momentum=1),
        ),
        (ValueError, "examples=1 must be at least 2", lambda: distill.contrast_memory(key, 1, 3)),
        (
            ValueError,
            "labels name one class only",
            lambda: distill.contrast_memory(key, 2, 3, labels=jnp.ones(2, int)),
        ),
    ):
        with pytest.raises(error, match=message):
            call()
