"""The values of Normal against tables of 1960 and an integral in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxopt_models as jom
from jaxopt_models import quant

# Max, Quantizing for Minimum Distortion, 1960, table I.
PUBLISHED = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


def distortion(values):
    x = np.linspace(-12, 12, 1_000_001)
    p = np.exp(-x * x / 2)
    nearest = values[np.searchsorted((values[1:] + values[:-1]) / 2, x)]
    return np.sum(p * (x - nearest) ** 2) / np.sum(p)


@pytest.mark.parametrize("bits", PUBLISHED)
def test_the_error_is_the_published_one(bits):
    values = np.array(quant.Normal(bits).table)
    assert len(values) == 2**bits and np.array_equal(values, -values[::-1])
    assert distortion(values) == pytest.approx(PUBLISHED[bits], rel=3e-3)


def test_more_bits_are_six_decibels_each():
    errors = [distortion(np.array(quant.Normal(bits).table)) for bits in range(5, 9)]
    assert all(3.5 < a / b < 4 for a, b in itertools.pairwise(errors))


def test_a_rotated_tensor_loses_what_a_normal_one_does():
    w = jax.random.normal(jax.random.key(0), (512, 64)).at[7].multiply(30)
    small = quant.Hadamard(quant.Normal(bits=4))(w, key=jax.random.key(1))
    error = jnp.sum((small.materialize() - w) ** 2) / jnp.sum(w * w)
    assert (
        float(error) < 0.0115 < float(jnp.mean((quant.NF4(group=None)(w).materialize() - w) ** 2))
    )


@pytest.mark.parametrize("bits, kind", [(1, ValueError), (9, ValueError), (2.5, TypeError)])
def test_a_width_out_of_range_is_refused(bits, kind):
    with pytest.raises(kind, match="Normal: bits"):
        quant.Normal(bits)


def test_a_range_of_root_mean_squares_skips_what_is_pruned():
    x = jnp.array([[3.0, 1.0], [-4.0, 1.0], [100.0, -1.0]])[None]
    keep = jnp.array([[1, 1], [1, 1], [0, 1]])[None]
    low, high = quant.RMS(2.0).range(x, quant.Int(bits=4), keep)
    np.testing.assert_allclose(high, [[2 * np.sqrt(12.5), 2.0]], rtol=1e-6)
    np.testing.assert_array_equal(low, -high)
    with pytest.raises(ValueError, match=r"no table of numbers; give times="):
        quant.RMS().range(x, quant.Int(bits=4), keep)
    with pytest.raises(ValueError, match=r"RMS: times=0.0 must be positive"):
        quant.RMS(0.0)
    with pytest.raises(ValueError, match=r"an input has no table"):
        quant.RMS().of_input(None, None, 8)


def test_the_range_of_an_input_is_that_of_its_histogram():
    x = jax.random.normal(jax.random.key(0), (4096, 8)) * 3
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.eye(8)}
    static = quant.Input(bits=8, per="static", observer=quant.RMS(4.0))
    recipe = [jom.Rule("w", jom.chain(quant.Int(bits=8), static))]
    small = jom.compress(params, recipe, stats=jom.calibrate(fn, params, [(x,)], recipe))
    assert 127 * float(small["w"].scale.ravel()[0]) == pytest.approx(12, rel=0.05)


@pytest.mark.parametrize("size", [1e-20, 1e20])
def test_small_and_large_weights(size):
    w = jax.random.normal(jax.random.key(0), (64, 1))
    found, want = (quant.Normal(bits=4)(a).materialize() for a in (w * size, w))
    np.testing.assert_allclose(found / size, want, rtol=1e-3)
