"""What tests of losses share: oracles in float64, and values with derivatives in one program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def log_softmax(x, axis=-1):
    x = np.asarray(x, np.float64)
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def softmax(x, axis=-1):
    return np.exp(log_softmax(x, axis))


def kl(teacher, student):
    """KL of two vectors of logits, class by class."""
    p, q = log_softmax(teacher), log_softmax(student)
    return sum(np.exp(a) * (a - b) for a, b in zip(p, q, strict=True) if np.exp(a) > 0)


def normal(rng, *shape):
    return rng.normal(size=shape).astype(np.float32)


@functools.cache
def graded(loss, count, **options):
    """Compiles a loss: its value and its derivatives by the first `count` arguments."""
    return jax.jit(jax.value_and_grad(functools.partial(loss, **options), tuple(range(count))))


def finite(loss, *arrays, **options):
    """Checks that a loss and its derivatives by all of `arrays` are finite; returns both."""
    arrays = [jnp.asarray(a) for a in arrays]
    value, grads = graded(loss, len(arrays))(*arrays, **options)
    assert value.shape == () and value.dtype == jnp.float32
    assert np.isfinite(value), value
    for grad in grads:
        assert np.isfinite(grad).all(), grad
    return float(value), grads


def traced(test):
    """Runs a test of messages while tracing, so that nothing is compiled for it."""

    @functools.wraps(test)
    def run(**fixtures):
        jax.eval_shape(lambda: test(**fixtures))

    return run


def accepts_half(loss, *arrays, **options):
    """Checks that floats of 16 bits are taken, and that the loss has 32."""
    half = [jnp.asarray(a, jnp.bfloat16) for a in arrays]
    out = jax.eval_shape(lambda *a: loss(*a, **options), *half)
    assert out.shape == () and out.dtype == jnp.float32


def batched(loss, *arrays, **options):
    """Checks that `vmap` over a new axis of two gives what two calls give, and jit the same."""
    call = functools.partial(loss, **options)
    both = [jnp.stack([jnp.asarray(a), jnp.asarray(a)[::-1]]) for a in arrays]
    mapped = jax.jit(jax.vmap(call))(*both)
    one = jax.jit(call)
    for i in range(2):
        np.testing.assert_allclose(mapped[i], one(*(b[i] for b in both)), rtol=1e-5, atol=1e-6)
